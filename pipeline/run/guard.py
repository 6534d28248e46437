"""A bound on how often a batch may kill the worker that processes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from pipeline.errors import JobError

# Deaths of a task's workers over one batch after which a job ends.
WORKER_DEATHS = 8


def bounded(stage: Callable[..., Any], *, apart: bool = False) -> Callable[[Any], Any]:
    """A stage that runs as tasks, for map_batches, whose batches do not kill workers for ever.

    Ray Data starts what was lost with a worker again however often, which is right where machines
    come and go, and never ends where the batch itself is the cause. After WORKER_DEATHS deaths over
    one batch the stage raises JobError. `apart`: from the first death on it is called with
    apart=True, and so can tell which row it was.
    """
    name = getattr(stage, "__name__", type(stage).__name__)

    def checked(batch: Any) -> Any:
        worker: Any = ray._private.worker.global_worker
        deaths = worker.core_worker.get_current_task_attempt_number()  # Ray tells it nowhere else
        if deaths >= WORKER_DEATHS:
            column = "shard" if "shard" in batch.column_names else "name"
            shards = ", ".join(sorted(set(batch[column].to_pylist())))
            raise JobError(f"{name}: its worker died {deaths} times over the same rows of {shards}")
        return stage(batch, apart=True) if apart and deaths else stage(batch)

    checked.__name__ = name
    return checked
