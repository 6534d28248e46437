"""The first dataset of a job: its shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import ray.data

from pipeline.read.shard import Shard, shard_to_row

# Blocks of the dataset. Ray keeps each as an object, which takes the driver 1.5 to 2 ms; beyond
# this several shards share a task.
READ_TASKS = 5_000


def dataset_of(shards: list[Shard]) -> ray.data.Dataset:
    """One row per shard; every block is a read task of its own: one shard, or a few of many."""
    blocks = min(max(len(shards), 1), READ_TASKS)
    return ray.data.from_items(_Rows(shards), override_num_blocks=blocks)  # type: ignore[arg-type]


class _Rows(Sequence[dict[str, Any]]):
    """The rows of shards, each made when it is asked for: a million take more than 1 GiB."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: Any) -> Any:
        return shard_to_row(self.shards[index])
