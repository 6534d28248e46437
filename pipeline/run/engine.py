"""Engines of a stream: Ray, or this process for a few hundred images.

A job writes its stream once, as map_batches over the dataset of its engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.read.shard import Shard
from pipeline.run.guard import Stage


class Dataset(Protocol):
    """The methods of ray.data.Dataset used by jobs."""

    def map_batches(self, fn: Any, **options: Any) -> Dataset:
        """Run a stage over every batch."""
        ...

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """Run the stream, and yield its rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Place of the stages, and share of CPUs and GPUs for each kind of stage."""

    device: str
    """"cpu" or "cuda"."""
    threads: int | None
    """Rows that an actor on a CPU runs beside each other, each on a thread; None: as many as
    torch has threads."""
    read: dict[str, Any]
    """Arguments of map_batches for reading: one shard after the other."""
    task: dict[str, Any]
    """Arguments of map_batches for other tasks: a block as it comes."""
    actor: dict[str, Any]
    """Arguments of map_batches for the actors with the model."""
    dataset: Callable[[list[Shard]], Dataset]
    """One row per shard, as read.shard.shard_to_row gives it."""
    guard: Callable[..., Stage]
    """Wrap a stage of tasks: guard(stage, on_crash=None, alone=None); see run.guard."""
    submit: Callable[..., Future[Any]]
    """Call a function outside the stream: submit(function, *arguments)."""
    finishers: int
    """Number of shards whose parts are put together at the same time."""
    spent: dict[str, dict[str, float]] = field(default_factory=dict)
    """Time of each stage so far, where the engine knows it: wall_s, and cpu_s of all threads."""


_TOTAL = re.compile(r"\* Remote wall time: .*?([\d.]+)(us|ms|s) total")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def stage_seconds(stream: Dataset) -> dict[str, float]:
    """Busy seconds of each stage of a stream on Ray, over all processes, in the stages' order.

    From the text of Dataset.stats(): it may leave stages out. Stages in one task are one:
    "read_batches + PrepareImages". Empty for a stream in this process: see Engine.spent.
    """
    found: dict[str, float] = {}
    try:
        text = getattr(stream, "stats", str)()
    except Exception:  # of Ray's making, with every row there: no run fails for such a figure
        return found
    name = ""
    for line in text.splitlines():
        if line.startswith("Operator "):
            name = " + ".join(re.findall(r"MapBatches\((\w+)\)", line))
        if name and (total := _TOTAL.match(line)):
            found[name] = found.get(name, 0.0) + float(total[1]) * _UNITS[total[2]]
    return found
