"""Prompts that are added to a run: only they are computed, and the account still closes.

As in test_commit a driver here is what a job does to its output, without Ray.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import status
from pipeline.config.options import RunOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import JobError, UsageError
from pipeline.read.shard import Shard
from pipeline.run import lifecycle as account
from pipeline.run import resume
from pipeline.run.close import close_run
from pipeline.run.lifecycle import Pass, Run, open_run
from pipeline.run.manifest import is_complete, read_run
from pipeline.run.resume import discard_shard
from pipeline.write import commit
from pipeline.write.layout import Ledger
from tests.drivers import KilledError, Schedule
from tests.outputs import SHARDS, TABLES, errors, images, rows, rows_of
from tests.outputs import finish as finish_tables

# What comes out of the four records of a shard: images and errors, by the number of the pass.
GOOD, BAD = (0, 1, 3), (2,)


def open_(output: Path, prompts: Sequence[str], plan: list[Shard] = SHARDS, **options: Any) -> Run:
    config = SegmentConfig(
        input="in", output=str(output), prompt=tuple(prompts), run=RunOptions(**options)
    )
    return open_run(config, plan, model={"weights_hash": "abc"}, tables=TABLES)


def drive(
    output: Path, prompts: Sequence[str], plan: list[Shard] = SHARDS
) -> list[tuple[str, int]]:
    """Make what is left; returns the passes over shards that were."""
    run = open_(output, prompts, plan)
    made = []
    for each in run.passes:
        for shard in each.todo:
            finish(each, shard, GOOD, BAD)
            made.append((shard.name, each.ledger.first_prompt))
    close_run(run, 1.0)
    return made


def finish(
    each: Pass, shard: Shard, good: Sequence[int], bad: Sequence[int | None]
) -> dict[str, Any]:
    """One pass over a shard, of which these rows come out well and these fail."""
    every = [
        {"row": row, "prompt_id": each.ledger.first_prompt + i, "prompt": prompt}
        for row in good
        for i, prompt in enumerate(each.prompts)
    ]
    made = {"images": images(*good), "masks": rows_of("masks", *every), "errors": errors(*bad)}
    return finish_tables(each.ledger, shard, made, tables=each.tables)


def prompts_of(output: Path) -> list[tuple[int, str]]:
    """Of every mask, each once; every image must have all of them."""
    found = [r for p in (output / "masks").glob("*.parquet") for r in pq.read_table(p).to_pylist()]
    pairs = sorted({(row["prompt_id"], row["prompt"]) for row in found})
    keys = rows(output)
    assert keys["images"] == [(f"{s}.tar", row, None) for s in "ab" for row in GOOD]
    assert keys["masks"] == [(*key[:2], i) for key in keys["images"] for i, _ in pairs]
    assert keys["errors"] == [(f"{s}.tar", row, None) for s in "ab" for row in BAD]
    return pairs


def files(output: Path) -> dict[Path, tuple[int, bytes]]:
    """The parts and receipts: when they were written, and what is in them."""
    found = [*output.glob("*/*-*.parquet"), *output.glob("_receipts/*/*.json")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def counts(output: Path) -> dict[str, int]:
    return json.loads((output / "_run.json").read_text())["counts"]


def test_only_what_was_added_is_made(tmp_path: Path) -> None:
    drive(tmp_path, "xy")
    before = files(tmp_path)
    assert drive(tmp_path, "zxy") == [("a.tar", 2), ("b.tar", 2)]
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z")]
    assert drive(tmp_path, "xyzvw") == [("a.tar", 3), ("b.tar", 3)]
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z"), (3, "v"), (4, "w")]
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert len(list((tmp_path / "masks").glob("a-tar-*.from-3.parquet"))) == 1
    assert drive(tmp_path, "wvzyx") == []
    assert files(tmp_path) == after
    found = counts(tmp_path)
    assert (found["rows_in"], found["rows_ok"], found["rows_error"]) == (8, 6, 2)
    assert (found["images"], found["masks"], found["rows_error_later"]) == (6, 30, 0)


def test_a_run_that_was_stopped_is_completed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_(tmp_path, "xy")
    finish(run.first, SHARDS[0], GOOD, BAD)
    run = open_(tmp_path, "xyz")
    assert [shard.name for shard in run.first.todo] == ["b.tar"]
    assert status.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 done, 1 left of 2" in said
    assert "1 prompts were added: 0 shards done, 2 left" in said
    assert drive(tmp_path, "xyz") == [("b.tar", 0), ("a.tar", 2), ("b.tar", 2)]
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z")]


def test_prompts_that_are_left_out_are_another_run(tmp_path: Path) -> None:
    drive(tmp_path, "xy")
    drive(tmp_path, "xyz")
    for prompts in ("xy", "xz", "yzw"):
        with pytest.raises(UsageError, match=r'prompts was \["x", "y", "z"\], now'):
            open_(tmp_path, prompts)
    assert (tmp_path / "_SUCCESS").exists()
    run = open_(tmp_path, "w", restart=True)
    assert [(each.todo, each.prompts) for each in run.passes] == [(SHARDS, ["w"])]
    assert files(tmp_path) == {}


def test_the_run_is_not_complete_before_what_was_added_is(tmp_path: Path) -> None:
    drive(tmp_path, "xy")
    run = open_(tmp_path, "xyz")
    assert not (tmp_path / "_SUCCESS").exists()
    with pytest.raises(JobError, match="2 of 2 shards are not complete"):
        close_run(run, 1.0)
    finish(run.passes[1], run.passes[1].shards[0], GOOD, BAD)
    assert drive(tmp_path, "xyz") == [("b.tar", 2)]


def test_a_driver_that_knows_nothing_of_the_addition_does_not_close_the_run(
    tmp_path: Path,
) -> None:
    early = open_(tmp_path, "xy")
    for shard in early.first.todo:
        finish(early.first, shard, GOOD, BAD)
    late = open_(tmp_path, "xyz")
    with pytest.raises(JobError, match="prompts were added meanwhile"):
        close_run(early, 1.0)
    assert not (tmp_path / "_SUCCESS").exists()
    assert json.loads((tmp_path / "_run.json").read_text())["status"] == "running"
    for shard in late.passes[1].todo:
        finish(late.passes[1], shard, GOOD, BAD)
    close_run(late, 1.0)
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z")]


def test_prompts_that_are_added_while_the_run_is_being_closed(
    tmp_path: Path,
    step: list[Callable[[str], None]],
) -> None:
    drive(tmp_path, "xy")
    early = open_(tmp_path, "xy")

    def add(when: str) -> None:
        if when == "after" and not early.first.todo:  # _run.json is written, _SUCCESS is next
            step.clear()
            open_(tmp_path, "xyz")

    step[:] = [add]
    with pytest.raises(JobError, match="prompts were added meanwhile"):
        close_run(early, 1.0)
    assert not (tmp_path / "_SUCCESS").exists()


def test_a_driver_that_looked_before_the_addition_leaves_its_parts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(tmp_path, "xy")
    late = open_(tmp_path, "xyz")
    added = late.passes[1]

    def look_round(*arguments: Any) -> None:
        """Between parts and receipt comes a driver who read the prompts when there were two."""
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(account, "read_added", lambda output: {})
            open_(tmp_path, "xy")
        commit.write_receipt(*arguments)

    monkeypatch.setattr(commit, "write_receipt", look_round)
    for shard in added.todo:
        finish(added, shard, GOOD, BAD)
    close_run(late, 1.0)
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z")]


def test_an_added_pass_belongs_to_the_first_pass_that_is_there(tmp_path: Path) -> None:
    """The first pass over a shard is made anew, with another outcome, under a running job."""
    drive(tmp_path, "xy")
    run = open_(tmp_path, "xyz")
    added = run.passes[1]
    finish(added, added.shards[1], GOOD, BAD)
    kept = [path.name for path in (tmp_path / "masks").glob("a-*")]
    name = kept[0].removesuffix(".parquet")
    for first in (2, 0):
        ledger = Ledger(output=str(tmp_path), first_prompt=first)
        discard_shard(ledger, name, ["images", "masks"])
    with pytest.raises(JobError, match="being made anew"):
        finish(added, added.shards[0], GOOD, BAD)
    finish(run.first, SHARDS[0], (0, 1), (2, 3))
    finish(added, added.shards[0], (0, 1), (2, 3))
    for path in [*tmp_path.glob(f"*/{name}.parquet"), *tmp_path.glob(f"_receipts/{name}/*")]:
        path.unlink()
    finish(run.first, SHARDS[0], GOOD, BAD)
    with pytest.raises(
        JobError, match=r"1 of 2 shards are not complete \(50% of the bytes\): a\.tar"
    ):
        close_run(run, 1.0)
    assert drive(tmp_path, "xyz") == [("a.tar", 2)]
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z")]


def test_an_addition_killed_at_its_first_step_is_not_complete(tmp_path: Path) -> None:
    """Its prompts are written down; another driver may have closed the run in the same moment."""
    drive(tmp_path, "xy")
    success = (tmp_path / "_SUCCESS").read_bytes()
    open_(tmp_path, "xyz")
    (tmp_path / "_SUCCESS").write_bytes(success)
    record = read_run(str(tmp_path))
    assert record is not None
    assert not is_complete(str(tmp_path), record)
    drive(tmp_path, "xyz")
    assert is_complete(str(tmp_path), record)


def test_what_is_left_is_told_by_the_listings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for each of a million shards would take hours."""
    run = open_(tmp_path, "xy")
    finish(run.first, SHARDS[0], GOOD, BAD)
    added = open_(tmp_path, "xyz").passes[1]
    finish(added, added.shards[0], GOOD, BAD)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a request for one shard")

    monkeypatch.setattr(resume, "receipts_of", refuse)
    run = open_(tmp_path, "xyz")
    assert [each.todo for each in run.passes] == [[SHARDS[1]], [SHARDS[1]]]


def test_only_the_images_of_the_first_pass_count(tmp_path: Path) -> None:
    """Row 0 fails now, row 2 failed then; row 3 is not reached any more."""
    drive(tmp_path, "xy")
    run = open_(tmp_path, "xyz")
    added = run.passes[1]
    receipt = finish(added, added.shards[0], (1, 2), (0, None))
    assert (receipt["rows_in"], receipt["rows_ok"], receipt["rows_error"]) == (3, 1, 2)
    finish(added, added.shards[1], GOOD, BAD)
    close_run(run, 1.0)
    found = [r for p in (tmp_path / "errors").glob("a-*") for r in pq.read_table(p).to_pylist()]
    assert sorted(row["row"] for row in found) == [0, 2, 3]
    keys = [key for key in rows(tmp_path)["masks"] if key[0] == "a.tar" and key[2] == 2]
    assert keys == [("a.tar", 1, 2)]
    assert (counts(tmp_path)["rows_error"], counts(tmp_path)["rows_error_later"]) == (2, 2)
    assert counts(tmp_path)["masks"] == 6 * 2 + 1 + 3


def test_a_row_that_is_gone_without_a_reason_stops_the_job(tmp_path: Path) -> None:
    drive(tmp_path, "xy")
    added = open_(tmp_path, "xyz").passes[1]
    with pytest.raises(JobError, match="1 rows of the first pass are gone"):
        finish(added, added.shards[0], (0, 1), (2,))
    assert not list((tmp_path / "masks").glob("a-*.from-2.parquet"))


def test_a_shard_that_changed_is_made_anew_with_every_prompt(tmp_path: Path) -> None:
    drive(tmp_path, "xy")
    drive(tmp_path, "xyz")
    plan = [replace(SHARDS[0], version="v2"), SHARDS[1]]
    assert drive(tmp_path, "xyz", plan) == [("a.tar", 0), ("a.tar", 2)]
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z")]


def test_what_is_discarded_is_every_pass(tmp_path: Path) -> None:
    drive(tmp_path, "xy")
    drive(tmp_path, "xyz")
    name = next((tmp_path / "images").glob("a-*")).stem
    for first in (2, 0):
        ledger = Ledger(output=str(tmp_path), first_prompt=first)
        discard_shard(ledger, name, ["images", "masks"])
    assert not list(tmp_path.glob("*/a-*"))
    assert drive(tmp_path, "xyz") == [("a.tar", 0), ("a.tar", 2)]
    # Also where only the first pass is gone: its images may be others now.
    for path in [*tmp_path.glob(f"*/{name}.parquet"), *tmp_path.glob(f"_receipts/{name}/*")]:
        path.unlink()
    assert drive(tmp_path, "xyz") == [("a.tar", 0), ("a.tar", 2)]
    assert prompts_of(tmp_path) == [(0, "x"), (1, "y"), (2, "z")]


def test_a_shard_that_left_the_input_is_named_once(tmp_path: Path) -> None:
    drive(tmp_path, "xy")
    drive(tmp_path, "xyz")
    run = open_(tmp_path, "xyz", SHARDS[:1])
    close_run(run, 1.0)
    (note,) = run.notes
    assert "1 finished shards are no longer in the input (b.tar)" in note


def test_a_driver_killed_at_any_step_of_an_addition_is_completed_by_the_same_command(
    tmp_path: Path,
    step: list[Callable[[str], None]],
) -> None:
    for number in range(1000):
        output = tmp_path / str(number)
        drive(output, "xy")
        left = [number]

        def kill(_: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError

        step[:] = [kill]
        try:
            drive(output, "xyz")
        except KilledError:
            step.clear()
            rows(output)
            drive(output, "xyz")
        else:
            step.clear()
            break
        assert prompts_of(output) == [(0, "x"), (1, "y"), (2, "z")]
        assert (output / "_SUCCESS").exists()
    assert 25 < number < 1000


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,  # in CI; remove it and raise max_examples to look further
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    turns=st.lists(st.integers(0, 1), max_size=120),
    kills=st.sets(st.integers(0, 80), max_size=3),
    asked=st.tuples(*[st.sampled_from(["xy", "xyz", "xyw", "xyzw"])] * 2),
)
def test_two_drivers_with_other_additions(
    tmp_path_factory: pytest.TempPathFactory,
    step: list[Callable[[str], None]],
    turns: list[int],
    kills: set[int],
    asked: tuple[str, str],
) -> None:
    """One adds, the other adds the same, something else or nothing: no row twice, none lost."""
    output = tmp_path_factory.mktemp("out") / "run"
    drive(output, "xy")
    schedule = Schedule(turns, kills)
    step[:] = [schedule.wait]
    threads = [
        threading.Thread(target=schedule.run, args=(i, lambda i=i: drive(output, asked[i])))
        for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    step.clear()
    expected = (JobError, KilledError, UsageError)
    assert all(isinstance(e, expected) for e in schedule.failures), schedule.failures
    rows(output)
    known = ["x", "y"]
    for file in sorted(output.glob("_prompts/*.json")):
        known += json.loads(file.read_text())
    record = read_run(str(output))
    assert record is not None
    if is_complete(str(output), record):
        assert [prompt for _, prompt in prompts_of(output)] == known
    drive(output, known)
    assert [prompt for _, prompt in prompts_of(output)] == known
    assert (output / "_SUCCESS").exists()
