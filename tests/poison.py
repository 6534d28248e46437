"""Stages with holes, importable by Ray's workers and by the processes that these start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import JobError
from pipeline.prepare.images import PrepareImages
from pipeline.read import records as read
from pipeline.read.shard import Shard

POISON = b"poison"


class PoisonedPrepare(PrepareImages):
    """A decoder with a hole: one image ends its process."""

    def _prepare(self, record: dict[str, Any]) -> dict[str, Any]:
        if record["image"] == POISON:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._prepare(record)


_read_shard = read.read_shard


def poisoned_read_shard(shard: Shard) -> Iterator[dict[str, Any]]:
    """A reader with one: it dies over the third row of b.tar."""
    for record in _read_shard(shard):
        if shard.name == "b.tar" and record["row"] == 2:
            os._exit(7)
        yield record


def poisoned_read_batches(shards: pa.Table) -> Iterator[pa.Table]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "read_shard", poisoned_read_shard)
        yield from read.read_batches(shards)


def poisoned_read_one_by_one(shards: pa.Table) -> Iterator[pa.Table]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "read_shard", poisoned_read_shard)
        yield from read.read_one_by_one(shards)


def die(batch: pa.Table) -> pa.Table:
    os.kill(os.getpid(), signal.SIGKILL)
    return batch


def count_and_die(signal_number: int) -> Iterator[int]:
    yield from range(3)
    if signal_number:
        os.kill(os.getpid(), signal_number)
    raise JobError("as usual")
