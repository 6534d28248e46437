"""kill -9 of a task's worker, the actor with the model and then the driver of a real job.

Those of a cluster, with a whole node, are in soak.py.

The steps of the commit itself are in test_commit.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soak
from PIL import Image
from shards import make_tar

from jobs import segment

ROOT = Path(__file__).parent.parent
SHARDS, IMAGES = 6, 12


def arguments(source: Path, output: Path) -> list[str]:
    model = str(ROOT / "pipeline" / "demo" / "model")
    words = ["--model", model, "--prompt", "blue", "--prompt", "star", "--batch-size", "4"]
    return [str(source), str(output), *words, "--quiet"]


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    """The job in a process of its own, with a Ray of its own."""
    command = [sys.executable, "-m", "jobs.segment", *arguments(source, output)]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_until(job: subprocess.Popen[bytes], happened: Callable[[], Any]) -> Any:
    """What `happened` gives once it is something; the job must be running until then."""
    deadline = time.monotonic() + 300
    while not (found := happened()):
        assert job.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def receipts(output: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in output.glob("_receipts/*/[0-9a-f]*.json")}


@pytest.mark.usefixtures("local_ray")
def test_the_same_command_completes_what_lost_a_task_an_actor_and_its_driver(
    tmp_path: Path,
) -> None:
    source, calm, output = tmp_path / "in", tmp_path / "calm", tmp_path / "out"
    source.mkdir()
    noise = np.random.default_rng(0)
    for shard in range(SHARDS):
        members = []
        for i in range(IMAGES):
            file = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(file, "PNG")
            members.append((f"{i:03}.png", file.getvalue()[: 50 if i == 5 else None]))
        (source / f"{shard}.tar").write_bytes(make_tar(members))
    assert segment.main(arguments(source, calm)) == 0
    wanted, repeated = soak.rows_of(str(calm))
    assert sum(row[0] == "images" for row in wanted) == SHARDS * (IMAGES - 1)

    job = start(source, output)
    wait_until(job, (output / "_staging").exists)
    processes = lambda: soak.below(job.pid).items()  # noqa: E731
    for title in (soak.TASK, soak.ACTOR):
        found = wait_until(
            job, lambda t=title: [p for p, name in processes() if name.startswith(t)]
        )
        soak.kill(found[0])
    wait_until(job, lambda: receipts(output))
    soak.kill(job.pid)
    job.wait(120)
    before = receipts(output)
    seen, repeated = soak.rows_of(str(output))  # what a reader sees is whole, and part of the rows
    assert not repeated
    assert seen.items() <= wanted.items()
    assert segment.main(arguments(source, output)) == 0
    assert soak.rows_of(str(output)) == (wanted, 0)
    assert before.items() <= receipts(output).items()
    assert (output / "_SUCCESS").exists()
