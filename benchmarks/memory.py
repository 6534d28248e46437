"""Whether memory stays flat: the peak of a job on 2,000 and on 20,000 small images.

    python -m benchmarks.memory [--job embed|segment|classify] [--images 2000 20000]

64 x 64 JPEG in tar shards of equal size, the bundled model. All processes of the job count. Ray's
object store is given a fixed size: by default it may take 30 % of the machine's memory, and Ray
fills half of that with whatever waits for the model, in a long job more than in a short one. Exits
with 1 when the larger run's PSS differs by 25 % or more from the smaller one's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.shards import small_images, write_tars
from benchmarks.watch import Watched, run_watched
from pipeline.demo import MODEL

LIMIT_PERCENT = 25.0


def run_job(job: str, images: int, shards: int, store_mib: int) -> Watched:
    """One job as a command, on a fresh input."""
    env = {**os.environ, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(store_mib * 2**20)}
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name, "in"), Path(name, "out")
        write_tars(source, small_images(images, 64), shards)
        labels = Path(name, "labels.txt")
        labels.write_text("red\nblue\n")
        own = {"embed": [], "segment": ["--prompt", "star"], "classify": ["--labels", str(labels)]}
        options = ["--model", str(MODEL), "--batch-size", "64", "--quiet", *own[job]]
        command = [sys.executable, "-m", f"jobs.{job}", str(source), str(output), *options]
        return run_watched(command, env=env)


def main() -> int:
    """Print both peaks and their difference; the exit code says whether memory is flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=["embed", "segment", "classify"], default="embed")
    parser.add_argument("--images", type=int, nargs=2, default=[2000, 20000])
    parser.add_argument("--shard-images", type=int, default=250)
    parser.add_argument("--store-mib", type=int, default=512)
    arguments = parser.parse_args()
    print("images   seconds   processes   peak PSS (MiB)   of it private   peak sum of RSS")
    peaks = []
    for images in arguments.images:
        shards = max(1, images // arguments.shard_images)
        found = run_job(arguments.job, images, shards, arguments.store_mib)
        peaks.append(found.peak_pss_mib)
        print(
            f"{images:6} {found.seconds:9.1f} {found.processes:11} {found.peak_pss_mib:16.0f} "
            f"{found.peak_private_mib:15.0f} {found.peak_rss_mib:17.0f}",
            flush=True,
        )
    percent = 100 * (peaks[1] / peaks[0] - 1)
    flat = abs(percent) < LIMIT_PERCENT
    print(f"PSS differs by {percent:+.1f} %: {'flat' if flat else 'NOT flat'}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
