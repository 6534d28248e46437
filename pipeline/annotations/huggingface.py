"""Hugging Face datasets: data/<split>-00000.parquet with images, maps of classes and instances.

The schema metadata `huggingface` says what the columns are: without it an image is a dict of bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from pipeline.annotations.destination import Destination
from pipeline.annotations.item import Item
from pipeline.annotations.labelled import Class
from pipeline.annotations.maps import VOID, encode_png, label_map
from pipeline.annotations.row_files import RowFiles
from pipeline.schema import RLE

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_INSTANCE = {
    "class_id": (pa.int64(), None),
    "bbox": (pa.list_(pa.float32(), 4), {"feature": "float32", "length": 4, "_type": "List"}),
    "area": (pa.int64(), "int64"),
    "score": (pa.float32(), "float32"),
    "presence": (pa.float32(), "float32"),
    "rle": (RLE, {"size": {"feature": "int32", "_type": "List"}, "counts": "string"}),
}


class WriteHuggingFace:
    """A row an image; `annotation` is its map of classes, as in png."""

    def __init__(self, dest: Destination, classes: list[Class], splits: list[str], images: bool):
        self._dest = dest
        self._kind = np.uint8 if len(classes) < VOID else np.uint16
        schema = _schema([c.name for c in classes], images)
        self._files = {split: RowFiles(dest, f"data/{split}", schema) for split in splits}
        self._contested = 0

    def add(self, item: Item) -> None:
        """See item.Writer."""
        image = item.image
        numbers = [instance.class_id + 1 for instance in image.instances]
        found = label_map((image.height, image.width), image.instances, numbers, self._kind)
        self._contested += found.contested
        png = encode_png(found.pixels)
        row: dict[str, Any] = {
            "file_name": item.file,
            "annotation": {"bytes": png, "path": f"{item.name}.png"},
            "instances": [
                {name: getattr(instance, name) for name in _INSTANCE}
                for instance in image.instances
            ],
            **{name: getattr(image, name) for name in ("shard", "row", "key", "height", "width")},
        }
        if item.data is not None:
            row["image"] = {"bytes": item.data, "path": item.file}
        rles = sum(len(instance.rle["counts"]) for instance in image.instances)
        self._files[item.split].add(row, len(item.data or b"") + len(png) + rles)

    def close(self) -> list[str]:
        """See item.Writer."""
        for files in self._files.values():
            files.close()
        data = [{"split": s, "path": f"data/{s}-*.parquet"} for s in self._files]
        card = yaml.safe_dump(
            {"configs": [{"config_name": "default", "data_files": data}]}, sort_keys=False
        )
        text = f"---\n{card}task_categories:\n- image-segmentation\n---\n"
        self._dest.put("README.md", text.encode())
        how = f'datasets.load_dataset("{self._dest.folder}")'
        said = f"{self._contested:,} pixels that two classes claim are void in `annotation`"
        return [said, how] if self._contested else [how]


def _schema(names: list[str], images: bool) -> pa.Schema:
    label = {"names": names, "_type": "ClassLabel"}
    instance = {n: label if n == "class_id" else _value(f) for n, (_, f) in _INSTANCE.items()}
    image = {"image": {"_type": "Image"}} if images else {}
    integer, text = _value("int64"), _value("string")
    features = {
        **image,
        "annotation": {"_type": "Image"},
        "instances": {"feature": instance, "_type": "List"},
        "file_name": text,
        "shard": text,
        "row": integer,
        "key": text,
        "height": integer,
        "width": integer,
    }
    columns = {
        **({"image": _IMAGE} if images else {}),
        "annotation": _IMAGE,
        "instances": pa.list_(pa.struct([(n, kind) for n, (kind, _) in _INSTANCE.items()])),
        "file_name": pa.string(),
        "shard": pa.string(),
        "row": pa.int64(),
        "key": pa.string(),
        "height": pa.int64(),
        "width": pa.int64(),
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(list(columns.items()), metadata=metadata)


def _value(feature: Any) -> Any:
    """A feature as datasets' JSON has it."""
    if isinstance(feature, str):
        return {"dtype": feature, "_type": "Value"}
    if "_type" in feature:
        return {**feature, "feature": _value(feature["feature"])}
    return {name: _value(inner) for name, inner in feature.items()}
