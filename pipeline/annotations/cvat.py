"""CVAT for images 1.1: annotations_<split>.xml, a <mask> an instance, beside images/<split>/.

A mask is the lengths of runs inside its box, row by row, beginning with 0s.
"""

from __future__ import annotations

import json
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline.annotations.destination import Destination
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class, Instance
from pipeline.annotations.maps import color_of
from pipeline.annotations.xml_text import xml_text


class WriteCvat:
    """One XML a split, and the labels needed in the task."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str]):
        self._dest = dest
        self._labels = [
            {"name": c.name, "color": color_of(classes, i), "attributes": [_SCORE]}
            for i, c in enumerate(classes)
        ]
        self._files = {split: dest.stream(_file(split)) for split in splits}
        labels = "".join(
            f"<label><name>{xml_text(c.name)}</name><color>{color_of(classes, i)}</color>"
            "<attributes><attribute><name>score</name><mutable>False</mutable>"
            "<input_type>text</input_type><default_value></default_value><values></values>"
            "</attribute></attributes></label>"
            for i, c in enumerate(classes)
        )
        for file in self._files.values():
            file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n')
            file.write("<version>1.1</version>\n")
            file.write(f"<meta><task><labels>{labels}</labels></task></meta>\n")

    def add(self, item: Item) -> None:
        """An image is listed whether it has annotations or not."""
        image = item.image
        if item.data is not None:
            self._dest.put(f"images/{item.split}/{item.file}", item.data)
        file = self._files[item.split]
        size = f'width="{image.width}" height="{image.height}"'
        file.write(f"<image id={_quoted(item.number - 1)} name={_quoted(item.file)} {size}>\n")
        for instance in image.instances:
            file.write(_mask(instance))
        file.write("</image>\n")

    def close(self) -> list[str]:
        """See item.Writer."""
        for split, file in self._files.items():
            file.write("</annotations>\n")
            self._dest.publish(_file(split))
        self._dest.put("labels.json", json.dumps(self._labels, indent=1).encode())
        first = next(iter(self._files))
        return [
            "in CVAT: a task with labels.json (Raw) and "
            f"images/{first}, then Upload annotations > CVAT 1.1 > {_file(first)}"
        ]


_SCORE = {"name": "score", "mutable": False, "input_type": "text", "values": [""]}


def box_runs(crop: np.ndarray) -> list[int]:
    """The lengths of runs of 0 and 1 in turn of a (h, w) mask row by row, beginning with 0."""
    flat = crop.reshape(-1) > 0
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs: list[int] = np.diff(changes, prepend=0, append=len(flat)).tolist()
    return [0, *runs] if flat[0] else runs


def _mask(instance: Instance) -> str:
    x, y, width, height = instance.bbox
    rle = ", ".join(map(str, box_runs(np.ascontiguousarray(instance.crop()))))
    box = f'left="{x}" top="{y}" width="{width}" height="{height}"'
    label = _quoted(instance.class_name)
    return (
        f'<mask label={label} source="auto" occluded="0" rle="{rle}" {box} z_order="0">'
        f'<attribute name="score">{instance.score:.4f}</attribute></mask>\n'
    )


def _quoted(value: object) -> str:
    return quoteattr(xml_text(str(value), escaped=False))


def _file(split: str) -> str:
    return f"annotations_{split}.xml"
