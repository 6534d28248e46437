"""What of a run is done, failed and left, told from its output alone: no Ray, model or input."""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.account import SUCCESS, read_run
from pipeline.added import read_added
from pipeline.errors import JobError, UsageError
from pipeline.receipts import is_added, list_receipts, stem
from pipeline.resume import discard_shard

_AT_ONCE = 32  # parts of the errors table that are read


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What the errors table holds."""

    reasons: Counter[str]
    """How many rows failed for each reason, the shards' own failures among them."""
    retryable: int
    """How many may work another time."""
    shards: dict[str, bool]
    """The shards with a failure: stem -> whether one of theirs may work another time."""


def open_output(output: str) -> tuple[str, dict[str, Any]]:
    """The URI of a run's output and its record. Raises UsageError where there is no run."""
    uri = storage.check_uri(output)
    record = read_run(uri)
    if record is None:
        raise UsageError(f"{output}: no _run.json there: name the output of a job that was started")
    return uri, record


def read_failures(output: str) -> Failures:
    """The errors of the finished shards; shards without any have no part and cost nothing."""
    files = storage.list_files(storage.join(output, "errors"), recursive=False)
    uris = [file.uri for file in files if file.uri.endswith(".parquet")]
    reasons: Counter[str] = Counter()
    shards: dict[str, bool] = {}
    retryable = 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows in pool.map(_read_errors, uris):
            for row in rows:
                reasons[row["reason"]] += 1
                name = stem(row["shard"])
                shards[name] = shards.get(name, False) or row["retryable"]
                retryable += row["retryable"]
    return Failures(reasons=reasons, retryable=retryable, shards=shards)


def _read_errors(uri: str) -> list[dict[str, Any]]:
    columns = ["shard", "reason", "retryable"]
    data = io.BytesIO(storage.read_bytes(uri))
    try:
        return pq.read_table(data, columns=columns).to_pylist()
    except (OSError, ValueError) as error:  # what pyarrow raises for damage
        raise JobError(f"{uri}: not a readable part of the errors table") from error


def describe(output: str, record: dict[str, Any]) -> str:
    """Some lines on where a run stands."""
    found = list_receipts(output)
    receipts = [r for name, some in found.items() if not is_added(name) for r in some]
    later = sum(len(some) for name, some in found.items() if is_added(name))
    added = read_added(output)
    planned = int(record.get("plan", {}).get("shards", 0))
    complete = storage.exists(storage.join(output, SUCCESS))
    ok, error = sum(r.ok for r in receipts), sum(r.error for r in receipts)
    left = max(planned - len(receipts), 0)
    failures = read_failures(output)
    job = record.get("fingerprint", {}).get("job", "?")
    state = "complete" if complete else "not complete: the same command again does the rest"
    lines = [
        f"{output}: {job}, {state}",
        f"  started {record.get('started_at', '?')}",
        f"  shards: {len(receipts):,} done, {left:,} left of {planned:,}, "
        f"{sum(r.cut for r in receipts):,} not read to their end",
        f"  rows: {ok:,} came out well, {error:,} failed",
    ]
    lines += [f"    {reason}: {n:,}" for reason, n in failures.reasons.most_common()]
    if added:
        prompts = sum(map(len, added.values()))
        left = max(planned * len(added) - later, 0)
        lines.append(f"  {prompts:,} prompts were added: {later:,} shards done, {left:,} left")
    if failures.retryable:
        lines.append(
            f"  {failures.retryable:,} may work another time: clipseg-ray retry-failed {output}"
        )
    return "\n".join(lines)


def forget_failed(output: str, record: dict[str, Any], *, every: bool) -> int:
    """Forget the shards with failures that may work another time, or with any; returns how many.

    Their rows are gone from the tables until they are made anew.
    """
    shards = read_failures(output).shards
    chosen = sorted(name for name, retryable in shards.items() if retryable or every)
    if chosen:
        storage.delete_file(storage.join(output, SUCCESS))
    for name in chosen:
        discard_shard(output, name, [str(table) for table in record.get("tables", ())])
    return len(chosen)
