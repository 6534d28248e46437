"""Bound the worker crashes over one batch, and find the row at fault.

Decoders and pyarrow are C: crafted bytes may end their process, and nothing can be caught. Ray Data
restarts the work of a dead worker without limit: right while machines come and go, endless if the
batch itself is the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from pipeline.errors import JobError
from pipeline.run.isolate import ProcessDiedError, run_apart

# Worker crashes over one batch before the job fails.
MAX_CRASHES = 8

Stage = Callable[[pa.Table], "pa.Table | Iterator[pa.Table]"]


class OnCrash(Protocol):
    """Output in the place of a row fatal to its process."""

    def __call__(
        self, row: pa.Table, last: pa.Table | None, how: str, /, *, killed: bool
    ) -> pa.Table:
        """`row`: the input; `last`: its last output before; `how` it ended; `killed`: outside."""
        ...


def guarded(
    stage: Stage,
    on_crash: OnCrash | None = None,
    alone: Stage | None = None,
    *,
    max_crashes: int = MAX_CRASHES,
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """Wrap a stage of tasks so that no batch kills workers for ever.

    With `on_crash`, a batch is run again after the death of a worker, row by row in processes of
    its own, and `on_crash` answers for a row ending one. `alone` replaces the stage there, to hand
    on output sooner. After `max_crashes` deaths over one batch the stage raises JobError.
    """
    name = getattr(stage, "__name__", type(stage).__name__)

    def checked(batch: pa.Table) -> Iterator[pa.Table]:
        from pipeline.run.private import attempts_before  # Ray, which runs it

        crashes = attempts_before()
        if crashes >= max_crashes:
            column = "shard" if "shard" in batch.column_names else "name"
            shards = ", ".join(sorted(set(batch[column].to_pylist())))
            raise JobError(
                f"{name}: its worker died {crashes} times over the same rows of {shards}"
            )
        if crashes and on_crash:
            yield from isolate_rows(alone or stage, batch, on_crash)
        else:
            yield from run_stage(stage, batch)

    checked.__name__ = name
    return checked


def run_stage(stage: Stage, batch: pa.Table) -> Iterator[pa.Table]:
    """The output of a stage, whether it returns one table or yields several."""
    output = stage(batch)
    yield from [output] if isinstance(output, pa.Table) else output


def isolate_rows(stage: Stage, batch: pa.Table, on_crash: OnCrash) -> Iterator[pa.Table]:
    """The output of a stage, one row after the other in a process of its own."""
    done = 0
    last: pa.Table | None = None
    while done < len(batch):
        try:
            for output in run_apart(_each_row, stage, batch.slice(done)):
                if output is None:  # the row is through
                    done, last = done + 1, None
                else:
                    last = output
                    yield output
        except ProcessDiedError as death:
            yield on_crash(batch.slice(done, 1), last, death.how, killed=death.killed)
            done, last = done + 1, None


def _each_row(stage: Stage, batch: pa.Table) -> Iterator[Any]:
    """The outputs of each row, and None after them."""
    for index in range(len(batch)):
        yield from run_stage(stage, batch.slice(index, 1))
        yield None
