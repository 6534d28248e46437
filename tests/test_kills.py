"""kill -9 of workers and of the driver of a real job: the short version of `make soak`.

The steps of the commit itself are in test_commit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import soak

ROOT = Path(__file__).parent.parent


def test_an_actor_and_then_the_driver_are_killed_and_the_same_command_completes_the_run() -> None:
    """A process of its own, since its cluster, server and environment are."""
    kind = "kill -9: actor, then driver"
    command = [sys.executable, "tests/soak.py", "--tries", "1", "--seed", "0", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if kind in line)
    tries, again, lost, repeated, redone = map(int, row.split("|")[2:-1])
    assert (tries, again, lost, repeated) == (1, 1, 0, 0)
    assert redone <= soak.SHARDS - 1  # at least one was finished when the driver died
