"""The end of a run: receipts held against the input, counts into _run.json, `_SUCCESS`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import JobError, StorageError, one_line
from pipeline.read.shard import Shard
from pipeline.run.lifecycle import Pass, Run
from pipeline.run.manifest import (
    name_success,
    now,
    refuse_another_start,
    replace_run,
)
from pipeline.run.resume import read_names
from pipeline.write.layout import SUCCESS, Ledger, shard_id
from pipeline.write.passes import read_added
from pipeline.write.receipts import (
    Receipt,
    Receipts,
    covers,
    is_borne_out,
    list_parts,
    list_receipts,
)

Parts = Mapping[int, Mapping[str, int]]  # bytes by first prompt and id of a shard


def close_run(
    run: Run,
    seconds: float,
    lost: dict[str, str] | None = None,
    stages: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Check that the receipts equal the shards, write the counts into _run.json, and _SUCCESS.

    `seconds`: duration of the passes. `lost`: by the name of a shard, what of it the storage did
    not give. `stages`: busy seconds of each. Returns the counts over all shards. Raises JobError if
    a shard has no receipt, or if meanwhile prompts were added or the run started over.
    """
    refuse_another_start(run.output, run.record)
    listed = [list_receipts(each.ledger) for each in run.passes]
    parts = list_parts(run.output, run.tables)  # after the receipts: they are written before them
    found = [
        _count_pass(each, receipts, run.first, listed[0], parts)
        for each, receipts in zip(run.passes, listed, strict=True)
    ]
    if missing := set().union(*(names for _, names in found)):
        _refuse_unfinished(run, missing, lost or {})
    _refuse_more_prompts(run)
    counts = _sum_up(run, [of_pass for of_pass, _ in found])
    removed = set()
    if len(listed[0]) > len(run.first.shards):  # each of these has one
        removed = listed[0].keys() - {shard_id(shard.name) for shard in run.first.shards}
    names = read_names(run.first.ledger, {id_: listed[0][id_] for id_ in removed})
    if names:
        run.notes.append(_note_removed(len(removed), names))
    images = sum(of_pass["made"] for of_pass, _ in found)
    last: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "images": images,
        "images_per_s": images / seconds,
    }
    last["stages"] = {name: round(busy, 3) for name, busy in (stages or {}).items()}
    run.record["throughput"] = last
    record = run.record | {"status": "complete", "finished_at": now()}
    record |= {"counts": counts, "removed_shards": names}
    replace_run(run.output, record)
    said = name_success(record, [each.ledger.first_prompt for each in run.passes[1:]])
    storage.write_bytes(storage.join(run.output, SUCCESS), said.encode())
    try:  # while we wrote that
        refuse_another_start(run.output, record)
        _refuse_more_prompts(run)
    except JobError:
        storage.delete_file(storage.join(run.output, SUCCESS))
        raise
    for each in run.passes:
        with contextlib.suppress(StorageError):  # another driver may just be adding to it
            storage.delete_folder(each.ledger.staging)
    run.record.update(record)
    return counts


def _count_pass(
    of_pass: Pass, receipts: Receipts, first: Pass, of_first: Receipts, parts: Parts
) -> tuple[Counter[str], set[str]]:
    """(sums over the valid receipts, the names of shards without one).

    One is valid if its parts are of its size and, in an addition, if it covers the first pass.
    """
    counts: Counter[str] = Counter()
    missing = set()
    todo = {shard.name for shard in of_pass.todo}
    for shard in of_pass.shards:
        id_ = shard_id(shard.name)
        receipt = _borne_out(of_pass.ledger, shard, id_, receipts, parts)
        if receipt and of_pass.ledger.added:
            before = _borne_out(first.ledger, shard, id_, of_first, parts)
            if before is None or not covers(receipt, [before]):
                receipt = None
        if receipt is None:
            missing.add(shard.name)
            continue
        counts["shards"] += 1
        counts["cut"] += receipt.cut
        counts["ok"] += receipt.ok
        counts["error"] += receipt.error
        counts["skipped"] += receipt.skipped
        if shard.name in todo:
            counts["made"] += receipt.ok + receipt.error
    return counts, missing


def _borne_out(
    ledger: Ledger, shard: Shard, id_: str, receipts: Receipts, parts: Parts
) -> Receipt | None:
    """The receipt of a shard in a pass if its parts are of the right size."""
    found = receipts.get(id_, [])
    size_bytes = parts[ledger.first_prompt].get(id_, 0)
    return found[0] if is_borne_out(found, ledger.version(shard.version), size_bytes) else None


def _refuse_unfinished(run: Run, missing: set[str], lost: dict[str, str]) -> None:
    """Record the missing shards, and raise JobError."""
    order = sorted(missing, key=lambda name: (name not in lost, name))
    note_missing(run, {name: lost.get(name, "not finished") for name in order})
    size = sum(shard.size_bytes for shard in run.first.shards if shard.name in missing)
    whole = sum(shard.size_bytes for shard in run.first.shards)
    what = f"{len(missing):,} of {len(run.first.shards):,} shards are not complete"
    share = f" ({size / whole:.0%} of the bytes)" if size else ""
    some = "; ".join(
        f"{one_line(name)} {one_line(lost[name], 200)}".strip() if name in lost else one_line(name)
        for name in order[:3]
    )
    more = ", ..." if len(order) > 3 else ""
    raise JobError(f"{what}{share}: {some}{more}; the same command takes them up again")


def note_missing(run: Run, missing: dict[str, str]) -> None:
    """Note an incomplete run for `status`: the names of shards, and why."""
    run.record["status"] = "incomplete"
    run.record["missing"] = dict(list(missing.items())[:100])
    replace_run(run.output, run.record)


def _refuse_more_prompts(run: Run) -> None:
    if read_added(run.output).keys() != {each.ledger.first_prompt for each in run.passes[1:]}:
        raise JobError(f"{run.output}: prompts were added meanwhile; the same command tells which")


def _note_removed(count: int, names: list[str]) -> str:
    shown = ", ".join(map(one_line, names[:3]))
    return (
        f"warning: {count} finished shards are no longer in the input "
        f"({shown}{', ...' if count > 3 else ''}): "
        "their rows stay in the tables and are not counted"
    )


def _sum_up(run: Run, found: list[Counter[str]]) -> dict[str, int]:
    """Counts over all shards: shards, shards cut short, rows in, ok and error, rows of tables."""
    first = found[0]
    counts = {
        "shards": first["shards"],
        "shards_failed": first["cut"],
        "rows_in": first["ok"] + first["error"],
        "rows_ok": first["ok"],
        "rows_error": first["error"],
        "samples_without_image": first["skipped"],
        **{n: first["ok"] * t.rows_per_image for n, t in run.tables.items() if t.rows_per_image},
    }
    for each, of_pass in zip(run.passes[1:], found[1:], strict=True):
        counts["rows_error_later"] = counts.get("rows_error_later", 0) + of_pass["error"]
        for name, table in each.tables.items():
            if table.per_prompt:
                counts[name] += of_pass["ok"] * table.rows_per_image
    return counts
