"""LabelMe: <split>/<name>.json beside each image, a mask a shape.

A shape of type "mask" has the two corners of its box, both inside it, and a PNG of one bit a pixel.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image

from pipeline.annotations.destination import Destination
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class, Instance

_VERSION = "6.3.1"  # of LabelMe, whose loader reads the shapes


class WriteLabelme:
    """One JSON an image."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str]):
        self._dest, self._classes, self._splits = dest, classes, splits

    def add(self, item: Item) -> None:
        """See item.Writer."""
        if item.data is not None:
            self._dest.put(f"{item.split}/{item.file}", item.data)
        content: dict[str, Any] = {
            "version": _VERSION,
            "flags": {},
            "shapes": [_shape(instance) for instance in item.image.instances],
            "imagePath": item.file,
            "imageData": None,
            "imageHeight": item.image.height,
            "imageWidth": item.image.width,
        }
        self._dest.put(f"{item.split}/{item.name}.json", json.dumps(content).encode())

    def close(self) -> list[str]:
        """See item.Writer."""
        names = "".join(f"{' '.join(c.name.split())}\n" for c in self._classes)
        self._dest.put("labels.txt", names.encode())
        folder = self._dest.folder
        return [f"labelme {folder}/{self._splits[0]} --labels {folder}/labels.txt"]


def _shape(instance: Instance) -> dict[str, Any]:
    x, y, width, height = instance.bbox
    file = io.BytesIO()
    Image.fromarray(instance.crop() > 0).save(file, "PNG")
    return {
        "label": instance.class_name,
        "points": [[float(x), float(y)], [float(x + width - 1), float(y + height - 1)]],
        "group_id": None,
        "description": "",
        "shape_type": "mask",
        "flags": {},
        "mask": base64.b64encode(file.getvalue()).decode(),
        "score": round(instance.score, 6),
    }
