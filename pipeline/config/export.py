"""Options of `clipseg-ray export`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.config.options import check_file
from pipeline.errors import UsageError

_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export labels in the format of an annotation tool or a trainer."""

    labels: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LABELS")]
    """The OUTPUT of clipseg-ray label; local or s3://."""

    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")]
    """A new folder; local or s3://. The same command completes a stopped export."""

    format: Literal["coco", "yolo", "voc", "labelme", "labelstudio", "cvat", "png", "hf", "sam"]
    """Format to write; docs/exports.md compares them."""

    images: Literal["none", "copy", "upright"] = "copy"
    """Copy the images as they are; or write those with an EXIF orientation turned upright, as
    their masks are; or none."""

    split: Annotated[str, tyro.conf.arg(metavar="NAME=SHARE,...")] = "train=1"
    """Splits and the share of images in each: train=0.8,val=0.2. The shares add up to 1."""

    group: Annotated[str | None, tyro.conf.arg(metavar="COLUMN|PARQUET")] = None
    """Keep images of one group in one split: those with the same shard, key or member, or those of
    a group in the --output of clipseg-ray duplicates."""

    counts: Literal["str", "list"] = "str"
    """For --format coco: RLE as pycocotools writes it, or lists for loaders that call frPyObjects
    on it, torchvision's reference for one."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display, only the last lines."""

    def __post_init__(self) -> None:
        check_file("LABELS", self.labels)
        check_file("DEST", self.dest)
        check_file("--group", self.group)
        if self.counts != "str" and self.format != "coco":
            raise UsageError(f"--counts {self.counts}: only --format coco has counts")
        self.shares()

    def shares(self) -> dict[str, float]:
        """The share of each split. Raises UsageError for shares not adding up to 1."""
        found: dict[str, float] = {}
        for item in self.split.split(","):
            name, _, number = (piece.strip() for piece in item.partition("="))
            if not _SPLIT.fullmatch(name):
                raise UsageError(
                    f"--split {self.split}: {name!r} cannot name a split; write train=0.8,val=0.2"
                )
            if name.lower() in map(str.lower, found):
                raise UsageError(f"--split {self.split}: {name} is there twice")
            try:
                found[name] = float(number)
            except ValueError as error:
                raise UsageError(f"--split {self.split}: no share in {item.strip()!r}") from error
            if not 0 < found[name] <= 1:
                raise UsageError(f"--split {self.split}: the share of {name} must be above 0")
        if not math.isclose(total := sum(found.values()), 1, abs_tol=1e-6):
            raise UsageError(f"--split {self.split}: the shares add up to {total:g}, not 1")
        return found
