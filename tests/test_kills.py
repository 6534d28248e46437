"""kill -9 of the driver, of the actor with the model and of a task's worker of a real job.

The tables must come out as those of a run that nobody disturbed, and what was finished before must
not be touched again. The steps of the commit itself are in test_commit.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shards import make_tar

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "pipeline" / "demo" / "model"
SHARDS, IMAGES = 6, 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    noise = np.random.default_rng(0)
    for shard in range(SHARDS):
        members = []
        for i in range(IMAGES):
            file = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (48, 64, 3), np.uint8)).save(file, "PNG")
            broken = i == 5
            members.append((f"{i:03}.png", file.getvalue()[: 50 if broken else None]))
        (folder / f"{shard}.tar").write_bytes(make_tar(members))
    return folder


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert start(source, output).wait(240) == 0
    return tables(output)


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.segment", str(source), str(output), "--quiet"]
    command += ["--model", str(MODEL), "--prompt", "blue", "--prompt", "star", "--batch-size", "8"]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def tables(output: Path) -> dict[str, Any]:
    """Every table, in order; scores to the fifth digit, since batches are cut anew."""
    found = {}
    for name in ("images", "masks", "errors"):
        rows = [r for p in output.glob(f"{name}/*.parquet") for r in pq.read_table(p).to_pylist()]
        for row in rows:
            row |= {k: round(v, 5) for k, v in row.items() if isinstance(v, float)}
        found[name] = sorted(rows, key=lambda r: (r["shard"], r["row"], r.get("prompt_id", 0)))
    assert len(found["images"]) == SHARDS * (IMAGES - 1) or not (output / "_SUCCESS").exists()
    return found


def receipts(output: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in output.glob("_receipts/*/[0-9a-f]*.json")}


def wait_until(job: subprocess.Popen[bytes], happened: Callable[[], Any]) -> Any:
    """What `happened` gives once it is something; the job must be running until then."""
    deadline = time.monotonic() + 120
    while not (found := happened()):
        assert job.poll() is None, "the job ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def below(pid: int) -> Iterator[tuple[int, str]]:
    """The processes that a process has started, and those that these have, with their titles."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    left = children.get(pid, [])
    while left:
        child = left.pop()
        left += children.get(child, [])
        try:
            yield child, Path(f"/proc/{child}/cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue


def kill_worker(job: subprocess.Popen[bytes], title: str) -> None:
    """kill -9 one worker of the job whose title, which Ray sets, begins like this."""
    found = wait_until(job, lambda: [p for p, name in below(job.pid) if name.startswith(title)])
    os.kill(random.choice(found), signal.SIGKILL)


def test_the_driver_is_killed_and_the_same_command_completes_the_run(
    source: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = start(source, output)
    wait_until(job, lambda: receipts(output))
    os.kill(job.pid, signal.SIGKILL)
    job.wait(30)
    before = receipts(output)
    assert before
    seen = tables(output)  # what a reader sees is whole, and part of the rows
    assert {(r["shard"], r["row"]) for r in seen["images"]} <= {
        (r["shard"], r["row"]) for r in undisturbed["images"]
    }
    assert start(source, output).wait(240) == 0
    assert tables(output) == undisturbed
    assert before.items() <= receipts(output).items()
    assert (output / "_SUCCESS").exists()


@pytest.mark.parametrize(
    "title",
    [
        "ray::MapWorker(MapBatches(SegmentImages))",
        pytest.param("ray::MapBatches(", marks=pytest.mark.soak),
    ],
)
def test_a_worker_is_killed_and_the_job_goes_on(
    source: Path, undisturbed: dict[str, Any], tmp_path: Path, title: str
) -> None:
    output = tmp_path / "out"
    job = start(source, output)
    wait_until(job, (output / "_staging").exists)
    kill_worker(job, title)
    assert job.wait(240) == 0
    assert tables(output) == undisturbed
    counts = json.loads((output / "_run.json").read_text())["counts"]
    assert counts["rows_in"] == SHARDS * IMAGES
    assert counts["rows_error"] == SHARDS
