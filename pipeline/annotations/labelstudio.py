"""Label Studio: tasks with brush predictions, tasks/<split>-00000.json, and config.xml.

An RLE is of RGBA bytes row by row, all four of a pixel 0 or 255, packed bit by bit:

    32 bits number of bytes, 5 bits word size - 1, 4 x 4 bits sizes of a run's length - 1
    then runs: 1, 2 bits which size, length - 1 in so many bits, 8 bits value
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline import storage
from pipeline.annotations.destination import Destination, JsonEntries
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class, Instance
from pipeline.annotations.maps import color_of
from pipeline.annotations.xml_text import xml_text

FILE_BYTES = 64 * 2**20  # of tasks: Label Studio takes uploads of up to 250 MB
MODEL = "clipseg-ray"

_SIZES = np.array([3, 4, 8, 16])  # bits of a run's length
_LONGEST = 2**16


class WriteLabelStudio:
    """Files of tasks, closed at FILE_BYTES."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str]):
        self._dest = dest
        self._tasks: dict[str, JsonEntries] = {}
        self._files = dict.fromkeys(splits, 0)
        labels = "".join(
            f"    <Label value={quoteattr(xml_text(c.name, escaped=False))} "
            f'background="{color_of(classes, i)}"/>\n'
            for i, c in enumerate(classes)
        )
        self._config = (
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <BrushLabels name="label" toName="image">\n{labels}  </BrushLabels>\n</View>\n'
        )

    def add(self, item: Item) -> None:
        """See item.Writer."""
        path = f"images/{item.split}/{item.file}"
        if item.data is not None:
            self._dest.put(path, item.data)
        if item.split not in self._tasks:
            stream = self._dest.stream(self._file(item.split))
            stream.write("[")
            self._tasks[item.split] = JsonEntries(stream)
        tasks = self._tasks[item.split]
        tasks.add(self._task(item, path))
        if tasks.stream.tell() > FILE_BYTES:
            self._end(item.split)

    def close(self) -> list[str]:
        """See item.Writer."""
        for split in list(self._tasks):
            self._end(split)
        self._dest.put("config.xml", self._config.encode())
        folder = self._dest.folder
        lines = ["in Label Studio: config.xml as the labelling interface, then import tasks/*.json"]
        if not storage.is_s3(folder):
            lines.insert(
                0,
                "start it with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and "
                f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={folder}, and add {folder}/images as a "
                "local storage",
            )
        return lines

    def _file(self, split: str) -> str:
        return f"tasks/{split}-{self._files[split]:05d}.json"

    def _end(self, split: str) -> None:
        self._tasks.pop(split).stream.write("\n]\n")
        self._dest.publish(self._file(split))
        self._files[split] += 1

    def _task(self, item: Item, path: str) -> dict[str, Any]:
        image, folder = item.image, self._dest.folder
        local = f"/data/local-files/?d={quote(path)}"
        data = {
            "image": storage.join(folder, path) if storage.is_s3(folder) else local,
            "shard": image.shard,
            "row": image.row,
            "key": image.key,
            **item.facts,
        }
        results = [_result(i, instance) for i, instance in enumerate(image.instances)]
        scores = [instance.score for instance in image.instances]
        mean = round(sum(scores) / len(scores), 6) if scores else 0.0
        prediction = {"model_version": MODEL, "score": mean, "result": results}
        return {"data": data, "predictions": [prediction]}


def _result(index: int, instance: Instance) -> dict[str, Any]:
    height, width = instance.rle["size"]
    return {
        "id": f"mask-{index}",
        "from_name": "label",
        "to_name": "image",
        "type": "brushlabels",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": round(instance.score, 6),
        "value": {
            "format": "rle",
            "rle": brush_rle(instance.mask()),
            "brushlabels": [instance.class_name],
        },
    }


def brush_rle(mask: np.ndarray) -> list[int]:
    """The bytes, 0..255, of Label Studio's RLE of a mask (H, W) of 0 and 1."""
    flat = mask.reshape(-1) > 0
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], changes])
    lengths = np.diff(starts, append=len(flat)) * 4
    values = flat[starts] * np.int64(255)
    # Long runs are split: as many of the longest as fit before the rest.
    pieces = (lengths - 1) // _LONGEST + 1
    ends = np.cumsum(pieces) - 1
    split = np.full(int(pieces.sum()), _LONGEST)
    split[ends] = lengths - (pieces - 1) * _LONGEST
    values = np.repeat(values, pieces)
    kinds = np.searchsorted(2**_SIZES, split)
    sizes = _SIZES[kinds]
    # Each run's code, at the low end of 27 bits; the bits in front of it are not written.
    codes = (((0b100 | kinds) << sizes | (split - 1)) << 8) | values
    bits = (codes[:, None] >> np.arange(26, -1, -1)) & 1
    written = np.arange(27) >= (27 - 11 - sizes)[:, None]
    head = f"{4 * len(flat):032b}{8 - 1:05b}" + "".join(f"{size - 1:04b}" for size in _SIZES)
    header = np.frombuffer(head.encode(), np.uint8) - ord("0")
    # A whole zero byte at the end where the bits fill their bytes, as the SDK has it.
    all_bits = np.concatenate([header, bits[written].astype(np.uint8)])
    spare = np.zeros(8 - len(all_bits) % 8, np.uint8)
    return np.packbits(np.concatenate([all_bits, spare])).tolist()
