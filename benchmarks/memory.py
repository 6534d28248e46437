"""Whether memory stays flat: the peak of a job on 2,000 and on 20,000 small images.

    python -m benchmarks.memory [--job embed|segment|classify] [--images 2000 20000]
    python -m benchmarks.memory --job segment --images 1000 1000 --shard-images 100 1000
    python -m benchmarks.memory --job segment --images 1000 1000 --prompts 2 20

64 x 64 JPEG in tar shards of equal size, the bundled model. All processes of the job count. Ray's
object store is given a fixed size: by default it may take 30 % of the machine's memory, and Ray
fills half of that with whatever waits for the model, in a long job more than in a short one. Exits
with 1 when the larger run's PSS differs by 25 % or more from the smaller one's, or when Ray spilled
an object to the disk.
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


def run_job(
    job: str, images: int, shards: int, prompts: int, store_mib: int
) -> tuple[Watched, int]:
    """One job as a command, on a fresh input, and how often Ray spilled objects."""
    env = {**os.environ, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(store_mib * 2**20)}
    with tempfile.TemporaryDirectory(prefix="m") as name:  # short: Ray's sockets lie in it
        env["RAY_TMPDIR"] = name
        source, output = Path(name, "in"), Path(name, "out")
        write_tars(source, small_images(images, 64), shards)
        labels = Path(name, "labels.txt")
        labels.write_text("red\nblue\n")
        texts = [part for i in range(prompts) for part in ("--prompt", f"star {i}")]
        own = {"embed": [], "segment": texts, "classify": ["--labels", str(labels)]}
        options = ["--model", str(MODEL), "--batch-size", "64", "--quiet", *own[job]]
        command = [sys.executable, "-m", f"jobs.{job}", str(source), str(output), *options]
        watched = run_watched(command, env=env)
        logs = Path(name).glob("ray/session_2*/logs/raylet*")
        return watched, sum(log.read_text(errors="replace").count("Spilled ") for log in logs)


def main() -> int:
    """Print both peaks and their difference; the exit code says whether memory is flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=["embed", "segment", "classify"], default="embed")
    parser.add_argument("--images", type=int, nargs=2, default=[2000, 20000])
    parser.add_argument("--shard-images", type=int, nargs="+", default=[250])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1])
    parser.add_argument("--store-mib", type=int, default=512)
    arguments = parser.parse_args()
    print("| images | of a shard | prompts | s | processes | PSS | of it private | RSS | spilled |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    peaks, spills = [], 0
    for number, images in enumerate(arguments.images):
        of_shard, prompts = (
            some[min(number, len(some) - 1)] for some in (arguments.shard_images, arguments.prompts)
        )
        shards = max(1, images // of_shard)
        found, spilled = run_job(arguments.job, images, shards, prompts, arguments.store_mib)
        peaks.append(found.peak_pss_mib)
        spills += spilled
        print(
            f"| {images:,} | {of_shard:,} | {prompts} | {found.seconds:.1f} | {found.processes} | "
            f"{found.peak_pss_mib:,.0f} | {found.peak_private_mib:,.0f} | "
            f"{found.peak_rss_mib:,.0f} | {spilled} |",
            flush=True,
        )
    percent = 100 * (peaks[1] / peaks[0] - 1)
    flat = abs(percent) < LIMIT_PERCENT and not spills
    print(f"PSS differs by {percent:+.1f} %: {'flat' if flat else 'NOT flat'}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
