"""The stream of a job run to its end: counts of each shard, and shards finished as they close."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.data

from pipeline.errors import JobError
from pipeline.run.lifecycle import Run, close_run
from pipeline.run.progress import ProgressDisplay
from pipeline.write.commit import finish_shard

# Shards whose parts are being put together at the same time.
FINISHING_AT_ONCE = 8
# Rows after which a job may be stopped for too many that failed.
ERROR_RATE_ROWS = 1_000


@dataclass
class _Open:
    """What has come out of a shard so far."""

    records: int = 0
    images: int = 0
    outputs: int = 0
    total: int = -1
    fragments: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.records += row["images"] + row["errors"]
        self.images += row["images"]
        self.outputs += row["outputs"]
        self.total = max(self.total, row["total"])
        self.fragments.append(row["fragment"])

    def closes(self, outputs_per_image: int) -> bool:
        """Whether all records are there, and all that belongs to each image."""
        return self.total == self.records and self.outputs == self.images * outputs_per_image


def finish(run: Run, streams: list[ray.data.Dataset], *, quiet: bool) -> dict[str, int]:
    """Run the stream of each of the run's passes to its end, and close the run.

    Returns the counts over all shards. Raises JobError when a shard or a row is missing.
    """
    started = time.monotonic()
    todo = [shard for each in run.passes for shard in each.todo]
    size_bytes = sum(shard.size_bytes for shard in todo)
    with ProgressDisplay(size_bytes, len(todo), quiet=quiet) as progress:
        for each, accounts in zip(run.passes, streams, strict=True):
            if each.todo:
                _follow(accounts, each, progress)
    return close_run(run, time.monotonic() - started)


def _follow(accounts: ray.data.Dataset, run: Run, progress: ProgressDisplay) -> None:
    """Run a stream to its end, and finish each shard when its account closes."""
    shards = {shard.name: shard for shard in run.todo}
    task = ray.remote(num_cpus=0, max_retries=3)(finish_shard)
    open_shards: dict[str, _Open] = {}
    finishing: list[Any] = []
    reasons: Counter[str] = Counter()
    images = 0

    def collect(at_most: int) -> None:
        """Take in finished shards until at most so many are still being put together."""
        nonlocal finishing
        while len(finishing) > at_most:
            ready, finishing = ray.wait(finishing)
            for receipt in ray.get(ready):
                progress.shard(shards[receipt["shard"]].size_bytes)

    outputs = sum(table.rows_per_image for name, table in run.tables.items() if name != "images")
    for row in accounts.iter_rows():
        account = open_shards.setdefault(row["shard"], _Open())
        account.add(row)
        images += row["images"]
        progress.rows(row["images"], row["errors"])
        if row["reason"]:
            reasons[row["reason"]] += max(row["errors"], 1)  # one for a shard without rows
            _stop_at_errors(run, images, reasons)
        if account.closes(outputs):
            shard = shards[row["shard"]]
            ref = task.remote(run.output, shard, account.fragments, account.total, run.tables)
            finishing.append(ref)
            del open_shards[row["shard"]]
            collect(FINISHING_AT_ONCE)
    collect(0)


def _stop_at_errors(run: Run, images: int, reasons: Counter[str]) -> None:
    """Raise JobError when too large a share of the rows failed."""
    errors = reasons.total()
    rows = images + errors
    if rows >= ERROR_RATE_ROWS and errors > run.max_error_rate * rows:
        often, _ = reasons.most_common(1)[0]
        raise JobError(
            f"{errors:,} of the first {rows:,} rows failed, most often with {often}, which is more "
            f"than --max-error-rate {run.max_error_rate:g} allows: look at {run.output}/errors, "
            "and raise it if the input is like that"
        )
