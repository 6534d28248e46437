"""The commit protocol under crashes at any step and under two drivers at once, without Ray.

A driver here is what a job's driver and workers do to the output, one after the other. Every change
of the storage is a step; at a step a driver may die, as by kill -9 (before or after the change), or
another driver may go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.config.command import run_command
from pipeline.config.options import RunOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import JobError, UsageError
from pipeline.read.ranges import iter_rows
from pipeline.read.shard import Shard
from pipeline.run.close import close_run
from pipeline.run.lifecycle import open_run
from pipeline.run.manifest import is_complete as run_is_complete
from pipeline.run.manifest import read_run
from pipeline.write.commit import finish_shard
from pipeline.write.layout import EMPTY_PART, RECEIPTS, STAGING, Ledger, shard_id
from tests.outputs import (
    SHARDS,
    TABLES,
    errors,
    finish,
    images,
    ledger_of,
    masks,
    rows,
    write,
)

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


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[str], None]]:
    """A list whose function, if any, is called before and after every change of the storage."""
    hooks: list[Callable[[str], None]] = []

    def watch(name: str) -> None:
        change = getattr(storage, name)

        def watched(*args: Any) -> None:
            for hook in hooks:
                hook("before")
            change(*args)
            for hook in hooks:
                hook("after")

        monkeypatch.setattr(storage, name, watched)

    for name in STEPS:
        watch(name)
    return hooks


# What else a command may do to a run that is there.
ANOTHER = {
    "first": {},
    "retry": {"retry": "all"},
    "input changed": {"plan": [replace(SHARDS[0], version="v2"), SHARDS[1]]},
    "restart": {"threshold": 0.25, "restart": True},
}


def settled(command: dict[str, Any]) -> dict[str, Any]:
    """The command that completes what this one has begun."""
    return {name: value for name, value in command.items() if name not in ("retry", "restart")}


@pytest.mark.parametrize("what", ANOTHER)
def test_a_driver_killed_at_any_step_is_completed_by_the_same_command(
    what: str, tmp_path: Path, step: list[Callable[[str], None]]
) -> None:
    """The same without --restart, which has begun; after retry-failed, retry-failed or the job."""
    command = ANOTHER[what]
    for number in range(0, 1000, 1 if what == "first" else 3):
        output = tmp_path / str(number)
        if what != "first":
            drive(str(output))
        left = [number]

        def kill(_: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError

        step[:] = [kill]
        try:
            drive(str(output), **command)
        except KilledError:
            step.clear()
            if what == "restart" and number == 0:
                continue  # killed before it could say what it wants
            rows(output)
            drive(str(output), **(command if what == "retry" and number % 2 else settled(command)))
        else:
            step.clear()
            break
        assert is_complete(output, **command)
    assert 30 < number < 1000


@settings(
    max_examples=45, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    what=st.sampled_from(sorted(ANOTHER)),
    before=st.sampled_from(["nothing", "begun", "done"]),
    turns=st.lists(st.integers(0, 1), max_size=120),
    kills=st.sets(st.integers(0, 80), max_size=3),
)
def test_two_drivers_at_once_leave_every_row_once(
    tmp_path_factory: pytest.TempPathFactory,
    step: list[Callable[[str], None]],
    what: str,
    before: str,
    turns: list[int],
    kills: set[int],
) -> None:
    """`turns`: whose step is next; `kills`: the steps at which the driver dies whose turn it is.

    `before`: which run there is already; of one that has begun, both drivers list half-written
    fragments, which either may finish with, and delete. Each driver ends well, or with an error of
    ours or killed; the second's command afterwards completes it.
    """
    output = tmp_path_factory.mktemp("out") / "run"
    if before != "nothing":
        (drive if before == "done" else begin)(str(output))
    commands = ({}, ANOTHER[what])
    schedule = Schedule(turns, kills)
    step[:] = [schedule.wait]
    threads = [
        threading.Thread(target=schedule.run, args=(i, lambda c=c: drive(str(output), **c)))
        for i, c in enumerate(commands)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    step.clear()
    expected = (JobError, KilledError, *([UsageError] if what == "restart" else []))
    assert all(isinstance(e, expected) for e in schedule.failures), schedule.failures
    last = settled(commands[1])
    if not schedule.failures and what in ("first", "retry"):
        assert is_complete(output)
    rows(output)
    try:
        drive(str(output), **last)
    except UsageError:
        assert what == "restart"  # the first driver came last
        drive(str(output), **ANOTHER[what])
    assert is_complete(output, **last)


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


def finished(output: str) -> tuple[set[storage.FileInfo], int]:
    """The files of finished shards, and how many others have been begun."""
    files = storage.list_files(output)
    stems: dict[str, set[str]] = {RECEIPTS: set(), STAGING: set()}
    for file in files:
        folder, *names = file.uri[len(output) + 1 :].split("/")
        if folder in stems and not file.uri.rpartition("/")[2].startswith("."):
            stems[folder].add(names[0])
    done = stems[RECEIPTS]
    begun = {name for name in stems[STAGING] if name.startswith(("a-tar", "b-tar"))}
    kept = {f for f in files if STAGING not in f.uri and any(name in f.uri for name in done)}
    return kept, len(begun - done)


def complete_after_a_kill(output: str, copy: Path) -> None:
    """Whoever died here, the same command completes the run and touches nothing that is done."""
    before, begun = finished(output)
    assert begun <= 1, "shards in flight: a driver here has one"
    drive(output)
    assert before <= finished(output)[0]
    assert is_complete(_local_copy(output, copy))


def test_processes_killed_at_every_step(folder: str, tmp_path: Path) -> None:
    """kill -9 of a real process before each change of the storage; on S3 before every third."""
    every = 3 if folder.startswith("s3://") else 1
    for step in range(0, 1000, every):
        output = f"{folder}/{step}"
        driver = start_driver(output, step)
        driver.join(60)
        assert driver.exitcode in (0, -signal.SIGKILL)
        if driver.exitcode == 0:
            break
        complete_after_a_kill(output, tmp_path / "copies" / str(step))
    print(f"{step // every} kills")
    assert step >= 20


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 10))]
)
def test_processes_killed_at_random_moments(folder: str, seed: int, tmp_path: Path) -> None:
    """kill -9 from outside, also in the middle of a write."""
    print(f"seed {seed}")
    moments = random.Random(seed)
    for whole in ("first", "second"):  # the first starts the server that forks, too
        started = time.monotonic()
        start_driver(f"{folder}/{whole}").join(60)
    took = time.monotonic() - started
    kills = 0
    for attempt in range(6):
        output = f"{folder}/{attempt}"
        driver = start_driver(output)
        driver.join(moments.uniform(0, took))
        driver.kill()
        driver.join(60)
        assert driver.exitcode in (0, -signal.SIGKILL)
        kills += driver.exitcode != 0
        complete_after_a_kill(output, tmp_path / "copies" / str(attempt))
    print(f"{kills} kills")
    assert kills >= 2


def _local_copy(folder: str, copy: Path) -> Path:
    for file in storage.list_files(folder):
        path = copy / file.uri[len(folder) + 1 :]
        os.makedirs(path.parent, exist_ok=True)
        path.write_bytes(storage.read_bytes(file.uri))
    return copy


def test_restart_leaves_nothing_of_the_run_before(tmp_path: Path) -> None:
    drive(str(tmp_path))
    config = SegmentConfig(
        input="in", output=str(tmp_path), prompt=("z",), run=RunOptions(restart=True)
    )
    run = open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
    assert run.first.todo == SHARDS
    assert rows(tmp_path) == {"images": [], "masks": [], "errors": []}
    assert not (tmp_path / "_SUCCESS").exists()


def test_a_restart_while_another_driver_closes_leaves_no_success(
    tmp_path: Path, step: list[Callable[[str], None]]
) -> None:
    """At every step of the closing driver, another one starts the run over and goes no further."""
    command = {"input": "in", "prompt": ("x", "y"), "threshold": 0.25}
    model, number = {"weights_hash": "abc"}, 0
    while True:
        output = tmp_path / str(number)
        left = [number]

        def restart(_: str, left: list[int] = left, output: Path = output) -> None:
            left[0] -= 1
            if left[0] == -1:
                again = SegmentConfig(**command, output=str(output), run=RunOptions(restart=True))
                open_run(again, SHARDS, model=model, tables=TABLES)

        config = SegmentConfig(input="in", output=str(output), prompt=("x", "y"))
        run = open_run(config, SHARDS, model=model, tables=TABLES)
        for shard in run.first.todo:
            fragments = write_fragments(run.first.ledger, shard)
            finish_shard(run.first.ledger, shard, fragments, (4, 0), TABLES)
        step[:] = [restart]
        with contextlib.suppress(JobError):
            close_run(run, 1.0)
        step.clear()
        record = read_run(str(output))
        assert record is not None
        if left[0] >= 0:
            assert is_complete(output)
            break
        assert record["fingerprint"]["threshold"] == 0.25
        assert not run_is_complete(str(output), record)
        drive(str(output), threshold=0.25)
        assert is_complete(output, threshold=0.25)
        number += 1
    assert number >= 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_told_to_end_at_any_step_of_closing_is_completed_by_the_next(
    number: signal.Signals,
    tmp_path: Path,
    step: list[Callable[[str], None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line and the exit code of the signal; _SUCCESS is there only if it is true."""
    code, successes = {signal.SIGINT: 130, signal.SIGTERM: 143}[number], 0
    for at in range(1000):
        output, left = tmp_path / str(at), [at]

        def tell(_: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                signal.raise_signal(number)

        def job(config: SegmentConfig, tell: Callable[[str], None] = tell) -> None:
            run = open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
            ledger = run.first.ledger
            for shard in run.first.todo:
                finish_shard(ledger, shard, write_fragments(ledger, shard), (4, 0), TABLES)
            step[:] = [tell]
            close_run(run, 1.0)

        arguments = ["in", str(output), "--prompt", "x", "--prompt", "y"]
        ended = run_command(SegmentConfig, job, "segment", arguments, resumes=True)
        step.clear()
        said = capsys.readouterr().err
        if left[0] >= 0:
            assert (ended, said) == (0, "")
            break
        how = "interrupted" if number == signal.SIGINT else "terminated"
        assert ended == code
        assert said == f"segment: error: {how}; the same command again completes the run\n"
        successes += is_complete(output)
        drive(str(output))
        assert is_complete(output)
    assert 0 < successes < at


def test_what_killed_writers_left_goes_with_the_next_command(tmp_path: Path) -> None:
    """Where it is an hour old; other files stay, whoever put them there."""
    drive(str(tmp_path))
    folders = [tmp_path, tmp_path / "masks", *tmp_path.glob("_receipts/*")]
    old = [folder / f".part.parquet.{uuid.uuid4().hex}.tmp" for folder in folders]
    kept = [tmp_path / "masks" / name for name in ("notes.tmp", f".x.{uuid.uuid4().hex}.tmp")]
    for path in (*old, *kept):
        path.write_bytes(b"half")
    for path in (*old, kept[0]):
        os.utime(path, (time.time() - 4000,) * 2)
    drive(str(tmp_path))
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in kept)
    assert is_complete(tmp_path)


def test_a_decision_whose_fragments_are_gone_is_taken_back(tmp_path: Path) -> None:
    """A lifecycle rule on `_staging/` may do that; the next run makes the shard again."""
    ledger, shard = ledger_of(tmp_path), SHARDS[0]
    fragments = write_fragments(ledger, shard)
    for path in tmp_path.glob("_staging/*/*.arrows"):
        path.rename(path.with_name("gone"))
    with pytest.raises(JobError, match="its fragments are gone; run it again"):
        finish_shard(ledger, shard, fragments, (4, 0), TABLES)
    fragments = write_fragments(ledger, shard)
    assert finish_shard(ledger, shard, fragments, (4, 0), TABLES)["rows_in"] == 4


def test_a_damaged_decision_counts_as_gone(tmp_path: Path) -> None:
    ledger, shard = ledger_of(tmp_path), SHARDS[0]
    fragments = write_fragments(ledger, shard)
    folder = tmp_path / STAGING / shard_id(shard.name)
    for damage in (b"", b'{"fragments": [', b"[]", b'{"total": 4}', b"\xff"):
        (folder / f"{ledger.version(shard.version)}.decision").write_bytes(damage)
        with pytest.raises(JobError, match="run it again"):
            finish_shard(ledger, shard, fragments, (4, 0), TABLES)
    assert finish_shard(ledger, shard, fragments, (4, 0), TABLES)["rows_in"] == 4


def test_a_damaged_fragment_costs_its_rows_and_no_more(tmp_path: Path) -> None:
    """It used to end every later command over the same shard."""
    drive(str(tmp_path), SHARDS[:1])
    again = {"shards": SHARDS, "tables": TABLES, "model": {"weights_hash": "abc"}}
    config = SegmentConfig(input="in", output=str(tmp_path), prompt=("x", "y"))
    run = open_run(config, again["shards"], model=again["model"], tables=TABLES)
    ledger, (shard,) = run.first.ledger, run.first.todo
    made = write(
        ledger,
        shard,
        {"images": images(0, 1), "masks": masks(0, 1)},
        {"images": images(3), "masks": masks(3), "errors": errors(2)},
    )
    damaged = tmp_path / STAGING / shard_id(shard.name) / made[0]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(JobError, match="its fragments are gone; run it again"):
        finish_shard(ledger, shard, made, (4, 0), TABLES)
    run = open_run(config, again["shards"], model=again["model"], tables=TABLES)
    assert [s.skip for s in run.first.todo] == ["2-3"]
    drive(str(tmp_path))
    assert is_complete(tmp_path)


def test_rows_in_fragments_are_not_made_again(tmp_path: Path) -> None:
    config = SegmentConfig(input="in", output=str(tmp_path), prompt=("x", "y"))
    run = open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
    ledger = run.first.ledger
    write(ledger, SHARDS[0], {"images": images(1), "masks": masks(1)}, {"errors": errors(2)})
    write(ledger, SHARDS[1], {"images": images(0, 1), "masks": masks(0)})  # incomplete
    run = open_run(config, SHARDS, model={"weights_hash": "abc"}, tables=TABLES)
    assert [s.skip for s in run.first.todo] == ["1-2", ""]
    changed = [replace(SHARDS[0], version="v2"), SHARDS[1]]
    run = open_run(config, changed, model={"weights_hash": "abc"}, tables=TABLES)
    assert [s.skip for s in run.first.todo] == ["", ""]
    drive(str(tmp_path))
    assert is_complete(tmp_path)


def test_a_part_is_never_replaced_by_that_of_a_later_attempt(tmp_path: Path) -> None:
    """Its rows are those of the first decision, although the second attempt failed on a row."""
    ledger, shard = ledger_of(tmp_path), SHARDS[0]
    finish_shard(ledger, shard, write_fragments(ledger, shard), (4, 0), TABLES)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*.parquet")}
    receipt = finish(ledger, shard, {"errors": errors(0, 1, 2, 3)})
    assert (receipt["rows_ok"], receipt["rows_error"]) == (3, 1)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*.parquet")} == before
    assert not list(tmp_path.glob("_staging/*"))
