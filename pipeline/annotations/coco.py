"""COCO instances: annotations/instances_<split>.json beside images/<split>/.

    {"categories": [...], "images": [...], "annotations": [...]}

Every mask is an RLE, to keep holes and parts; ids begin at 1, as COCOeval leaves annotation 0
without a match; iscrowd is 0, as trainers drop the rest.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.annotations.destination import Destination, JsonEntries
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class, Instance


class WriteCoco:
    """One JSON a split; its two lists are written side by side and put together at the end."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str], counts: str):
        """`counts`: "str" as pycocotools writes it, "list" as frPyObjects reads it."""
        self._dest, self._counts = dest, counts
        categories = [
            {"id": i, "name": c.name, "supercategory": ""} for i, c in enumerate(classes, 1)
        ]
        listed = f'"categories": {json.dumps(categories)}'
        self._images = {split: JsonEntries(dest.stream(_file(split))) for split in splits}
        self._annotations = {split: JsonEntries(dest.stream(_rest(split))) for split in splits}
        self._count = 0
        for entries in self._images.values():
            entries.stream.write(f'{{"info": {{}},\n"licenses": [],\n{listed},\n"images": [')

    def add(self, item: Item) -> None:
        """An image is listed whether it has annotations or not."""
        image = item.image
        if item.data is not None:
            self._dest.put(f"images/{item.split}/{item.file}", item.data)
        columns = ("height", "width", "shard", "row", "key", "member")
        known = {name: getattr(image, name) for name in columns}
        self._images[item.split].add({"id": item.number, "file_name": item.file, **known})
        for instance in image.instances:
            self._count += 1
            self._annotations[item.split].add(self._entry(item.number, instance))

    def close(self) -> list[str]:
        """See item.Writer."""
        for split, entries in self._images.items():
            rest = self._annotations[split].stream
            rest.flush()
            entries.stream.write('\n],\n"annotations": [')
            with open(rest.name, encoding="utf-8") as file:
                shutil.copyfileobj(file, entries.stream)
            entries.stream.write("\n]}\n")
            self._dest.publish(_file(split))
            self._dest.discard(_rest(split))
        first = storage.join(self._dest.folder, _file(next(iter(self._images))))
        return [f'pycocotools.coco.COCO("{first}")']

    def _entry(self, number: int, instance: Instance) -> dict[str, Any]:
        height, width = instance.rle["size"]
        counts = instance.rle["counts"]
        return {
            "id": self._count,
            "image_id": number,
            "category_id": instance.class_id + 1,
            "segmentation": {
                "size": [height, width],
                "counts": counts if self._counts == "str" else run_lengths(counts),
            },
            "bbox": list(instance.bbox),
            "area": instance.area,
            "iscrowd": 0,
            "score": round(instance.score, 6),
            "presence": round(instance.presence, 6),
            "prompt_id": instance.prompt_id,
        }


def run_lengths(counts: str) -> list[int]:
    """COCO's uncompressed counts: the lengths of runs of 0 and 1 in turn, beginning with 0.

    As in COCO's rleFrString: 5 bits and a sign a character, and from the fourth length on
    the difference to the length two before.
    """
    bits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)  # the last character of each length
    if not len(ends):
        return []
    starts = np.append(0, ends[:-1] + 1)
    characters = np.diff(starts, append=ends[-1] + 1)
    place = np.arange(ends[-1] + 1) - np.repeat(starts, characters)
    lengths = np.add.reduceat((bits[: len(place)] & 31) << (5 * place), starts)
    lengths -= (bits[ends] & 16 > 0) * (1 << (5 * characters))
    for differences in (lengths[1::2], lengths[2::2]):
        np.cumsum(differences, out=differences)
    return lengths.tolist()


def _file(split: str) -> str:
    return f"annotations/instances_{split}.json"


def _rest(split: str) -> str:
    return f"annotations of {split}"
