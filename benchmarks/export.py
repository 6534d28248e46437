"""Peak memory and time of every export, of few and of many annotations.

    python -m benchmarks.export --annotations 1000 100000

Each export runs in a process of its own, without images. Masks are 240 x 320 px, ten to an image,
each of some parts and holes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco

from pipeline import schema
from pipeline.run.manifest import name_run

SIZE = (240, 320)
PER_IMAGE = 10
PER_PART = 1000  # images
FORMATS = ("coco", "yolo", "voc", "labelme", "labelstudio", "cvat", "png", "hf", "sam")


def random_masks(count: int) -> list[dict[str, Any]]:
    """Columns of schema.ANNOTATIONS of so many random masks."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(random.random((6, 8), dtype=np.float32))
        smooth = np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC))
        mask = (smooth > 0.6).astype(np.uint8)
        rle = coco.encode(np.asfortranarray(mask))
        columns = {"size": list(SIZE), "counts": rle["counts"].decode()}
        box = coco.toBbox(rle).tolist()
        found.append({"rle": columns, "bbox": box, "area": int(mask.sum())})
    return found


def write_labels(folder: Path, annotations: int) -> None:
    """A finished run of label with so many annotations."""
    masks = random_masks(50)
    images = annotations // PER_IMAGE
    for table in ("images", "annotations"):
        (folder / table).mkdir(parents=True)
    for start in range(0, images, PER_PART):
        shard = f"{start:08d}.tar"
        ids = [
            {"shard": shard, "row": row, "key": f"{row:06d}", "height": SIZE[0], "width": SIZE[1]}
            for row in range(min(PER_PART, images - start))
        ]
        more = {"member": "", "format": "JPEG", "mode": "RGB", "orientation": 1, "size_bytes": 1}
        rows = [
            {**image, **masks[(image["row"] + i) % len(masks)], **_facts(i)}
            for image in ids
            for i in range(PER_IMAGE)
        ]
        _write(folder / "images" / f"{shard}.parquet", [i | more for i in ids], schema.IMAGES)
        _write(folder / "annotations" / f"{shard}.parquet", rows, schema.ANNOTATIONS)
    classes = [{"name": "one", "color": None}, {"name": "two", "color": None}]
    record = {"fingerprint": {"ontology": {"classes": classes}}, "config": {"input": ""}}
    (folder / "_run.json").write_text(json.dumps(record))
    (folder / "_SUCCESS").write_text(name_run(record))


def _facts(i: int) -> dict[str, Any]:
    known = {"instance": i, "class_id": i % 2, "class": ("one", "two")[i % 2], "prompt_id": i % 2}
    return {**known, "score": 0.6, "presence": 0.9, "threshold": 0.4}


def _write(path: Path, rows: list[dict[str, Any]], columns: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=columns), path, compression="zstd")


def _export(labels: str, dest: str, form: str, answer: Any) -> None:
    from jobs import export

    options = ["--format", form, "--images", "none", "--quiet"]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if export.main([labels, dest, *options]) != 0:
        raise SystemExit(1)
    # Of this process since it began: getrusage would count its parent's.
    status = Path("/proc/self/status").read_text()
    answer.put(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def measure(labels: Path, dest: Path, form: str) -> tuple[float, float, float]:
    """MB of memory at the peak, seconds, and MB that were written."""
    context = multiprocessing.get_context("spawn")
    answer: Any = context.SimpleQueue()
    started = time.perf_counter()
    child = context.Process(target=_export, args=(str(labels), str(dest), form, answer))
    child.start()
    child.join()
    seconds = time.perf_counter() - started
    if child.exitcode != 0:
        raise SystemExit(f"{form} failed")
    size = sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    shutil.rmtree(dest)
    return answer.get(), seconds, size / 2**20


def main() -> None:
    """Print a row for each format and number of annotations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for count in asked.annotations:
            write_labels(Path(folder, str(count)), count)
        print("| format | annotations | peak MB | seconds | written MB |")
        print("| --- | --- | --- | --- | --- |")
        for form in asked.formats:
            for count in asked.annotations:
                peak, seconds, size = measure(Path(folder, str(count)), Path(folder, "out"), form)
                row = f"| {form} | {count:,} | {peak:,.0f} | {seconds:,.1f} | {size:,.0f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
