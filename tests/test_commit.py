"""The commit protocol under crashes at any step and under two drivers at once, without Ray.

At a step of a driver (tests/drivers.py) it may die, as by kill -9 (before or after the change), or
another driver may go on.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.config.options import RunOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import JobError, UsageError
from pipeline.run.close import close_run
from pipeline.run.lifecycle import open_run
from pipeline.run.manifest import is_complete as run_is_complete
from pipeline.run.manifest import read_run
from pipeline.write.commit import finish_shard
from pipeline.write.layout import RECEIPTS, STAGING, shard_id
from tests.drivers import (
    KilledError,
    Schedule,
    begin,
    drive,
    is_complete,
    start_driver,
    write_fragments,
)
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
