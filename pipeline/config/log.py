"""Lines on stderr: text for a person, or one JSON object a line for what collects logs.

The form belongs to the process, as its command line says: every line passes through here.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

_state = {"json": False, "quiet": False}


how_far: list[Callable[[str], None]] = []
"""Functions to be told how far the phase is that lasts; the last one is told."""


def set_log(*, as_json: bool = False, quiet: bool = False) -> None:
    """Choose the form of the lines of this process; `quiet` hides those of no consequence."""
    _state.update(json=as_json, quiet=quiet)


def is_quiet() -> bool:
    """Whether phases and progress are hidden."""
    return _state["quiet"]


def is_json() -> bool:
    """Whether lines are JSON objects: then nothing is redrawn either."""
    return _state["json"]


def say(event: str, message: str, **facts: Any) -> None:
    """Write a line to stderr.

    As JSON: time (ISO 8601, UTC), event, message, and `facts`. Events are progress, phase, note and
    error.
    """
    line = message
    if _state["json"]:
        time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"time": time, "event": event, "message": message, **facts})
    sys.stderr.write(f"{line}\n")  # in one piece: threads write here, too
    sys.stderr.flush()


def mute_native_stderr() -> None:
    """Keep harmless lines of Ray's C++, written past Python, off the terminal.

    sys.stderr stays. Does nothing if that is not the process's own, as in tests, or while a phase
    is drawn on a terminal: call it before.
    """
    stderr: TextIO | None = sys.stderr
    if stderr is not sys.__stderr__ or stderr is None or stderr.fileno() != 2:
        return
    stderr.flush()
    sys.stderr = io.TextIOWrapper(
        os.fdopen(os.dup(2), "wb"), "utf-8", "backslashreplace", line_buffering=True
    )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
