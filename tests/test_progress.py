"""What the terminal shows while a job runs."""

from __future__ import annotations

import pytest

from pipeline.run import progress
from pipeline.run.progress import ProgressDisplay


def test_off_a_terminal_there_is_one_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with ProgressDisplay(1000, 4, quiet=False) as display:
        for second in range(1, 61):
            clock[0] = second
            display.rows(10, 1)
            if second == 30:
                display.shard(250)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "300 images, 11.0 images/s, 30 errors, 0 of 4 shards",
        "600 images, 11.0 images/s, 60 errors, 1 of 4 shards, 0:03:00 left",
    ]


def test_quiet_shows_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    with ProgressDisplay(1000, 1, quiet=True) as display:
        display.rows(10, 0)
        display.shard(1000)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_on_a_terminal_the_line_is_redrawn(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    with ProgressDisplay(1000, 2, quiet=False) as display:
        display.rows(1234, 5)
        display.shard(500)
        display.bar.refresh()
    said = capsys.readouterr().err
    assert "1,234 images" in said
    assert "5 errors, 1 of 2 shards" in said
