"""Cost of `clipseg-ray evaluate` on many synthetic masks: seconds and peak memory, by their number.

    python -m benchmarks.evaluate_masks [--masks 1000 10000] [--of maps|labels]

Images of 480 x 640, each with two classes: as kept maps of 352 x 352 (a RUN), or as labels of about
four instances an image. The ground truth is a Parquet file. An evaluation is one process; PSS is of
that process.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco
from scipy import ndimage

from benchmarks.watch import run_watched
from pipeline import schema, storage
from pipeline.run.manifest import name_run
from pipeline.write.layout import shard_id

SIZE, GRID = (480, 640), (352, 352)
CLASSES = ("cat", "dog")
_DRAWN = 32  # different maps; drawing each anew would take longer than reading them
_SHARD_IMAGES = 100


def draw_maps() -> np.ndarray:
    """(32, h, w) uint8: smooth noise, a fifth of it above one half."""
    random = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(random.standard_normal((_DRAWN, *GRID)), (0, 20, 20))
    logits = 5 * noise / noise.std((1, 2), keepdims=True) - 4
    return np.asarray((255 / (1 + np.exp(-logits))).round().astype(np.uint8))


def rows_of(shard: str, images: int) -> list[dict[str, Any]]:
    """Rows of schema.IMAGES."""
    facts = {"height": SIZE[0], "width": SIZE[1], "format": "JPEG", "mode": "RGB"}
    facts |= {"orientation": 1, "size_bytes": 1}
    names = [f"{shard.partition('.')[0]}-{row:04}" for row in range(images)]
    return [
        {"shard": shard, "row": i, "key": name, "member": f"{name}.jpg", **facts}
        for i, name in enumerate(names)
    ]


def write_source(folder: Path, images: int, of: str) -> tuple[str, str]:
    """A finished RUN or LABELS of so many images, and its ground truth."""
    maps = draw_maps()
    masks = [_resize(each) for each in maps]
    truth = pq.ParquetWriter(folder / "truth.parquet", _TRUTH)
    for start in range(0, images, _SHARD_IMAGES):
        shard = f"{start:06}.tar"
        rows = rows_of(shard, min(_SHARD_IMAGES, images - start))
        _write(folder / "out", "images", shard, rows, schema.IMAGES)
        numbers = [(row, k, (start + row["row"] + 7 * k) % _DRAWN) for row in rows for k in (0, 1)]
        if of == "maps":
            found = [_map_row(row, k, maps[i]) for row, k, i in numbers]
            _write(folder / "out", "probabilities", shard, found, schema.PROBABILITIES)
        else:
            found = [each for row, k, i in numbers for each in _instances(row, k, masks[i])]
            found = [each | {"instance": n} for n, each in enumerate(found)]
            _write(folder / "out", "annotations", shard, found, schema.ANNOTATIONS)
        drawn = [
            {"shard": shard, "row": row["row"], "class": CLASSES[k], "rle": _rle(masks[i - 1])}
            for row, k, i in numbers
        ]
        truth.write_table(pa.Table.from_pylist(drawn, schema=_TRUTH))
    truth.close()
    asked: dict[str, Any] = {"job": "segment", "keep_probabilities": "model", "prompts": CLASSES}
    if of == "labels":
        asked = {"job": "label", "ontology": {"classes": [{"name": n} for n in CLASSES]}}
    record = {"status": "complete", "fingerprint": asked, "counts": {"rows_ok": images}}
    storage.write_bytes(f"{folder}/out/_run.json", json.dumps(record).encode())
    storage.write_bytes(f"{folder}/out/_SUCCESS", name_run(record).encode())
    return f"{folder}/out", f"{folder}/truth.parquet"


_TRUTH = pa.schema(
    [("shard", pa.string()), ("row", pa.int64()), ("class", pa.string()), ("rle", schema.RLE)]
)


def _resize(each: np.ndarray) -> np.ndarray:
    """Where a map is above one half, at the size of the image: (H, W) uint8."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(SIZE, GRID, strict=True))
    return np.asfortranarray(each[np.ix_(rows, columns)] > 127).astype(np.uint8, order="F")


def _rle(mask: np.ndarray) -> dict[str, Any]:
    found = coco.encode(np.asfortranarray(mask))
    return {"size": list(SIZE), "counts": found["counts"].decode("ascii")}


def _map_row(row: dict[str, Any], k: int, each: np.ndarray) -> dict[str, Any]:
    known = {name: row[name] for name in ("shard", "row", "key")}
    return known | {"prompt_id": k, "prompt": CLASSES[k], "size": GRID, "map": each.tobytes()}


def _instances(row: dict[str, Any], k: int, mask: np.ndarray) -> Iterator[dict[str, Any]]:
    parts, count = ndimage.label(mask)
    known = {name: row[name] for name in ("shard", "row", "key", "height", "width")}
    for part in range(1, count + 1):
        rle = _rle((parts == part).astype(np.uint8))
        yield known | {
            "class_id": k,
            "class": CLASSES[k],
            "prompt_id": k,
            "score": 0.8,
            "presence": 0.9,
            "rle": rle,
            "bbox": coco.toBbox(rle).tolist(),
            "area": int(coco.area(rle)),
            "threshold": 0.5,
        }


def _write(
    output: Path, table: str, shard: str, rows: list[dict[str, Any]], columns: pa.Schema
) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=columns), sink, row_group_size=50)
    storage.write_bytes(f"{output}/{table}/{shard_id(shard)}.parquet", sink.getvalue())


def main() -> None:
    """Print a row for each number of masks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--of", choices=["maps", "labels"], default="maps")
    arguments = parser.parse_args()
    print("masks   images   seconds   peak PSS (MiB)")
    for masks in arguments.masks:
        with tempfile.TemporaryDirectory() as name:
            source, truth = write_source(Path(name), masks // len(CLASSES), arguments.of)
            command = [sys.executable, "-m", "jobs.evaluate", source, "--ground-truth", truth]
            found = run_watched([*command, "--quiet"])
            print(f"{masks:5} {masks // 2:8} {found.seconds:9.1f} {found.peak_pss_mib:16.0f}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
