"""What starting costs: 8 images, from the command to its last line, beside an earlier commit.

    python -m benchmarks.startup [--against COMMIT] [--repeats 3]

Commands are interleaved; medians are printed. The minimal job is what Ray Data itself takes:
ray.init, from_items, one actor that imports torch, iter_rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shards import small_images, write_tars

ROOT = Path(__file__).parent.parent
IMAGES = 8
MINIMAL = """
import ray
ray.init(address="local", log_to_driver=False)
class Torch:
    def __init__(self):
        import torch
    def __call__(self, batch):
        return batch
data = ray.data.from_items([{"a": i} for i in range(8)])
pool = ray.data.ActorPoolStrategy(size=1)
print(len(list(data.map_batches(Torch, compute=pool, num_cpus=0.5, batch_size=8).iter_rows())))
"""


def seconds(tree: Path, *command: str) -> float:
    """Wall time of a command of the package in `tree`."""
    env = {**os.environ, "PYTHONPATH": str(tree)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Print a table: command, seconds now, seconds at the other commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", default="")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tars(folder / "in", small_images(IMAGES, 96), 1)
        trees = {"now": ROOT}
        if arguments.against:
            trees["then"] = folder / "then"
            add = ["git", "worktree", "add", "--detach", str(trees["then"]), arguments.against]
            subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
        try:
            measure(folder, trees, arguments.repeats)
        finally:
            if "then" in trees:
                remove = ["git", "worktree", "remove", "--force", str(trees["then"])]
                subprocess.run(remove, cwd=ROOT, check=False, capture_output=True)


def measure(folder: Path, trees: dict[str, Path], repeats: int) -> None:
    """Run all commands in all trees in turn."""
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(repeats):
        for tree, root in trees.items():
            out = folder / f"{tree}-{number}"
            job = ["-m", "jobs", "segment", str(folder / "in"), str(out)]
            job += ["--model", str(root / "pipeline/demo/model"), "--prompt", "star"]
            commands = {
                "segment, on Ray": job,
                "the same again": job,
                "status": ["-m", "jobs", "status", str(out)],
                "segment --help": ["-m", "jobs", "segment", "--help"],
                "a mistyped path": ["-m", "jobs", "segment", "no/such", "x", "--prompt", "a"],
            }
            if tree == "now":
                here = [*job[:4], f"{out}-local", *job[5:], "--local"]
                commands |= {"segment --local": here, "minimal Ray Data job": ["-c", MINIMAL]}
            for what, command in commands.items():
                found.setdefault((what, tree), []).append(seconds(root, *command))
    for what in dict.fromkeys(what for what, _ in found):
        row = [f"{statistics.median(found.get((what, tree), [0])):8.1f}" for tree in trees]
        print(f"{what:24}{''.join(row)}", flush=True)


if __name__ == "__main__":
    main()
