"""The whole embed job against a plain loop and against a Ray Data job, on the same tar shards.

    python -m benchmarks.embed_job [--images 2000] [--shards 8] [--repeats 3] [--model base|small]

JPEGs of 500 x 375, a random CLIP B/32 (or a small one, whose cost is next to nothing), float32 on
the CPU; embed_peers.py says what the contenders are. Each is a command in its own process, timed
from its start to its exit, once on one image a shard and once on all; images/s "running" is that of
the difference, which leaves start-up out. Memory is the peak over all its processes, sampled every
2 s (watch.py). At the end the vectors are compared; exits with 1 if any differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import transformers

from benchmarks.shards import photos, write_tars
from benchmarks.watch import Watched, run_watched
from pipeline.write.parts import read_part

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
SMALL = {"vision_config": TINY, "text_config": TINY}
NAMES = {
    "ours": "clipseg-ray embed",
    "chain": "its chain, Ray's write_parquet",
    "ray_data": "Ray Data as in Ray's example",
    "loop": "plain loop, one process",
}


def save_model(folder: Path, size: str) -> None:
    """A random CLIP of 224 x 224 pixels, with its preprocessing."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**(SMALL if size == "small" else {})))
    model.save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)


def run(peer: str, source: Path, output: Path, model: Path) -> Watched:
    """One contender, to its exit."""
    shutil.rmtree(output, ignore_errors=True)
    if peer == "ours":
        options = ["--model", str(model), "--batch-size", "16", "--quiet"]
        command = ["-m", "jobs.embed", str(source), str(output), *options]
    else:
        command = ["-m", "benchmarks.embed_peers", peer, str(source), str(output), str(model)]
    return run_watched([sys.executable, *command], period_s=2.0)


def vectors_of(output: Path) -> dict[str, np.ndarray]:
    """Key -> vector, of whatever Parquet files a contender left."""
    folder = output / "embeddings" if (output / "embeddings").is_dir() else output
    tables = [read_part(str(path), ["key", "vector"]) for path in folder.glob("*.parquet")]
    rows = [zip(t["key"].to_pylist(), _as_rows(t["vector"]), strict=True) for t in tables]
    return {key: vector for some in rows for key, vector in some}


def _as_rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [np.asarray(value, np.float32) for value in column.to_pylist()]


def report(found: dict[str, dict[int, list[Watched]]], few: int, many: int) -> None:
    """One row per contender: medians over the repeats."""
    print("                                 seconds         images/s       peak MiB")
    print(
        f"                               {few:5} {many:6}   all  running    PSS    RSS  processes"
    )
    for peer, runs in found.items():
        seconds = {n: statistics.median(w.seconds for w in runs[n]) for n in (few, many)}
        pss = statistics.median(w.peak_pss_mib for w in runs[many])
        rss = statistics.median(w.peak_rss_mib for w in runs[many])
        print(
            f"{NAMES[peer]:30} {seconds[few]:5.1f} {seconds[many]:6.1f} "
            f"{many / seconds[many]:5.1f} {(many - few) / (seconds[many] - seconds[few]):8.1f} "
            f"{pss:6.0f} {rss:6.0f} {max(w.processes for w in runs[many]):10}"
        )


def main() -> int:
    """Run all contenders in turn, print the table; the exit code says whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", choices=["base", "small"], default="base")
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=list(NAMES))
    args = parser.parse_args()
    sizes = (args.shards, args.images)
    found: dict[str, dict[int, list[Watched]]] = {p: {n: [] for n in sizes} for p in args.peers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", args.model)
        for images in sizes:
            write_tars(folder / f"in-{images}", photos(images), args.shards)
        for repeat in range(args.repeats):
            for images in sizes:
                for peer in args.peers:
                    source, output = folder / f"in-{images}", folder / peer
                    watched = run(peer, source, output, folder / "model")
                    found[peer][images].append(watched)
                    print(f"# {repeat} {peer} {images} {watched}", file=sys.stderr, flush=True)
        report(found, *sizes)
        vectors = [vectors_of(folder / peer) for peer in args.peers]
    first = vectors[0]
    assert all(other.keys() == first.keys() and len(other) == args.images for other in vectors)
    difference = max(np.abs(other[key] - first[key]).max() for other in vectors for key in first)
    print(f"largest difference of the vectors, of length 1: {difference:.1e}")
    return 0 if difference <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
