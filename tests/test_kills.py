"""kill -9 of an actor, of the driver and of a whole Ray node of real jobs: `make soak` in short.

The steps of the commit itself are in test_commit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import soak

ROOT = Path(__file__).parent.parent
KINDS = ["kill -9: actor, then driver", "kill -9: all of a Ray node"]


def test_jobs_that_are_killed_leave_the_tables_of_one_that_was_not() -> None:
    """A process of its own, since its cluster, server and environment are."""
    command = [sys.executable, "tests/soak.py", "--tries", "1", "--seed", "0", *KINDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        row = next(line for line in done.stdout.splitlines() if f"| {kind} |" in line)
        tries, again, lost, repeated, redone = map(int, row.split("|")[2:-1])
        assert (tries, lost, repeated) == (1, 0, 0)
        assert again == (kind == KINDS[0]), "the driver's death alone needs the command again"
        assert redone <= soak.SHARDS - again  # what was finished when the driver died is not
