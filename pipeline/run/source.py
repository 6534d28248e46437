"""The first dataset of a job: its shards."""

from __future__ import annotations

import ray
import ray.data

from pipeline.read.shard import Shard, shard_to_row

# Blocks of the dataset. Ray keeps each as an object; beyond this several shards share a task.
READ_TASKS = 5_000


def dataset_of(shards: list[Shard]) -> ray.data.Dataset:
    """One row per shard; every block is a read task of its own: one shard, or a few of many."""
    rows = [shard_to_row(shard) for shard in shards]
    blocks = min(max(len(rows), 1), READ_TASKS)
    return ray.data.from_items(rows, override_num_blocks=blocks)
