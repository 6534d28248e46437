"""Runs that kept probability maps, and ground truth for their images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco

from pipeline import schema
from tests.label_tables import CLASSES, Found, image_row

SIZE = (48, 64)
NAMES = [name for name, _ in CLASSES]


def as_coco(folder: Path, drawn: list[tuple[dict[str, Any], list[Found]]], form: str) -> str:
    annotations = []
    for i, (_, found) in enumerate(drawn, 1):
        for class_id, mask in found:
            rle = coco.encode(np.asfortranarray(mask))
            counts: Any = rle["counts"].decode()
            if form == "list":
                flat = mask.ravel("F")
                ends = np.flatnonzero(np.diff(flat)) + 1
                counts = np.diff([0, *ends, flat.size]).tolist()
                counts = [0, *counts] if flat[0] else counts
            shape = {"size": list(SIZE), "counts": counts}
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": class_id + 7}
            annotations.append(entry | {"segmentation": shape, "iscrowd": 0})
    content = {
        "images": [
            {"id": i, "file_name": f"{row['key']}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i, (row, _) in enumerate(drawn, 1)
        ],
        "categories": [{"id": i + 7, "name": name} for i, name in enumerate(NAMES)],
        "annotations": annotations,
    }
    file = folder / "coco.json"
    file.write_text(json.dumps(content))
    return str(file)


def write_run(folder: Path, maps: np.ndarray, prompts: list[str]) -> str:
    """A run of segment: maps (N, P, h, w) uint8 of images of SIZE."""
    rows = [image_row("s.tar", i, f"k{i}", SIZE) for i in range(len(maps))]
    kept = [
        {n: row[n] for n in ("shard", "row", "key")}
        | {"prompt_id": i, "prompt": p, "size": list(maps.shape[2:])}
        | {"map": maps[row["row"], i].tobytes()}
        for row in rows
        for i, p in enumerate(prompts)
    ]
    for name, some, columns in (
        ("images", rows, schema.IMAGES),
        ("probabilities", kept, schema.PROBABILITIES),
    ):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(some, schema=columns), folder / name / "s.parquet")
    asked = {"job": "segment", "keep_probabilities": "model", "prompts": prompts}
    (folder / "_run.json").write_text(json.dumps({"fingerprint": asked}))
    return str(folder)


def smooth(random: np.random.Generator, *shape: int) -> np.ndarray:
    noise = random.standard_normal((np.prod(shape[:-2], dtype=int), *shape[-2:]))
    maps = np.stack([cv2.GaussianBlur(n, (0, 0), 2) * 6 for n in noise])
    return (255 / (1 + np.exp(-maps))).round().astype(np.uint8).reshape(shape)
