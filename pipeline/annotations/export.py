"""Labels -> the files of a tool: one image at a time, whatever their number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.annotations.coco import WriteCoco
from pipeline.annotations.cvat import WriteCvat
from pipeline.annotations.destination import Destination, read_finished
from pipeline.annotations.huggingface import WriteHuggingFace
from pipeline.annotations.item import Item, Writer
from pipeline.annotations.labelled import (
    Class,
    LabelledImage,
    open_labels,
    read_classes,
    read_labels,
    read_rows_of,
)
from pipeline.annotations.labelme import WriteLabelme
from pipeline.annotations.labelstudio import WriteLabelStudio
from pipeline.annotations.pictures import HINT, Pictures, name_file
from pipeline.annotations.png import WritePng
from pipeline.annotations.row_files import RowFiles
from pipeline.annotations.sam import WriteSam
from pipeline.annotations.splits import GROUP_COLUMNS, Splits, name_image
from pipeline.annotations.voc import WriteVoc
from pipeline.annotations.yolo import WriteYolo
from pipeline.config.export import ExportConfig
from pipeline.errors import JobError, UsageError, one_line
from pipeline.run.manifest import name_run
from pipeline.storage.uri import split_list

_WRITERS: dict[str, Callable[[Destination, list[Class], list[str]], Writer]] = {
    "yolo": WriteYolo,
    "voc": WriteVoc,
    "labelme": WriteLabelme,
    "labelstudio": WriteLabelStudio,
    "cvat": WriteCvat,
    "png": WritePng,
    "sam": WriteSam,
}
IMAGES = pa.schema(
    [
        ("file_name", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("member", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("orientation", pa.int8()),  # of the image as it is stored, before --images upright
        ("annotations", pa.int32()),
    ]
)
_ROW_BYTES = 500  # about, of IMAGES
Only = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Images to export, by part and row number, and facts that go with each."""


@dataclass(kw_only=True)
class Account:
    """Account of an export."""

    images: int = 0
    empty: int = 0
    """Images without annotations."""
    turned: int = 0
    """Images whose EXIF orientation is not 1."""
    annotations: int = 0
    of_class: list[int] = field(default_factory=list)
    of_split: dict[str, int] = field(default_factory=dict)
    """Images of each split."""
    lines: list[str] = field(default_factory=list)
    """Of the writer: what was left out, and how to open it."""

    def count(self, image: LabelledImage, split: str) -> None:
        """Add one image."""
        self.images += 1
        self.empty += not image.instances
        self.turned += image.orientation != 1
        self.annotations += len(image.instances)
        self.of_split[split] += 1
        for instance in image.instances:
            self.of_class[instance.class_id] += 1


def export_labels(
    config: ExportConfig,
    on_image: Callable[[int], None] = lambda total: None,
    only: Only | None = None,
) -> Account:
    """Write the export of a config; `on_image` is called for each image with their number, or 0.

    `only`: these images alone. A finished export is left as it is. Raises UsageError, JobError,
    StorageError.
    """
    labels, dest = storage.check_uri(config.labels), storage.check_uri(config.dest)
    record, parts = open_labels(labels)
    classes, shares = read_classes(labels), config.shares()
    if f"{dest}/".startswith(f"{labels}/"):
        raise UsageError(f"{dest}: lies inside LABELS; choose another folder")
    asked = _asked(config, labels, record, only)
    if counts := read_finished(dest, asked):
        account = Account(**counts)
        account.lines.append("nothing was left to do")
        return account
    splits = Splits(shares, config.group)
    pictures = None if config.images == "none" else Pictures(labels, config.images)
    sources = split_list(pictures.source.source) if pictures else []
    if any(f"{dest}/".startswith(f"{source}/") for source in sources):
        raise UsageError(f"{dest}: lies inside the images' folder, which would hold them twice")
    account = Account(of_class=[0] * len(classes), of_split=dict.fromkeys(shares, 0))
    total = int(record.get("counts", {}).get("rows_ok", 0))
    if only is not None:
        parts, total = [part for part in parts if part in only], sum(map(len, only.values()))
    with Destination(dest, asked) as files:
        writer = _open_writer(config, files, classes, list(shares))
        index = RowFiles(files, "_images", IMAGES)
        for part in parts:
            rows = only[part] if only is not None else None
            found = read_labels(labels, part, len(classes), rows)
            wanted = partial(read_rows_of, labels, part) if rows is None else partial(sorted, rows)
            for image, data in _with_data(found, wanted, pictures):
                item = _item(image, data, account.images + 1, splits, config.images)
                writer.add(replace(item, facts=rows[image.row]) if rows is not None else item)
                account.count(image, item.split)
                index.add(_index_row(item), _ROW_BYTES)
                on_image(total)
        account.lines = writer.close()
        index.close()
        files.finish(asdict(account))
    return account


def _asked(
    config: ExportConfig, labels: str, record: dict[str, Any], only: Only | None
) -> dict[str, Any]:
    """Everything deciding the files of an export."""
    options = {name: getattr(config, name) for name in ("format", "images", "split", "counts")}
    group = config.group
    if group and group not in GROUP_COLUMNS:
        group = storage.check_uri(group)
    asked = {"labels": labels, "run": name_run(record), "group": group, **options}
    if only is not None:
        facts = json.dumps([[part, sorted(rows.items())] for part, rows in sorted(only.items())])
        asked["only"] = hashlib.sha256(facts.encode()).hexdigest()
    return asked


def _open_writer(
    config: ExportConfig, dest: Destination, classes: list[Class], splits: list[str]
) -> Writer:
    if config.format == "coco":
        return WriteCoco(dest, classes, splits, config.counts)
    if config.format == "hf":
        return WriteHuggingFace(dest, classes, splits, config.images != "none")
    return _WRITERS[config.format](dest, classes, splits)


def _with_data(
    images: Iterable[LabelledImage], rows: Callable[[], list[int]], pictures: Pictures | None
) -> Iterator[tuple[LabelledImage, bytes | None]]:
    """Each image with its file, read from its shard side by side; `rows`: of the images.

    Raises JobError.
    """
    if pictures is None:
        yield from ((image, None) for image in images)
        return
    samples = None
    for image in images:
        if samples is None:
            samples = pictures.read(image.shard, rows())
        row, sample = next(samples, (-1, None))
        if sample is None or row != image.row:
            raise JobError(
                f"{image.shard}: row {image.row} could not be read again; run the same command "
                f"again, or {HINT}"
            )
        yield image, pictures.encode(image, sample)


def _item(
    image: LabelledImage, data: bytes | None, number: int, splits: Splits, images: str
) -> Item:
    name = name_image(image)
    return Item(
        image=image,
        number=number,
        split=splits.find(image),
        name=name,
        file=name_file(name, image, images),
        data=data,
    )


def _index_row(item: Item) -> dict[str, Any]:
    image = item.image
    columns = ("shard", "row", "key", "member", "height", "width", "orientation")
    return {
        "file_name": item.file,
        "split": item.split,
        **{name: getattr(image, name) for name in columns},
        "annotations": len(image.instances),
    }


def describe_export(config: ExportConfig, account: Account) -> str:
    """Lines for the user of an export: counts, losses, and how to open it."""
    lines = [
        f"{account.images:,} images ({account.empty:,} without annotations), "
        f"{account.annotations:,} annotations -> {storage.check_uri(config.dest)}"
    ]
    if len(account.of_split) > 1:
        splits = ", ".join(f"{name} {count:,}" for name, count in account.of_split.items())
        lines.append(f"images of each split: {splits}")
    names = [c.name for c in read_classes(storage.check_uri(config.labels))]
    if without := [n for n, count in zip(names, account.of_class, strict=True) if not count]:
        lines.append(f"warning: no annotations of {', '.join(without)}")
    if account.turned and config.images == "copy":
        lines.append(
            f"warning: images turned by their EXIF orientation, with upright masks: "
            f"{account.turned:,}; for readers that do not turn them, Pillow's, --images upright"
        )
    return "\n  ".join(one_line(line, 1000) for line in [*lines, *account.lines])
