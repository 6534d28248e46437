"""Prompts for Segment Anything: prompts/<split>-00000.parquet beside images/<split>/.

A row an instance: box, points and a low-resolution mask, as SamModel takes them, for SAM to draw
the outline of what CLIPSeg found. Needs OpenCV, the extra `export`.

Shapes: H and W of the image, h and w of its box.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.annotations.destination import Destination
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class, Instance
from pipeline.annotations.polygons import load_cv2
from pipeline.annotations.row_files import RowFiles

SIDE = 256  # of the low-resolution mask
LOGIT = 8.0  # of a cell that is inside as a whole; outside its negative
_DISTANCE_MASK = 5

PROMPTS = pa.schema(
    [
        ("file_name", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("instance", pa.int32()),
        ("class_id", pa.int32()),
        ("class", pa.string()),
        ("score", pa.float32()),
        ("box", pa.list_(pa.float32(), 4)),  # x0, y0, x1, y1 in pixels of the image
        ("points", pa.list_(pa.list_(pa.float32(), 2))),  # x, y in pixels of the image
        ("point_labels", pa.list_(pa.int32())),  # 1 inside, 0 outside
        ("mask_logits", pa.list_(pa.float32(), SIDE * SIDE)),  # row-major, of the padded square
    ]
)


class WriteSam:
    """A table a split; an image without annotations has no row, but is in _images-00000.parquet."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str]):
        """Raises UsageError if OpenCV is not installed."""
        load_cv2()
        self._dest = dest
        self._files = {split: RowFiles(dest, f"prompts/{split}", PROMPTS) for split in splits}

    def add(self, item: Item) -> None:
        """See item.Writer."""
        image = item.image
        if item.data is not None:
            self._dest.put(f"images/{item.split}/{item.file}", item.data)
        known = {name: getattr(image, name) for name in ("shard", "row", "key", "height", "width")}
        for i, instance in enumerate(image.instances):
            row = {"file_name": item.file, **known, "instance": i, **_prompts(instance)}
            self._files[item.split].add(row, 4 * SIDE * SIDE)

    def close(self) -> list[str]:
        """See item.Writer."""
        for files in self._files.values():
            files.close()
        first = next(iter(self._files))
        path = f"{self._dest.folder}/prompts/{first}-00000.parquet"
        return [f'pyarrow.parquet.ParquetFile("{path}").iter_batches(64); docs/exports.md goes on']


def _prompts(instance: Instance) -> dict[str, Any]:
    x, y, width, height = instance.bbox
    points, labels = find_points(instance.crop())
    return {
        "class_id": instance.class_id,
        "class": instance.class_name,
        "score": instance.score,
        "box": [x, y, x + width, y + height],
        "points": (points + np.array([x, y])).tolist(),
        "point_labels": labels,
        "mask_logits": low_resolution(instance.mask()).reshape(-1),
    }


def find_points(crop: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The pixel deepest inside a mask, (h, w), and the pixel of its box farthest from it, if any.

    Returns (1 or 2, 2) x and y, and labels, 1 and 0. SAM itself adds the half of a pixel.
    """
    cv2 = load_cv2()
    points, labels = [], []
    for label, inside in ((1, crop > 0), (0, crop == 0)):
        if not inside.any():
            continue
        # The box's edge counts as outside of the mask, not as inside of the rest.
        around = np.pad(inside, 1, mode="constant" if label else "edge").astype(np.uint8)
        depth = cv2.distanceTransform(around, cv2.DIST_L2, _DISTANCE_MASK)[1:-1, 1:-1]
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        points.append([column, row])
        labels.append(label)
    return np.array(points), labels


def low_resolution(mask: np.ndarray) -> np.ndarray:
    """Logits of a mask (H, W) as SAM's prompt encoder takes them: (256, 256) float32.

    The image lies at the upper left, its longer side 256 cells. A cell is LOGIT x (2c - 1), c its
    share inside the mask; what lies beside the image is outside.
    """
    cv2 = load_cv2()
    height, width = mask.shape
    scale = SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    whole = np.ascontiguousarray(mask, np.float32)
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    cells = np.zeros((SIDE, SIDE), np.float32)
    cells[: size[0], : size[1]] = cv2.resize(whole, size[::-1], interpolation=kind)
    return np.float32(LOGIT) * (2 * cells - 1)
