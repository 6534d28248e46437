"""Lines on the terminal while a job runs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import segment
from pipeline.config import log
from pipeline.read.shard import Shard
from pipeline.run import progress
from pipeline.run.progress import Amount, ProgressDisplay, phase, tell
from tests.outputs import SHARD
from tests.shards import hugging_face_column, make_parquet, make_tar, shards_of

DEMO = Path(__file__).parent.parent / "pipeline" / "demo"


@pytest.fixture(autouse=True)
def text_again() -> Iterator[None]:
    """The form of lines as it is without options, afterwards."""
    yield
    log.set_log()


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def amount_of(*shards: tuple[int, int], before: int = 0) -> Amount:
    """Of shards of (rows, bytes), whose keys are their places."""
    todo: dict[Hashable, Shard] = {
        i: replace(SHARD, rows=rows, size_bytes=size) for i, (rows, size) in enumerate(shards)
    }
    return Amount(todo, before)


def test_images_that_a_listing_tells_are_known_exactly(tmp_path: Path) -> None:
    """Loose images by their number, Parquet by its footer; a tar does not tell."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    column = hugging_face_column([{"bytes": b"\xff\xd8\xff", "path": None}] * 5)
    (tmp_path / "x.parquet").write_bytes(make_parquet({"image": column}))
    (tmp_path / "y.tar").write_bytes(make_tar([("0.png", b"\x89PNG\r\n\x1a\n")]))
    assert {s.format: s.rows for s in shards_of(str(tmp_path))} == {
        "images": 3,
        "parquet": 5,
        "tar": -1,
    }


def test_the_total_of_known_shards_is_exact_from_the_start() -> None:
    amount = amount_of((30, 900), (12, 400), before=58)
    assert (amount.is_exact, amount.done, amount.total) == (True, 58, 100)
    amount.close(0, 28)  # damage ended it early
    assert amount.total == 98


def test_a_tar_is_estimated_while_it_is_in_work() -> None:
    """By the encoded bytes of the images that came out, then by the shards that are whole."""
    amount = amount_of((-1, 1000), (-1, 3000), (10, 1))
    assert (amount.is_exact, amount.total) == (False, None)
    amount.add(4, 400)
    assert (amount.done, amount.total) == (4, 50)
    amount.add(4, 400)
    amount.close(0, 8)
    assert (amount.is_exact, amount.total) == (False, 10 + 8 + 24)
    amount.close(1, 25)
    amount.close(1, 25)  # told twice
    assert (amount.is_exact, amount.total) == (True, 43)


def test_a_total_is_never_below_what_is_done() -> None:
    amount = amount_of((-1, 100))
    amount.add(50, 1000)
    assert amount.total == 50


def test_off_a_terminal_there_is_one_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = ProgressDisplay(amount_of((1000, 4), before=200), (1, 4), quiet=False, clock=clock)
    assert display.line() == "reading, waiting for the first batch: 0 s"
    for second in range(11, 71):
        clock.now = second
        display.rows(9, 1, 0)
    display.shard()
    assert capsys.readouterr().err.splitlines() == [
        "400 of 1,200 images (33%), 10.0 images/s, 0:01:20 left, 20 errors, 1 of 4 shards",
        "700 of 1,200 images (58%), 10.0 images/s, 0:00:50 left, 50 errors, 1 of 4 shards",
    ]


def test_the_rate_is_that_of_the_last_minute() -> None:
    clock = Clock()
    display = ProgressDisplay(amount_of((9000, 4)), (0, 1), quiet=True, clock=clock)
    for second in range(0, 301):
        clock.now = second
        display.rows(1 if second < 200 else 20, 0, 0)
    assert display.rate == 20


def test_rows_that_were_resumed_are_done_and_no_part_of_the_rate() -> None:
    clock = Clock()
    display = ProgressDisplay(amount_of((100, 4)), (0, 1), quiet=True, clock=clock)
    display.amount.add(90, 0)
    display.rows(1, 0, 0)
    clock.now = 2
    display.rows(2, 0, 0)
    assert (display.amount.done, display.rate) == (93, 1.0)


def test_as_json_every_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_log(as_json=True)
    display = ProgressDisplay(amount_of((100, 4)), (0, 2), quiet=False, clock=Clock())
    display.rows(40, 2, 0)
    display.tell()
    tell(["a note"])
    progress_line, note = map(json.loads, capsys.readouterr().err.splitlines())
    wanted = {"images": 42, "images_total": 100, "total_is_exact": True, "errors": 2, "shards": 0}
    assert progress_line.items() >= wanted.items()
    assert (note["event"], note["message"]) == ("note", "a note")


def test_a_job_writes_nothing_but_json_with_log_format_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHORT_PHASE_S", 0.0)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.01)
    argv = [str(DEMO / "shards"), str(tmp_path / "out"), "--model", str(DEMO / "model")]
    argv += ["--prompt", "blue", "--local", "--log-format", "json"]
    assert segment.main(argv) == 0
    argv[argv.index("blue")] = "red"
    assert segment.main([*argv, "--threshold", "0.9"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    phases = {line["phase"] for line in lines if line["event"] == "phase"}
    assert {"listing the input", "loading the model"} <= phases
    last = [line for line in lines if line["event"] == "progress"][-1]
    assert last["images"] == last["images_total"] and last["total_is_exact"]
    assert lines[-1]["event"] == "error"


def test_the_bar_moves_while_a_shard_is_in_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of several batches: every one of them is seen before the shard is whole."""
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.01)
    shard = sorted((DEMO / "shards").iterdir())[0]
    argv = [str(shard), str(tmp_path / "out"), "--model", str(DEMO / "model"), "--prompt", "blue"]
    assert segment.main([*argv, "--local", "--log-format", "json", "--batch-size", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    seen = [line for line in lines if line["event"] == "progress" and not line["shards"]]
    assert len({line["images"] for line in seen}) > 2
    assert all(line["images_total"] for line in seen if line["images"])


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_log(quiet=True)
    clock = Clock()
    with ProgressDisplay(amount_of((10, 4)), (0, 1), quiet=True, clock=clock) as display:
        clock.now = 99
        display.rows(10, 0, 0)
        display.shard()
    with phase("loading"):
        pass
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_phase_is_told_while_it_lasts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHORT_PHASE_S", 0.0)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.01)
    begun, counted = threading.Event(), threading.Event()

    def say(event: str, message: str, **facts: object) -> None:
        (counted if "5 of 9" in message else begun).set()
        plain(event, message, **facts)

    plain = log.say
    monkeypatch.setattr(log, "say", say)
    with phase("loading the model") as show:
        assert begun.wait(60)
        show("5 of 9 texts encoded")
        assert counted.wait(60)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading the model ..."
    assert "loading the model: 5 of 9 texts encoded" in lines
    assert lines[-1].startswith("loading the model: 0.") and lines[-1].endswith(" s")


def test_on_a_terminal_the_line_is_redrawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "140")
    with ProgressDisplay(amount_of((-1, 4000)), (0, 2), quiet=False) as display:
        display.bar.refresh()
        display.rows(1229, 5, 2000)
        display.shard()
        display.bar.refresh()
    said = capsys.readouterr().err
    assert "waiting for the first batch" in said
    assert "1,234 of about 2,468 images (50%)" in said
    assert "5 errors, 1 of 2 shards" in said


def test_a_phase_on_a_terminal_shows_its_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with phase("loading the model") as show:
        show("1 of 9 texts encoded")
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "loading the model: 1 of 9 texts encoded 0:00:00" in said
