"""The progress of a run, from its output alone: no Ray, model or input."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import REASONS, UsageError, one_line
from pipeline.run.failures import sample_failures
from pipeline.run.manifest import is_complete, read_run
from pipeline.write.layout import ERRORS, Ledger
from pipeline.write.passes import read_added
from pipeline.write.receipts import Receipt, list_parts, list_receipts

NAMES = 20  # of a reason
SHARDS = 1000  # with failures, whose reasons are counted


def open_output(output: str) -> tuple[str, dict[str, Any]]:
    """The URI of a run's output and its record. Raises UsageError if there is no run."""
    uri = storage.check_uri(output)
    record = read_run(uri)
    if record is None:
        raise UsageError(f"{output}: no _run.json there: name the output of a job that was started")
    return uri, record


class Account(NamedTuple):
    """Counts of the finished shards of a run's first pass, by the names of their receipts."""

    planned: int
    done: int
    removed: int
    """Shards that are no longer in the input; not among those done."""
    cut: int
    """Shards that are damaged: what is behind the damage is in no table."""
    ok: int
    error: int
    skipped: int
    """Samples without an image."""


def count_shards(
    output: str, record: dict[str, Any], found: Mapping[str, list[Receipt]] | None = None
) -> Account:
    """The account of a run; `found`: the receipts of its first pass, if listed already."""
    listed = list_receipts(Ledger(output=output)) if found is None else found
    receipts = ok = error = cut = skipped = 0
    for receipt in chain.from_iterable(listed.values()):
        receipts, ok, error = receipts + 1, ok + receipt.ok, error + receipt.error
        cut, skipped = cut + receipt.cut, skipped + receipt.skipped
    removed = int(record.get("input", {}).get("removed_shards", 0))
    return Account(
        planned=int(record.get("input", {}).get("shards", 0)),
        done=max(receipts - removed, 0),
        removed=removed,
        cut=cut,
        ok=ok,
        error=error,
        skipped=skipped,
    )


def describe(output: str, record: dict[str, Any], *, shards: int = SHARDS) -> str:
    """Some lines on the progress of a run.

    Listings are read, and the errors of the first so many `shards` with any, whatever its size.
    """
    added = read_added(output)
    ledgers = [Ledger(output=output, first_prompt=first) for first in (0, *added)]
    passes = [list_receipts(ledger) for ledger in ledgers]
    lost = _count_lost(output, record, dict(zip((0, *added), passes, strict=True)))
    count = count_shards(output, record, passes[0])
    complete = is_complete(output, record) and not lost
    failures = sample_failures(output, names=0, shards=shards)
    job = record.get("fingerprint", {}).get("job", "?")
    state = "complete" if complete else "not complete: the same command again does the rest"
    left = max(count.planned - count.done, 0)
    lines = [
        f"{output}: {job}, {state}",
        f"  started {record.get('started_at', '?')}",
        f"  shards: {count.done:,} done, {left:,} left of {count.planned:,}",
        f"  images: {count.ok:,} done, {count.error:,} failed",
    ]
    if count.cut:
        lines.insert(
            3, f"  {count.cut:,} shards are damaged: images behind the damage are in no table"
        )
    if count.removed:
        lines.insert(3, f"  {count.removed:,} more, done before, are no longer in the input")
    if lost:
        lines.append(
            f"  {lost:,} shards have parts that are gone or of another size, and are made again: "
            f"clipseg-ray verify {shlex.quote(output)} names them"
        )
    if not complete:
        missing = record.get("missing", {})
        lines += [f"  missing: {name} {why}" for name, why in list(missing.items())[:10]]
    if failures.unread:
        lines.append(f"    of the first {shards:,} shards with failures:")
    lines += [f"    {reason}: {n:,}" for reason, n in failures.reasons.most_common()]
    if added:
        prompts = sum(map(len, added.values()))
        later = sum(len(some) for receipts in passes[1:] for some in receipts.values())
        left = max(count.planned * len(added) - later, 0)
        lines.append(f"  {prompts:,} prompts were added: {later:,} shards done, {left:,} left")
    if failures.retryable:
        least = "at least " if failures.unread else ""
        lines.append(
            f"  {least}{failures.retryable:,} failures are retryable: "
            f"clipseg-ray retry-failed {output}"
        )
    if count.error:
        lines.append(f"  their names: clipseg-ray status {shlex.quote(output)} --errors")
    return "\n".join(lines)


def _count_lost(
    output: str, record: dict[str, Any], passes: Mapping[int, Mapping[str, list[Receipt]]]
) -> int:
    """Number of finished shards with parts of another size than in their receipts.

    `passes`: the receipts of each, by its first prompt, listed before the parts are.
    """
    names = map(str, record.get("tables", ()))
    tables = [name for name in names if "/" not in name and name not in ("", ".", "..")]
    parts = list_parts(output, tables)
    lost = set()
    for first, receipts in passes.items():
        for id_, some in receipts.items():
            if [receipt.size_bytes for receipt in some] != [parts[first].get(id_, 0)]:
                lost.add(id_)
    return len(lost)


def describe_errors(output: str) -> list[str]:
    """Lines with the reasons of failed images, and the first names of each."""
    sample = sample_failures(output, names=NAMES)
    lines = []
    for reason, count in sample.reasons.most_common():
        lines.append(f"{reason}: {count:,} ({REASONS.get(reason, 'of another version')})")
        for failed in sample.first[reason]:
            where = f"{failed.shard}, row {failed.row}" if failed.row is not None else "the shard"
            detail = f": {failed.detail}" if failed.detail else ""
            lines.append(f"  {failed.name} ({one_line(where, 200)}){one_line(detail, 200)}")
        if (rest := count - len(sample.first[reason])) > 0:
            table = storage.join(output, ERRORS)
            lines.append(f"  and {rest:,} more: {table}/*.parquet has every row")
    return lines or ["no image failed in a finished shard"]
