"""Cost of the frame: the segment job on Ray against its own stages in a plain loop.

    python -m benchmarks.frame [--images 2028] [--shards 8] [--repeats 3]

Small JPEG images and the bundled model, one prompt. The loop calls the same stages one after the
other in one process, so the difference is Ray: start-up, hops between processes, staging, receipts.
The job is timed as a command, from start to exit; the loop from after its imports.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shards import small_images, write_tars
from jobs.segment import segment
from pipeline.config.options import WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.demo import MODEL


def plain_loop(source: Path, output: Path) -> float:
    """Seconds of the same job in this process, without Ray."""
    start = time.perf_counter()
    here = WorkerOptions(local=True, quiet=True)
    segment(
        SegmentConfig(
            input=str(source), output=str(output), prompt=("star",), model=str(MODEL), workers=here
        )
    )
    return time.perf_counter() - start


def ray_job(source: Path, output: Path) -> float:
    """Seconds of the command."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "jobs.segment", str(source), str(output)]
    options = ["--model", str(MODEL), "--prompt", "star", "--batch-size", "64", "--quiet"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print the medians of both, for one image a shard (all start-up) and for all images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2028)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.shards} shards, seconds (median of {arguments.repeats})")
    print("images   plain loop   job on Ray")
    for images in (arguments.shards, arguments.images):
        loops, jobs = [], []
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_tars(folder / "in", small_images(images, 96), arguments.shards)
                loops.append(plain_loop(folder / "in", folder / "loop"))
                jobs.append(ray_job(folder / "in", folder / "job"))
        print(f"{images:6} {statistics.median(loops):12.1f} {statistics.median(jobs):12.1f}")


if __name__ == "__main__":
    main()
