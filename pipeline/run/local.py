"""This process as the engine of a job: the same stages, one batch after the other, without Ray.

For a few hundred images and for tests: no scheduler, and no options of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.config.command import ISOLATE
from pipeline.config.options import WorkerOptions
from pipeline.read.shard import Shard, shard_to_row
from pipeline.run.engine import Engine
from pipeline.run.guard import OnCrash, Stage, isolate_rows, run_stage

BATCH_SIZE = 16

Spent = dict[str, dict[str, float]]


class LocalDataset:
    """The methods of ray.data.Dataset used by jobs, over blocks made in this process.

    The time of each stage is added to `spent`, see Engine.
    """

    def __init__(
        self, blocks: Callable[[], Iterator[pa.Table]], spent: Spent, *, warm: bool = False
    ):
        """`warm`: run each stage once before its time counts: imports, and buffers of kernels."""
        self.blocks, self.spent, self.warm = blocks, spent, warm

    def map_batches(
        self,
        fn: Any,
        *,
        batch_size: int | None = None,
        fn_constructor_args: tuple[Any, ...] = (),
        **resources: Any,
    ) -> LocalDataset:
        """Run a stage, a function or a class as for an actor, over batches of `batch_size`."""

        def blocks() -> Iterator[pa.Table]:
            stage = fn(*fn_constructor_args) if isinstance(fn, type) else fn
            name, warm = name_stage(stage), self.warm
            for batch in _batches(self.blocks(), batch_size):
                if warm:
                    next(run_stage(stage, batch.slice(0, 1)), None)
                    warm = False
                yield from timed(run_stage(stage, batch), name, self.spent)

        return LocalDataset(blocks, self.spent, warm=self.warm)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Run the stream, and yield its rows."""
        for block in self.blocks():
            yield from block.to_pylist()


def name_stage(stage: Any) -> str:
    """The name of a function, or of the class of an object."""
    return str(getattr(stage, "__name__", type(stage).__name__))


@contextmanager
def clock(name: str, spent: Spent) -> Iterator[None]:
    """Add the time of the block to a stage's."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    so_far = spent.setdefault(name, {"wall_s": 0.0, "cpu_s": 0.0})
    so_far["wall_s"] += time.perf_counter() - wall
    so_far["cpu_s"] += time.process_time() - cpu


def timed(work: Iterator[pa.Table], name: str, spent: Spent) -> Iterator[pa.Table]:
    """The same tables, and the time until each of them added to a stage's."""
    while True:
        with clock(name, spent):
            table = next(work, None)
        if table is None:
            return
        yield table


def _batches(blocks: Iterator[pa.Table], size: int | None) -> Iterator[pa.Table]:
    """Blocks as they come, or their rows in tables of `size`, the last of them smaller."""
    waiting: list[pa.Table] = []
    for block in blocks:
        if size is None:
            yield block
            continue
        waiting.append(block)
        while sum(map(len, waiting)) >= size:
            rows = pa.concat_tables(waiting)
            yield rows.slice(0, size)
            waiting = [rows.slice(size)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


@contextmanager
def open_local(options: WorkerOptions) -> Iterator[Engine]:
    """The engine for a job in this process; see engine.open_engine.

    With $CLIPSEG_RAY_ISOLATE, set by config.command after a crash, decoding stages run row by row
    in processes of their own.
    """
    task = {"batch_size": None}
    spent: Spent = {}
    yield Engine(
        device="cpu",
        threads=None,
        read={"batch_size": 1},
        task=task,
        actor={"batch_size": options.batch_size or BATCH_SIZE},
        dataset=lambda shards: dataset_of(shards, spent),
        guard=_isolated if os.environ.get(ISOLATE) else _unguarded,
        finishers=1,
        submit=lambda *call: _submit(spent, *call),
        spent=spent,
    )


def dataset_of(shards: list[Shard], spent: Spent) -> LocalDataset:
    """One row per shard, in blocks of one."""
    rows = pa.Table.from_pylist([shard_to_row(shard) for shard in shards])  # of one schema
    return LocalDataset(lambda: (rows.slice(i, 1) for i in range(len(rows))), spent)


def _unguarded(stage: Stage, on_crash: OnCrash | None = None, alone: Stage | None = None) -> Stage:
    return stage


def _isolated(stage: Stage, on_crash: OnCrash | None = None, alone: Stage | None = None) -> Stage:
    if on_crash is None:
        return stage
    return lambda batch: isolate_rows(alone or stage, batch, on_crash)


def _submit(spent: Spent, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function here and now."""
    future: Future[Any] = Future()
    with clock(name_stage(function), spent):
        future.set_result(function(*arguments))
    return future
