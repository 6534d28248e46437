"""Labels made for tests, as the label job leaves them, and the images they are of."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco
from shards import shards_of

from jobs import export
from pipeline import schema, storage
from pipeline.run.manifest import name_run
from pipeline.write.layout import Ledger, shard_id
from pipeline.write.receipts import write_receipt

FORMATS = ("coco", "yolo", "voc", "labelme", "labelstudio", "cvat", "png", "hf", "sam")
SMALL = (48, 64)
CLASSES = [("cat", "#e20074"), ("traffic light", None), ("Straßenbahn & <co>", "#0a64c8")]

Found = tuple[int, np.ndarray]
"""A class and its mask."""


def random_blobs(
    seed: int, size: tuple[int, int] = (240, 320), count: int = 2, classes: int = len(CLASSES)
) -> list[Found]:
    """Masks that share no pixel, each of several parts with holes."""
    random = np.random.default_rng(seed)
    fields = []
    for _ in range(count):
        noise = random.standard_normal(size).astype(np.float32)
        smooth = cv2.GaussianBlur(noise, (0, 0), size[0] / 32)
        fields.append(smooth / smooth.std())
    field = np.stack(fields)
    best = field.argmax(0)
    return [
        (int(random.integers(classes)), ((best == k) & (field[k] > 0.3)).astype(np.uint8))
        for k in range(count)
    ]


def encode(size: tuple[int, int], form: str = "JPEG", **options: Any) -> bytes:
    """An image that says where it is turned: red to the right, green downwards."""
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def image_row(shard: str, row: int, key: str, size: tuple[int, int], **facts: Any) -> dict:
    """A row of schema.IMAGES."""
    return {
        "shard": shard,
        "row": row,
        "key": key,
        "member": f"{key}.jpg",
        "height": size[0],
        "width": size[1],
        "format": "JPEG",
        "mode": "RGB",
        "orientation": 1,
        "size_bytes": 1,
        **facts,
    }


def annotation_rows(image: dict[str, Any], found: Sequence[Found]) -> list[dict[str, Any]]:
    """Rows of schema.ANNOTATIONS; scores are .5, .51, ..."""
    rows = []
    for i, (class_id, mask) in enumerate(found):
        rle = coco.encode(np.asfortranarray(mask))
        rows.append(
            {
                **{name: image[name] for name in ("shard", "row", "key", "height", "width")},
                "instance": i,
                "class_id": class_id,
                "class": CLASSES[class_id][0] if class_id < len(CLASSES) else f"c{class_id}",
                "prompt_id": class_id,
                "score": 0.5 + i / 100,
                "presence": 0.9,
                "rle": {"size": list(mask.shape), "counts": rle["counts"].decode()},
                "bbox": coco.toBbox(rle).tolist(),
                "area": int(mask.sum()),
                "threshold": 0.4,
            }
        )
    return rows


def write_part(labels: str, table: str, rows: list[dict[str, Any]], columns: pa.Schema) -> None:
    """A part under the name of the first row's shard; none without rows."""
    if rows:
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=columns), sink, row_group_size=100)
        name = shard_id(rows[0]["shard"])
        storage.write_bytes(f"{labels}/{table}/{name}.parquet", sink.getvalue())


def write_labels(
    labels: str,
    images: list[tuple[dict[str, Any], list[Found]]],
    *,
    source: str = "",
    classes: Sequence[tuple[str, str | None]] = CLASSES,
    **record: Any,
) -> str:
    """A finished run of label; `source` holds the shards that its images are in."""
    for shard in dict.fromkeys(image["shard"] for image, _ in images):
        some = [(image, found) for image, found in images if image["shard"] == shard]
        write_part(labels, "images", [image for image, _ in some], schema.IMAGES)
        rows = [row for image, found in some for row in annotation_rows(image, found)]
        write_part(labels, "annotations", rows, schema.ANNOTATIONS)
    ontology = {"classes": [{"name": name, "color": color} for name, color in classes]}
    content = {
        "status": "complete",
        "fingerprint": {"ontology": ontology},
        "config": {"input": source, "images": {"image_column": None, "max_pixels": 10**7}},
        "started_at": "2026-01-01T00:00:00",
        "counts": {"rows_ok": len(images)},
        **record,
    }
    storage.write_bytes(f"{labels}/_run.json", json.dumps(content).encode())
    storage.write_bytes(f"{labels}/_SUCCESS", name_run(content).encode())
    receipt = {"rows_ok": 1, "rows_error": 0, "shard_error": None, "parts": []}
    receipt["samples_without_image"] = 0
    for shard in shards_of(source) if source else ():
        write_receipt(Ledger(output=labels, run=name_run(content)), shard, receipt)
    return labels


def small_labels(folder: str, keys: list[str], shard: str = "a.tar", **options: Any) -> str:
    """Labels of small images with two masks each, without the images."""
    images = [
        (image_row(shard, row, key, SMALL), random_blobs(row, SMALL))
        for row, key in enumerate(keys)
    ]
    return write_labels(folder, images, **options)


def export_labels(labels: str, dest: str, form: str = "coco", *options: str) -> int:
    """The exit code of an export without images."""
    return export.main([labels, dest, "--format", form, "--images", "none", *options])


def read_json(uri: str) -> Any:
    return json.loads(storage.read_bytes(uri))
