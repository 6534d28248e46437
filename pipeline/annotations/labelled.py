"""A finished table of annotations, image by image: what every export reads.

Parts are read one after the other, batch by batch, in memory independent of the table's size.
Shapes: H and W of the upright image.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from pipeline import storage
from pipeline.errors import JobError, UsageError
from pipeline.run.lifecycle import is_unfinished
from pipeline.run.manifest import read_run
from pipeline.write.layout import EMPTY_PART
from pipeline.write.parts import open_part, read_part

_AT_ONCE = 64  # rows that are held: an RLE may have 100 KB


@dataclass(frozen=True, kw_only=True)
class Class:
    """One class of the ontology."""

    name: str
    color: str | None
    """#rrggbb, as the ontology gives it."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One annotation: columns of schema.ANNOTATIONS."""

    class_id: int
    class_name: str
    prompt_id: int
    score: float
    presence: float
    rle: dict[str, Any]
    """COCO's compressed RLE: size [H, W], counts a str."""
    bbox: tuple[int, int, int, int]
    """x, y, width, height in pixels."""
    area: int
    threshold: float

    def mask(self) -> np.ndarray:
        """(H, W) uint8, 0 or 1, column-major."""
        with warnings.catch_warnings():
            # pycocotools 2.0.11 makes its array in numpy 1's way.
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            return coco.decode(self.rle)

    def crop(self) -> np.ndarray:
        """The mask inside its box: (height, width) uint8, 0 or 1."""
        x, y, width, height = self.bbox
        return self.mask()[y : y + height, x : x + width]


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """One row of the table of images, and its annotations."""

    shard: str
    row: int
    key: str
    member: str
    height: int
    """Of the upright image, in pixels, as all masks."""
    width: int
    format: str
    """Pillow's name: JPEG, PNG, ..."""
    orientation: int
    """The EXIF orientation of the image as it is stored."""
    instances: tuple[Instance, ...]


_IMAGE_COLUMNS = [n for n in LabelledImage.__dataclass_fields__ if n != "instances"]
_COLUMNS = ["row", *(n for n in Instance.__dataclass_fields__ if n != "class_name"), "class"]


def open_labels(labels: str) -> tuple[dict[str, Any], list[str]]:
    """The record of a finished run with annotations, and its parts of `images`, sorted.

    Raises UsageError for a missing or unfinished one, JobError for annotations without images
    beside them, StorageError.
    """
    record = read_run(labels)
    if record is None:
        raise UsageError(f"{labels}: not the output of clipseg-ray label: it has no _run.json")
    if is_unfinished(labels):
        raise UsageError(f"{labels}: not finished; run the command that makes it again first")
    parts = {name: set(_part_names(labels, name)) for name in ("images", "annotations")}
    if not parts["images"]:
        raise UsageError(f"{labels}: no images in it; nothing to export")
    if alone := sorted(parts["annotations"] - parts["images"]):
        raise JobError(f"{labels}: annotations/{alone[0]} has no images/{alone[0]} beside it")
    return record, sorted(parts["images"])


def read_classes(labels: str) -> list[Class]:
    """The classes of the ontology, in its order. Raises UsageError if the record has none."""
    record = read_run(labels) or {}
    try:
        found = record["fingerprint"]["ontology"]["classes"]
        classes = [Class(name=str(c["name"]), color=c.get("color")) for c in found]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{labels}: _run.json names no classes; export takes the output of clipseg-ray label"
        ) from error
    return classes


def read_rows_of(labels: str, part: str) -> list[int]:
    """The row numbers in a part of `images`."""
    rows: list[int] = read_part(storage.join(labels, "images", part), ["row"])["row"].to_pylist()
    return rows


def read_labels(
    labels: str, part: str, classes: int, rows: Container[int] | None = None
) -> Iterator[LabelledImage]:
    """The images of one part, or those of some rows, in order, each with its annotations.

    Raises JobError for rows out of order, and for an annotation without an image, with a mask of
    another size than the image, or with a class out of range.
    """
    annotations = _read(storage.join(labels, "annotations", part), _COLUMNS, optional=True)
    ahead = next(annotations, None)
    before = -1
    uri = storage.join(labels, "images", part)
    for image in _read(uri, _IMAGE_COLUMNS):
        if image["row"] <= before:
            raise JobError(f"{uri}: row {image['row']} comes after row {before}")
        before = image["row"]
        instances = []
        while ahead is not None and ahead["row"] == image["row"]:
            instances.append(_instance(ahead, image, classes, uri))
            ahead = next(annotations, None)
        if rows is not None and image["row"] not in rows:
            continue
        yield LabelledImage(**image, instances=tuple(instances))
    if ahead is not None:
        raise JobError(f"{uri}: has no row {ahead['row']} in its place, of which are annotations")


def _instance(row: dict[str, Any], image: dict[str, Any], classes: int, uri: str) -> Instance:
    if row["rle"]["size"] != [image["height"], image["width"]]:
        size = "{} x {}".format(*row["rle"]["size"])
        where = f"{uri}: row {row['row']} has {image['height']} x {image['width']} px"
        raise JobError(f"{where}, its mask {size}: make the labels at the size of the images")
    if not 0 <= row["class_id"] < classes:
        raise JobError(f"{uri}: row {row['row']} is of class {row['class_id']} of {classes}")
    x, y, width, height = (round(value) for value in row["bbox"])
    if row["area"] < 1 or width < 1 or height < 1:
        raise JobError(f"{uri}: row {row['row']} has an empty mask")
    values = {name: value for name, value in row.items() if name not in ("row", "class")}
    return Instance(**{**values, "class_name": row["class"], "bbox": (x, y, width, height)})


def _read(uri: str, columns: list[str], *, optional: bool = False) -> Iterator[dict[str, Any]]:
    if optional and not storage.is_file(uri):
        return
    with open_part(uri) as parquet:
        if missing := set(columns) - set(parquet.schema_arrow.names):
            raise JobError(f"{uri}: not a part of this table: it has no column {min(missing)!r}")
        for batch in parquet.iter_batches(_AT_ONCE, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _part_names(labels: str, table: str) -> list[str]:
    files = storage.list_files(storage.join(labels, table), recursive=False)
    names = [file.uri.rpartition("/")[2] for file in files]
    return [n for n in names if n.endswith(".parquet") and n != EMPTY_PART and n[0] != "."]
