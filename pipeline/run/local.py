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


class LocalDataset:
    """The methods of ray.data.Dataset that jobs use, over blocks made in this process."""

    def __init__(
        self, blocks: Callable[[], Iterator[pa.Table]], busy_s: dict[str, float] | None = None
    ):
        """`busy_s`: seconds of each stage of the stream, by its name."""
        self.blocks, self.busy_s = blocks, {} if busy_s is None else busy_s

    def map_batches(
        self,
        fn: Any,
        *,
        batch_size: int | None = None,
        fn_constructor_args: tuple[Any, ...] = (),
        **resources: Any,
    ) -> LocalDataset:
        """Run a stage, a function or a class as for an actor, over batches of `batch_size`."""
        name = getattr(fn, "__name__", type(fn).__name__)
        busy_s = self.busy_s  # of the whole stream
        busy_s[name] = 0.0

        def blocks() -> Iterator[pa.Table]:
            stage = fn(*fn_constructor_args) if isinstance(fn, type) else fn
            for batch in _batches(self.blocks(), batch_size):
                outputs = run_stage(stage, batch)
                started = time.monotonic()
                for output in outputs:
                    busy_s[name] += time.monotonic() - started
                    yield output
                    started = time.monotonic()
                busy_s[name] += time.monotonic() - started

        return LocalDataset(blocks, busy_s)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Run the stream, and yield its rows."""
        for block in self.blocks():
            yield from block.to_pylist()

    def stats(self) -> str:
        """Seconds of each stage, as ray.data.Dataset.stats() says them."""
        return "\n".join(
            f"Operator {i} MapBatches({name}): \n* Remote wall time: {seconds:.6f}s total"
            for i, (name, seconds) in enumerate(self.busy_s.items())
        )


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

    With $CLIPSEG_RAY_ISOLATE, which config.command sets after a crash, stages that decode run row
    by row in processes of their own.
    """
    task = {"batch_size": None}
    yield Engine(
        device="cpu",
        threads=None,
        read={"batch_size": 1},
        task=task,
        actor={"batch_size": options.batch_size or BATCH_SIZE},
        dataset=_dataset_of,
        guard=_isolated if os.environ.get(ISOLATE) else _unguarded,
        submit=_submit,
    )


def _dataset_of(shards: list[Shard]) -> LocalDataset:
    rows = pa.Table.from_pylist([shard_to_row(shard) for shard in shards])  # of one schema
    return LocalDataset(lambda: (rows.slice(i, 1) for i in range(len(rows))))


def _unguarded(stage: Stage, on_crash: OnCrash | None = None, alone: Stage | None = None) -> Stage:
    return stage


def _isolated(stage: Stage, on_crash: OnCrash | None = None, alone: Stage | None = None) -> Stage:
    if on_crash is None:
        return stage
    return lambda batch: isolate_rows(alone or stage, batch, on_crash)


def _submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function here and now."""
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future
