"""PASCAL VOC segmentation: maps of classes and of objects as palette PNGs, and lists of names.

    JPEGImages/<name>.jpg  SegmentationClass/<name>.png  SegmentationObject/<name>.png
    ImageSets/Segmentation/<split>.txt  labelmap.txt

A map has one number a pixel: a pixel of two classes (or two objects) is 255, void.
"""

from __future__ import annotations

import numpy as np

from pipeline.annotations.destination import Destination
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class
from pipeline.annotations.maps import VOID, encode_png, label_map, voc_palette
from pipeline.errors import UsageError


class WriteVoc:
    """Two maps an image."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str]):
        """Raises UsageError for more classes than a map has numbers."""
        if len(classes) >= VOID:
            raise UsageError(f"--format voc: at most {VOID - 1} classes, not {len(classes):,}")
        self._dest, self._palette, self._classes = dest, voc_palette(), classes
        self._lists = {s: dest.stream(_list(s)) for s in splits}
        self._contested = self._left_out = 0

    def add(self, item: Item) -> None:
        """See item.Writer."""
        image = item.image
        size, instances = (image.height, image.width), image.instances
        if item.data is not None:
            self._dest.put(f"JPEGImages/{item.file}", item.data)
        numbers = [instance.class_id + 1 for instance in instances]
        classes = label_map(size, instances, numbers, np.uint8)
        known = instances[: VOID - 1]
        objects = label_map(size, known, range(1, len(known) + 1), np.uint8)
        for folder, found in (("Class", classes), ("Object", objects)):
            png = encode_png(found.pixels, self._palette)
            self._dest.put(f"Segmentation{folder}/{item.name}.png", png)
        self._lists[item.split].write(f"{item.name}\n")
        self._contested += classes.contested
        self._left_out += len(instances) - len(known)

    def close(self) -> list[str]:
        """See item.Writer."""
        for split in self._lists:
            self._dest.publish(_list(split))
        names = ["background", *(c.name for c in self._classes)]
        rows = [
            "{}:{},{},{}::".format(_plain(n), *self._palette[3 * i : 3 * i + 3])
            for i, n in enumerate(names)
        ]
        text = "# label:color_rgb:parts:actions\n" + "".join(f"{row}\n" for row in rows)
        self._dest.put("labelmap.txt", text.encode())
        lines = []
        if self._contested:
            lines.append(f"{self._contested:,} pixels that two classes claim are void ({VOID})")
        if self._left_out:
            lines.append(
                f"{self._left_out:,} annotations beyond {VOID - 1} in an image are not in "
                "SegmentationObject"
            )
        return [*lines, f'PIL.Image.open("{self._dest.folder}/SegmentationClass/NAME.png")']


def _list(split: str) -> str:
    return f"ImageSets/Segmentation/{split}.txt"


def _plain(name: str) -> str:
    """The name without what separates the fields and lines of a label map."""
    return "".join("_" if c in ":#,\n\r" else c for c in name)
