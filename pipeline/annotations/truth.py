"""Ground truth as it is read and found: what people drew, for the rows of a run.

An image of the truth goes by the (shard, row) of our own exports, else by its names: the whole
path, then without its ending, then without its folders. A name of two images is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from pipeline.annotations.coco import run_lengths
from pipeline.errors import UsageError, one_line

LIMIT_PX = 10**8  # of an image of the truth
_ENDING = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|jp2|ppm|pgm)$", re.IGNORECASE)
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class TruthInstance:
    """One object of the truth."""

    name: str
    """Of its class."""
    rle: dict[str, Any]
    crowd: bool = False


@dataclass(frozen=True, kw_only=True)
class TruthImage:
    """The objects of one image. A class without any is absent from it."""

    size: tuple[int, int]
    """(height, width) in pixels; (0, 0) where nothing is drawn and nothing tells it."""
    instances: tuple[TruthInstance, ...]
    void: np.ndarray | None = None
    """(W, H) bool: pixels that count for nothing."""

    def mask_at(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """(W, H) bool: the pixels of a class, over all its instances; `size` is the image's if the
        truth has none."""
        found = [each.rle for each in self.instances if each.name == name]
        if not found:
            return np.zeros(size[::-1], np.bool_)
        return decode(found[0] if len(found) == 1 else coco.merge(found))


@dataclass(frozen=True, kw_only=True)
class TruthName:
    """Names of an image of the truth."""

    names: tuple[str, ...]
    """Paths or keys."""
    shard: str | None = None
    row: int | None = None


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Opened ground truth."""

    source: str
    classes: list[str]
    images: list[TruthName]
    read: Callable[[int], TruthImage]
    """The image of an index. Raises UsageError naming the file for what cannot be read."""
    instances: bool
    """Whether objects are told apart."""
    notes: tuple[str, ...] = ()


def decode(rle: dict[str, Any]) -> np.ndarray:
    """(W, H) bool, of a checked RLE."""
    return np.ascontiguousarray(coco.decode(rle).T).view(np.bool_)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """The RLE of a mask (W, H) bool."""
    return coco.encode(mask.view(np.uint8).T)


def not_empty(instances: Iterable[TruthInstance]) -> tuple[TruthInstance, ...]:
    """Those with a pixel: an empty mask stands for an absent class."""
    return tuple(each for each in instances if coco.area(each.rle))


def check_size(height: Any, width: Any, where: str) -> tuple[int, int]:
    """(height, width); raises UsageError for what is no size of an image."""
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise UsageError(f"{where}: height and width must be whole numbers above 0")
    if height * width > LIMIT_PX:
        raise UsageError(f"{where}: {height:,} x {width:,} px is too large")
    return height, width


def check_rle(segmentation: Any, size: tuple[int, int], where: str) -> dict[str, Any]:
    """COCO's RLE, compressed or a list, with runs filling the size; raises UsageError.

    With other runs pycocotools reads beyond its own memory.
    """
    counts, given = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(given, list) or given != list(size):
        said = one_line(str(given), 60)
        raise UsageError(f"{where}: its mask has the size {said}, its image {list(size)}")
    text = counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts
    if isinstance(text, str):
        runs = run_lengths(text) if text.isascii() else [-1]
    else:
        whole = isinstance(text, list) and all(type(n) is int for n in text)
        runs = text if whole else [-1]
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise UsageError(f"{where}: counts that are no RLE of {size[0]} x {size[1]} px")
    if isinstance(text, str):
        return {"size": list(size), "counts": text}
    return coco.frPyObjects({"size": list(size), "counts": runs}, *size)


def check_polygons(polygons: Any, size: tuple[int, int], where: str) -> dict[str, Any]:
    """The RLE of the union of polygons [x, y, x, y, ...], cut at the image; raises UsageError."""
    height, width = size
    found = []
    for polygon in polygons:
        try:
            corners = np.array(polygon, np.float64).reshape(-1, 2)
        except (ValueError, TypeError):
            corners = np.full((1, 2), np.nan)
        if len(corners) < 3 or not np.isfinite(corners).all():
            raise UsageError(f"{where}: a polygon needs 3 or more points [x, y, x, y, ...]")
        found.append(corners.clip(0, [width, height]).ravel().tolist())
    if not found:
        raise UsageError(f"{where}: no polygon in its segmentation")
    return coco.merge(coco.frPyObjects(found, height, width))


def name_of(known: dict[str, Any], names: list[str], file: str) -> TruthName:
    """The names of an image in a file; our own exports tell shard, row, key and member as well.

    Raises UsageError, naming the file, for an image without any.
    """
    names += [str(known[n]) for n in ("member", "key") if known.get(n)]
    names = [n for n in names if n and n != "None"]
    if not names:
        raise UsageError(f"{file}: an image without a name")
    ours = type(known.get("row")) is int and isinstance(known.get("shard"), str)
    return TruthName(
        names=tuple(names),
        shard=known["shard"] if ours else None,
        row=known["row"] if ours else None,
    )


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _without_ending(name: str) -> str:
    return _ENDING.sub("", name)


def _without_folders(name: str) -> str:
    return _without_ending(name.rpartition("/")[2])


_FORMS: tuple[Callable[[str], str], ...] = (_plain, _without_ending, _without_folders)


class Matcher:
    """Finds the image of the truth for each row of a run; holds the names of the truth."""

    def __init__(self, truth: Truth):
        self._truth = truth
        self._by_row: dict[tuple[str, int], int] = {}
        self._by_name: list[dict[str, int]] = [{} for _ in _FORMS]
        self._twice: list[set[str]] = [set() for _ in _FORMS]
        self._taken = bytearray(len(truth.images))
        for i, image in enumerate(truth.images):
            if image.shard is not None and image.row is not None:
                self._by_row[image.shard, image.row] = i
            for form, known, twice in zip(_FORMS, self._by_name, self._twice, strict=True):
                for name in {form(_plain(n)) for n in image.names}:
                    if known.setdefault(name, i) != i:
                        twice.add(name)
        self.without_truth = 0
        self.named: list[str] = []
        """The first rows without truth."""

    def find(self, shard: str, row: int, names: Sequence[str]) -> int | None:
        """The index of the truth of a row; None without one.

        Raises UsageError if a name fits several images, or two rows fit one.
        """
        who = f"{shard} row {row} ({names[0]})"
        found = self._by_row.get((shard, row))
        if found is None:
            found = self._find_name(names, who)
        if found is None:
            self.without_truth += 1
            if len(self.named) < _SHOWN:
                self.named.append(one_line(names[0], 80))
            return None
        if self._taken[found]:
            name = self._truth.images[found].names[0]
            raise UsageError(
                f"{self._truth.source}: {one_line(name, 80)!r} fits two rows, the second is "
                f"{one_line(who, 120)}; give it more of its path"
            )
        self._taken[found] = True
        return found

    def _find_name(self, names: Sequence[str], who: str) -> int | None:
        for form, known, twice in zip(_FORMS, self._by_name, self._twice, strict=True):
            for name in map(_plain, names):
                wanted = form(name)
                if wanted in twice:
                    raise UsageError(
                        f"{self._truth.source}: several images are named {one_line(wanted, 80)!r}, "
                        f"as {one_line(who, 120)} is; give them paths as in the run"
                    )
                if wanted and wanted in known:
                    return known[wanted]
        return None

    def describe(self) -> list[str]:
        """A line for rows without truth, and one for truth without a row."""
        lines = []
        if self.without_truth:
            lines.append(
                f"{self.without_truth:,} images of the run have no ground truth: "
                f"{_some(iter(self.named), self.without_truth)}"
            )
        if missing := self._taken.count(0):
            names = (
                image.names[0] for i, image in enumerate(self._truth.images) if not self._taken[i]
            )
            lines.append(
                f"{missing:,} images of the ground truth are not in the run: "
                f"{_some(names, missing)}"
            )
        return lines


def _some(names: Iterator[str], count: int) -> str:
    shown = [one_line(name, 80) for _, name in zip(range(_SHOWN), names, strict=False)]
    return ", ".join(shown) + (", ..." if count > len(shown) else "")
