"""Memory and time of finishing one shard from its fragments, without a model.

    python -m benchmarks.finish            # 1,000 images x 1,000 prompts, and ten times as many
    python -m benchmarks.finish --images 360 --prompts 20 --maps 88

The fragments are made up, each of as many images as a block of logits has. Each size is finished in
a process of its own, whose peak of resident memory is told, before and after.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import schema, storage
from pipeline.read.shard import Shard
from pipeline.write.commit import finish_shard
from pipeline.write.fragments import pack_fragment
from pipeline.write.layout import Ledger, shard_id

SHARD = Shard(name="a.tar", uri="/in/a.tar", format="tar", size_bytes=1, version="v1")


def make_fragments(ledger: Ledger, images: int, prompts: int, side: int, at_once: int) -> list[str]:
    """The names of fragments of `at_once` images, with maps of this side if above 0."""
    folder = storage.join(ledger.staging, shard_id(SHARD.name))
    names = []
    for start in range(0, images, at_once):
        rows = range(start, min(start + at_once, images))
        fragment, data = pack_fragment(
            make_tables(rows, prompts, side), ledger.version(SHARD.version)
        )
        storage.write_bytes(storage.join(folder, fragment.name), data)
        names.append(fragment.name)
    return names


def make_tables(rows: range, prompts: int, side: int) -> dict[str, pa.Table]:
    """Rows as jobs make them: of `images`, of `masks` and of `probabilities`."""
    images = {"row": np.array(rows)}
    pairs = {
        "row": np.repeat(np.array(rows), prompts),
        "prompt_id": np.tile(np.arange(prompts), len(rows)),
    }
    count = len(rows) * prompts
    rle = pa.StructArray.from_arrays(
        [
            pa.array([[480, 640]] * count, schema.MASKS.field("rle").type.field("size").type),
            pa.array([f"{i:09}0a1b2c3d4e5f" for i in range(count)]),
        ],
        fields=list(schema.MASKS.field("rle").type),
    )
    tables = {
        "images": fill(schema.IMAGES, images, len(rows)),
        "masks": fill(schema.MASKS, {**pairs, "rle": rle}, count),
    }
    if side:
        noise = np.random.default_rng(rows.start).integers(0, 256, (count, side * side), np.uint8)
        sizes = pa.array([[side, side]] * count, schema.PROBABILITIES.field("size").type)
        maps = {**pairs, "size": sizes, "map": pa.array([m.tobytes() for m in noise])}
        tables["probabilities"] = fill(schema.PROBABILITIES, maps, count)
    return tables


def fill(columns: pa.Schema, known: dict[str, object], count: int) -> pa.Table:
    """A table of these columns; what is not known is empty, or 0."""
    arrays = []
    for field in columns:
        given = known.get(field.name)
        if given is None and field.name == "shard":
            given = [SHARD.name] * count
        elif given is None and pa.types.is_string(field.type):
            given = ["some text"] * count
        elif given is None and pa.types.is_list(field.type):
            given = [[0, 0, 10, 10]] * count
        elif given is None and pa.types.is_fixed_size_list(field.type):
            given = [[0] * field.type.list_size] * count
        elif given is None:
            given = np.zeros(count, np.int8)
        arrays.append(given if isinstance(given, pa.Array) else pa.array(given).cast(field.type))
    return pa.table(arrays, schema=columns)


def measure(images: int, prompts: int, side: int, at_once: int) -> None:
    """Make a shard, finish it, and print a row of the table."""
    with tempfile.TemporaryDirectory() as output:
        ledger = Ledger(output=output)
        maker = multiprocessing.get_context("spawn").Pool(1)
        names = maker.apply(make_fragments, (ledger, images, prompts, side, at_once))
        maker.terminate()
        tables = {
            "images": schema.Table(schema.IMAGES, 1),
            "masks": schema.Table(schema.MASKS, prompts, per_prompt=True),
        }
        if side:
            kept = schema.Table(schema.PROBABILITIES, prompts, per_prompt=True)
            tables["probabilities"] = kept
        before = peak_mib()
        started = time.monotonic()
        receipt = finish_shard(ledger, SHARD, names, (images, 0), tables)
        seconds = time.monotonic() - started
        staged = sum(part["bytes"] for part in receipt["parts"])
        assert receipt["rows_ok"] == images
        assert not Path(ledger.staging, shard_id(SHARD.name)).exists()
        print(
            f"| {images:,} x {prompts:,} | {side or '-'} | {len(names):,} | {staged / 2**20:,.0f} |"
            f" {seconds:.1f} | {before:,.0f} | {peak_mib():,.0f} |",
            flush=True,
        )


def peak_mib() -> float:
    """Peak of resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--prompts", type=int, default=1_000)
    parser.add_argument("--maps", type=int, default=0, help="side of kept maps; 0: none")
    parser.add_argument("--at-once", type=int, default=4, help="images of a fragment")
    options = parser.parse_args()
    print("| images x prompts | maps | fragments | MiB of parts | s | MiB before | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for times in (1, 10):
        job = multiprocessing.get_context("spawn").Process(
            target=measure,
            args=(times * options.images, options.prompts, options.maps, options.at_once),
        )
        job.start()
        job.join()
        assert job.exitcode == 0


if __name__ == "__main__":
    main()
