"""Maps of classes as PNG, laid out as an imagefolder of Hugging Face datasets.

    <split>/images/<name>.jpg  <split>/masks/<name>.png  <split>/metadata.jsonl  classes.json

0 is background, then the classes from 1; 255 (65535 with more classes than 254) for a pixel of two
classes.
"""

from __future__ import annotations

import json

import numpy as np

from pipeline.annotations.destination import Destination
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class
from pipeline.annotations.maps import VOID, color_of, encode_png, label_map


class WritePng:
    """One map an image."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str]):
        self._dest, self._classes = dest, classes
        self._kind = np.uint8 if len(classes) < VOID else np.uint16
        self._lists = {split: dest.stream(_list(split)) for split in splits}
        self._contested = 0

    def add(self, item: Item) -> None:
        """See item.Writer."""
        image = item.image
        numbers = [instance.class_id + 1 for instance in image.instances]
        found = label_map((image.height, image.width), image.instances, numbers, self._kind)
        self._contested += found.contested
        mask = f"masks/{item.name}.png"
        self._dest.put(f"{item.split}/{mask}", encode_png(found.pixels))
        entry = {"shard": image.shard, "row": image.row, "key": image.key}
        if item.data is not None:
            self._dest.put(f"{item.split}/images/{item.file}", item.data)
        entry |= {"file_name": f"images/{item.file}", "label_file_name": mask}
        self._lists[item.split].write(json.dumps(entry) + "\n")

    def close(self) -> list[str]:
        """See item.Writer."""
        for split in self._lists:
            self._dest.publish(_list(split))
        classes = [
            {"value": i + 1, "name": c.name, "color": color_of(self._classes, i)}
            for i, c in enumerate(self._classes)
        ]
        void = int(np.iinfo(self._kind).max)
        text = json.dumps({"background": 0, "void": void, "classes": classes}, indent=1)
        self._dest.put("classes.json", text.encode())
        how = f'datasets.load_dataset("imagefolder", data_dir="{self._dest.folder}")'
        said = f"{self._contested:,} pixels that two classes claim are void ({void})"
        return [said, how] if self._contested else [how]


def _list(split: str) -> str:
    return f"{split}/metadata.jsonl"
