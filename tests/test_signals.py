"""Jobs that are told to end, from their first imports on: one line, the exit code, nobody left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENDED = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def start(code: str) -> subprocess.Popen[str]:
    """A process in a group of its own that says "ready" when it may be told to end."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def told(job: subprocess.Popen[str], number: signal.Signals, *, group: bool) -> list[str]:
    """The lines of a job that is told to end, by a terminal or by its id."""
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    (os.killpg if group else os.kill)(job.pid, number)
    _, said = job.communicate(timeout=60)
    wait_until(lambda: not group_is_there(job.pid))
    return said.splitlines()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


IMPORTING = """
import sys
sys.argv[0] = "clipseg-ray"
import jobs
print("ready", flush=True)
import time
time.sleep(60)
"""

RUNNING = """
import os, signal, sys, time
sys.argv = ["clipseg-ray", "in", "out", "--prompt", "x", "--model", "m", "--local"]
from pipeline.config.command import ISOLATE, run_command
from pipeline.config.segment import SegmentConfig
def job(config):
    if {crashes} and ISOLATE not in os.environ:
        os.kill(os.getpid(), signal.SIGSEGV)
    print("ready", flush=True)
    try:
        time.sleep(60)
    finally:
        if {again}:
            os.kill(os.getpid(), signal.SIGINT)
os._exit(run_command(SegmentConfig, job, "clipseg-ray segment", None, resumes=True))
"""


@pytest.mark.parametrize("number", ENDED)
def test_a_command_that_is_still_importing_ends_in_one_line(number: signal.Signals) -> None:
    job = start(IMPORTING)
    said = told(job, number, group=number == signal.SIGINT)
    assert job.returncode == ENDED[number][0]
    assert said == [f"clipseg-ray: error: {ENDED[number][1]}"]


@pytest.mark.parametrize("number", ENDED)
@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_local_job_ends_with_its_child(
    number: signal.Signals, crashes: bool, again: bool
) -> None:
    """Also the child that took over from one that crashed, and when told twice."""
    job = start(RUNNING.format(crashes=crashes, again=again))
    *before, said = told(job, number, group=number == signal.SIGINT)
    code, name = ENDED[number]
    assert job.returncode == code
    assert said == f"clipseg-ray segment: error: {name}; the same command again completes the run"
    crash = ["clipseg-ray segment: ended by SIGSEGV; going on with each image apart"]
    assert before == (crash if crashes else [])
