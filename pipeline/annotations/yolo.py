"""YOLO segmentation: labels/<split>/<name>.txt beside images/<split>/, and data.yaml.

A line is an instance, or a part of one: class, then x and y of each vertex, 0 to 1. The format has
no place for holes, scores, or instances of several parts.
"""

from __future__ import annotations

import numpy as np
import yaml

from pipeline.annotations.destination import Destination
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class
from pipeline.annotations.polygons import load_cv2, trace_polygons

# Ultralytics truncates a vertex to a pixel, supervision rounds it: both find this pixel.
_INSIDE_PX = 0.499


class WriteYolo:
    """One text file an image; an image without annotations has an empty one."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str]):
        """Raises UsageError if OpenCV is not installed."""
        load_cv2()
        self._dest, self._classes, self._splits = dest, classes, splits
        self._instances = self._lines = self._left_out = self._lost = 0

    def add(self, item: Item) -> None:
        """See item.Writer."""
        image = item.image
        if item.data is not None:
            self._dest.put(f"images/{item.split}/{item.file}", item.data)
        lines = []
        for instance in image.instances:
            polygons, left_out = trace_polygons(instance.crop())
            self._left_out += left_out
            self._lost += not polygons
            for polygon in polygons:
                points = polygon + instance.bbox[:2] + _INSIDE_PX
                lines.append(yolo_line(instance.class_id, points / [image.width, image.height]))
        self._instances += len(image.instances)
        self._lines += len(lines)
        text = "".join(f"{line}\n" for line in lines)
        self._dest.put(f"labels/{item.split}/{item.name}.txt", text.encode())

    def close(self) -> list[str]:
        """See item.Writer."""
        # Ultralytics refuses a data set without `val`.
        val = next((s for s in ("val", "valid", "test") if s in self._splits), self._splits[0])
        train = next((s for s in self._splits if s == "train"), self._splits[0])
        content = {
            "train": f"images/{train}",
            "val": f"images/{val}",
            **{s: f"images/{s}" for s in self._splits if s not in ("train", "val")},
            "names": {i: c.name for i, c in enumerate(self._classes)},
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        self._dest.put("data.yaml", text.encode())
        lines = [f"{self._instances:,} annotations became {self._lines:,} polygons, one a part"]
        if self._left_out:
            lines.append(
                f"{self._left_out:,} parts of under 3 points were left out, and with them "
                f"{self._lost:,} annotations as a whole"
            )
        if val == train:
            lines.append("data.yaml names one split as train and val: no other was asked for")
        return [*lines, f"yolo segment train data={self._dest.folder}/data.yaml"]


def yolo_line(class_id: int, points: np.ndarray) -> str:
    """The class and (N, 2) vertices, 0..1, to a hundred-millionth."""
    values = points.reshape(-1).tolist()
    return str(class_id) + " %.8f" * len(values) % tuple(values)
