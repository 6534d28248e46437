"""A sample of an input: the first images of a few shards, through the stages of a job, timed.

The job itself runs, in this process: its shards merely end early. So a plan measures the very code
of the work, and the parts it writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.config.options import WorkerOptions
from pipeline.read.records import end_record
from pipeline.read.shard import Shard
from pipeline.run.engine import Engine
from pipeline.run.guard import Stage, run_stage
from pipeline.run.local import LocalDataset, Spent, dataset_of, name_stage, open_local, timed
from pipeline.run.resources import divide

SHARDS = 8  # spread over the input
IMAGES = 64  # of a shard
SOON_S = 1.0  # a batch done sooner is followed by one twice as large


def choose_sample(shards: Sequence[Shard]) -> list[Shard]:
    """A few shards, spread evenly: inputs are often sorted."""
    count = min(SHARDS, len(shards))
    return [shards[i * len(shards) // count] for i in range(count)]


def describe_whole(shards: Sequence[Shard]) -> dict[str, Any]:
    """Of all shards: how many, their bytes, their known rows, and the bytes of those with unknown
    rows."""
    return {
        "shards": len(shards),
        "bytes": sum(shard.size_bytes for shard in shards),
        "rows": sum(max(shard.rows, 0) for shard in shards),
        "bytes_of_unknown": sum(shard.size_bytes for shard in shards if shard.rows < 0),
    }


@contextmanager
def open_sampler(seconds: float, options: WorkerOptions) -> Iterator[Engine]:
    """The engine of a sample; no image is added to it after so many seconds.

    On a GPU if there is one here, unless the options say otherwise.
    """
    import torch  # the job has loaded its model with it

    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    batch_size = divide(options, device, cpus=1, gpus=1)["actor"]["batch_size"]
    with open_local(options) as engine:
        yield replace(
            engine,
            device=device,
            # A CPU runs each image alone, so that batches may be as small as time demands.
            actor={"batch_size": batch_size if device == "cuda" else None},
            dataset=lambda shards: ShardsCutShort(shards, engine.spent, seconds, batch_size),
        )


class ShardsCutShort:
    """The dataset of some shards: the first stage over it, the reading one, is ended early.

    A cut shard ends with a record counting its rows so far, as if it had no more.
    """

    def __init__(self, shards: list[Shard], spent: Spent, seconds: float, most: int):
        """`most`: images in a batch."""
        self.shards, self.spent, self.most = shards, spent, most
        self.size = min(2, most)
        self.end = time.monotonic() + seconds
        self.whole = spent.setdefault("whole", {"rows": 0, "bytes": 0})
        """Of shards of unknown rows that were read to their end."""

    def map_batches(self, fn: Stage, **options: Any) -> LocalDataset:
        """The records of the first stage, and the dataset for the others."""
        return LocalDataset(lambda: self._read(fn), self.spent, warm=True)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """The shards as rows."""
        return dataset_of(self.shards, self.spent).iter_rows()

    def _read(self, read: Stage) -> Iterator[pa.Table]:
        for number, row in enumerate(dataset_of(self.shards, self.spent).blocks()):
            now = time.monotonic()
            share = (self.end - now) / (len(self.shards) - number)
            tables = timed(run_stage(read, row), name_stage(read), self.spent)
            yield from self._cut(self.shards[number], tables, now + share)

    def _cut(self, shard: Shard, tables: Iterator[pa.Table], end: float) -> Iterator[pa.Table]:
        """The first records of a shard, in batches of as many as are done soon, and its end."""
        rows = 0
        for table in tables:
            at = 0
            while at < len(table):
                some = table.slice(at, self.size)
                at += len(some)
                started = time.monotonic()
                yield some
                now = time.monotonic()
                ended = some["row"][-1].as_py() < 0
                rows += len(some) - ended
                if now - started < SOON_S:
                    self.size = min(2 * self.size, self.most)
                if ended and shard.rows < 0:
                    self.whole["rows"] += rows
                    self.whole["bytes"] += shard.size_bytes
                if not ended and (now > end or rows >= IMAGES):
                    last = end_record(shard, rows)
                    yield pa.Table.from_pylist([last], schema=schema.RECORDS)
                    return
