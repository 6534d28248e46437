"""Drivers without Ray, and what may happen to them: killed at a step, or another between two steps.

A driver is what a job's driver and workers do to the output, one after the other. Every change of
the storage is a step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config.options import RunOptions
from pipeline.config.segment import SegmentConfig
from pipeline.read.ranges import iter_rows
from pipeline.read.shard import Shard
from pipeline.run.close import close_run
from pipeline.run.lifecycle import open_run
from pipeline.write.commit import finish_shard
from pipeline.write.layout import EMPTY_PART, Ledger
from tests.outputs import SHARDS, TABLES, errors, images, masks, rows, write

THRESHOLD = 0.5
STEPS = ("write_bytes", "write_new", "replace_file", "put_file", "delete_file", "delete_folder")


class KilledError(BaseException):
    """Stands for kill -9: nothing in the code may catch it."""


def drive(
    output: str, plan: list[Shard] = SHARDS, threshold: float = THRESHOLD, **options: Any
) -> None:
    """What a job does to its output."""
    config = SegmentConfig(
        input="in",
        output=output,
        prompt=("x", "y"),
        threshold=threshold,
        run=RunOptions(**options),
    )
    run = open_run(config, plan, model={"weights_hash": "abc"}, tables=TABLES)
    ledger = run.first.ledger
    for shard in run.first.todo:
        kept = [fragment.name for fragment in run.first.kept.get(shard.name, [])]
        made = write_fragments(ledger, shard, threshold)
        finish_shard(ledger, shard, kept + made, (4, 0), TABLES)
    close_run(run, 1.0)


def begin(output: str) -> None:
    """What a job leaves that is killed with a fragment of each shard, and one that is in part."""
    config = SegmentConfig(input="in", output=output, prompt=("x", "y"), threshold=THRESHOLD)
    run = open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
    for shard in SHARDS:
        some = {"images": images(1), "masks": masks(1), "errors": errors(2)}
        write(run.first.ledger, shard, some, {"images": images(3)})


def outcome(shard: Shard) -> tuple[list[int], list[int]]:
    """Which of a shard's four records come out well, and which fail."""
    return ([0, 1, 2, 3], []) if shard.version == "v2" else ([0, 1, 3], [2])


def write_fragments(ledger: Ledger, shard: Shard, threshold: float = THRESHOLD) -> list[str]:
    """Two fragments with the records of a shard that are left, cut at random as batches are."""
    skip = set(iter_rows(shard.skip))
    good, failed = ([row for row in some if row not in skip] for some in outcome(shard))
    cut = random.randrange(4)
    pieces = [
        {"images": images(*some), "masks": masks(*some, threshold=threshold)}
        for some in (good[:cut], good[cut:])
    ]
    pieces[0]["errors"] = errors(*failed)
    return write(ledger, shard, *(piece for piece in pieces if any(map(len, piece.values()))))


def whole(plan: list[Shard]) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of a complete run."""
    good = [(shard.name, row) for shard in plan for row in outcome(shard)[0]]
    return {
        "images": [(*row, None) for row in good],
        "masks": [(*row, prompt) for row in good for prompt in (0, 1)],
        "errors": [(shard.name, row, None) for shard in plan for row in outcome(shard)[1]],
    }


WHOLE = whole(SHARDS)


def is_complete(
    output: Path, plan: list[Shard] = SHARDS, threshold: float = THRESHOLD, **_: Any
) -> bool:
    """Whether the run says that it is, which must then be true to the row and to the byte."""
    if not (output / "_SUCCESS").exists():
        return False
    assert rows(output) == whole(plan)
    written = [json.loads(path.read_text()) for path in output.glob("_receipts/*/*.json")]
    assert sorted(receipt["shard"] for receipt in written) == [shard.name for shard in plan]
    said = {part["path"]: part["sha256"] for receipt in written for part in receipt["parts"]}
    parts = [path for path in output.glob("*/*.parquet") if path.name != EMPTY_PART]
    found = {path.relative_to(output).as_posix(): path.read_bytes() for path in parts}
    assert {path: hashlib.sha256(data).hexdigest() for path, data in found.items()} == said
    used = {
        row["threshold"]
        for path in parts
        if path.parent.name == "masks"
        for row in pq.read_table(path).to_pylist()
    }
    assert used == {threshold}
    return True


class Schedule:
    """Lets one of two threads go on at a time, in a given order; afterwards as they come."""

    def __init__(self, turns: list[int], kills: set[int]):
        self.turns, self.kills, self.steps = list(turns), kills, 0
        self.ended: set[int] = set()
        self.failures: list[BaseException] = []
        self.changed = threading.Condition()
        self.number = threading.local()

    def run(self, number: int, drive: Callable[[], None]) -> None:
        self.number.value = number
        try:
            drive()
        except BaseException as error:  # KilledError is none of Exception
            self.failures.append(error)
        with self.changed:
            self.ended.add(number)
            self.changed.notify_all()

    def wait(self, _: str) -> None:
        """Called by a driver at a step: wait for its turn."""
        number = self.number.value
        with self.changed:
            self.changed.wait_for(lambda: self._is_turn(number))
            if self.turns:
                self.turns.pop(0)
            self.steps += 1
            self.changed.notify_all()
            if self.steps in self.kills:
                raise KilledError

    def _is_turn(self, number: int) -> bool:
        while self.turns and self.turns[0] in self.ended:
            self.turns.pop(0)
        return not self.turns or self.turns[0] == number


def drive_and_die(output: str, environment: dict[str, str], step: int | None) -> None:
    """What a process of its own does: `drive`, with kill -9 just before one change of the storage.

    With `step` None somebody else may kill it.
    """
    os.environ.update(environment)
    left = itertools.count(0)

    def watch(name: str) -> None:
        change = getattr(storage, name)

        def watched(*args: Any) -> None:
            if next(left) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            change(*args)

        setattr(storage, name, watched)

    for name in STEPS:
        watch(name)
    drive(output)


def start_driver(output: str, step: int | None = None) -> Any:
    """A process that drives; forked from one that has imported everything, so it starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "s3fs"])
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    driver = context.Process(target=drive_and_die, args=(output, environment, step))
    # The server that forks does not take over sys.path before Python 3.13.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        driver.start()
    return driver
