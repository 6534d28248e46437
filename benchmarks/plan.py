"""`clipseg-ray plan` against the runs that it foretells, on copies of the bundled shards.

    python -m benchmarks.plan [--copies 30] [--rounds 3] [--jobs segment embed] [--engines Ray]

Each round runs the plan, the job on Ray, and the same with --local, on one copy (all start-up) and
on many; the differences leave start-up out. The rate foretold is that of a machine that does
nothing else, so it is held against the CPU time of the job, summed over all its processes (from
/proc, every half second), and printed beside its images/s by the clock, which a busy machine slows.
Exits with 1 if a median is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.watch import descendants
from pipeline.demo import MODEL, SHARDS
from pipeline.run.plan import RAY_BLOCK_S, RAY_SHARD_S

IMAGES, SHARDS_OF_A_COPY = 72, 2
ENGINES: dict[str, list[str]] = {"Ray": [], "local": ["--local"]}
JOBS = {
    "segment": ["--prompt", "star", "--prompt", "blue"],
    "embed": [],
}


def copy_shards(folder: Path, copies: int) -> Path:
    """So many copies of the bundled shards."""
    folder.mkdir()
    for copy in range(copies):
        for shard in SHARDS.glob("scenes-*"):
            shutil.copy(shard, folder / f"{copy:03}-{shard.name}")
    return folder


def watch(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command and all below it."""
    start, used = time.perf_counter(), dict[int, float]()
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        for pid in descendants(process.pid):
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
                ticks = sum(map(int, stat.split()[11:13]))
                used[pid] = ticks / os.sysconf("SC_CLK_TCK")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, sum(used.values())


def foretold(job: str, source: Path, options: list[str]) -> tuple[float, float, float]:
    """Images/s of the plan, its ms of one CPU an image, and the seconds that it took."""
    start = time.perf_counter()
    command = ["jobs.plan", job, str(source), "nowhere", *options]
    said = subprocess.run(
        [sys.executable, "-m", *command], check=True, capture_output=True, text=True
    ).stdout
    (rate,) = re.findall(r": ([\d,.]+) images/s; the limit", said)
    (stages,) = re.findall(r"in ms of one CPU: (.*)", said)
    ms = sum(map(float, re.findall(r" ([\d.e+-]+)(?=[,;]|$)", stages)))
    if "--local" not in options:
        ms += 1000 * (RAY_BLOCK_S + RAY_SHARD_S) * SHARDS_OF_A_COPY / IMAGES
    return float(rate.replace(",", "")), ms, time.perf_counter() - start


def main() -> int:
    """Print a line for each job and engine, and how far off the plan is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    arguments = parser.parse_args()
    far = 0
    print("                    images/s        ms of CPU an image    measured  plan took")
    print("job      engine  foretold  by clock  foretold  measured  / foretold        s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = copy_shards(folder / "few", 1)
        many = copy_shards(folder / "many", arguments.copies)
        more = IMAGES * (arguments.copies - 1)
        for job in arguments.jobs:
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in arguments.engines}
            for _ in range(arguments.rounds):
                for engine in arguments.engines:
                    options = [*JOBS[job], "--model", str(MODEL), *ENGINES[engine]]
                    plan = foretold(job, many, options)
                    spent = []
                    for source in (few, many):
                        shutil.rmtree(folder / "output", ignore_errors=True)
                        command = [f"jobs.{job}", str(source), str(folder / "output"), "--quiet"]
                        spent.append(watch([*command, *options]))
                    wall, cpu = (b - a for a, b in zip(*spent, strict=True))
                    found[engine].append((*plan, more / wall, 1000 * cpu / more))
                    print(
                        f"# {job} {engine} {found[engine][-1]} {os.getloadavg()}", file=sys.stderr
                    )
            for engine, rows in found.items():
                rate, ms, took, clock, measured = map(statistics.median, zip(*rows, strict=True))
                ratio = measured / ms
                far += not 0.75 <= ratio <= 1.25
                print(
                    f"{job:8} {engine:6} {rate:9.1f} {clock:9.1f} {ms:9.2f} {measured:9.2f} "
                    f"{ratio:11.2f} {took:8.1f}",
                    flush=True,
                )
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
