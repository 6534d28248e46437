"""Ground truth out of CVAT for images 1.1. The file is held in memory, and read image by image."""

from __future__ import annotations

from collections import Counter
from typing import Any
from xml.parsers import expat

import numpy as np

from pipeline.annotations.truth import (
    Truth,
    TruthImage,
    TruthInstance,
    TruthName,
    check_polygons,
    check_size,
    encode,
    not_empty,
)
from pipeline.annotations.truth_shapes import ellipse, numbers, rectangle
from pipeline.errors import UsageError, one_line

_AREAS = ("mask", "polygon", "box", "ellipse")
Shape = tuple[str, dict[str, str]]
"""An element and its attributes."""


class _Index:
    """The places of the images in a file, and its classes; made by one pass over the file."""

    def __init__(self, file: str, data: bytes):
        self._file = file
        self._path: list[str] = []
        self.starts: list[int] = []
        self.names: list[str] = []
        self.classes: set[str] = set()
        self.others: Counter[str] = Counter()
        """Elements of images that are no areas."""
        self._text = ""
        self._parser = _parser(file, self._start, self._end)
        self._parser.CharacterDataHandler = self._add_text
        _parse(self._parser, data, file)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        depth, self._text = len(self._path), ""
        if depth == 0 and tag != "annotations":
            raise UsageError(f"{self._file}: not CVAT for images 1.1: begins with <{tag[:40]}>")
        if depth == 1 and tag == "track":
            raise UsageError(
                f"{self._file}: is CVAT for video; export the task as CVAT for images 1.1"
            )
        if depth == 1 and tag == "image":
            self.starts.append(self._parser.CurrentByteIndex)
            self.names.append(attributes.get("name", ""))
        elif depth == 2 and self._path[1] == "image":
            if tag in _AREAS:
                self.classes.add(attributes.get("label", ""))
            else:
                self.others[tag] += 1
        self._path.append(tag)

    def _end(self, tag: str) -> None:
        if self._path[1:2] == ["meta"] and self._path[-2:] == ["label", "name"]:
            self.classes.add(self._text.strip())
        self._path.pop()

    def _add_text(self, text: str) -> None:
        if self._path[-1:] == ["name"]:
            self._text += text


def open_cvat(file: str, data: bytes) -> Truth:
    """Masks, polygons, boxes and ellipses of every image in the file.

    An image without any has nothing. Other shapes are left out and reported. Raises UsageError for
    what is no such file.
    """
    index = _Index(file, data)
    if not index.starts:
        raise UsageError(f"{file}: not CVAT for images 1.1: no <image> in it")
    if "" in index.names or "" in index.classes:
        raise UsageError(f"{file}: an image without a name, or a label without one")
    ends = [*index.starts[1:], len(data)]

    def read(i: int) -> TruthImage:
        where = f"{file}: image {one_line(index.names[i], 80)}"
        size, shapes = _read_element(data[index.starts[i] : ends[i]], where)
        found = []
        for number, (tag, attributes) in enumerate(shapes):
            of = f"{where}: {tag} {number}"
            rle = _read_mask(attributes, size, of) if tag == "mask" else None
            if rle is None:
                rle = check_polygons([_outline(tag, attributes, of).ravel()], size, of)
            found.append(TruthInstance(name=attributes.get("label", ""), rle=rle))
        return TruthImage(size=size, instances=not_empty(found))

    return Truth(
        source=file,
        classes=sorted(index.classes),
        images=[TruthName(names=(name,)) for name in index.names],
        read=read,
        instances=True,
        notes=tuple(
            f"{n:,} elements <{one_line(tag, 40)}> are left out: no areas"
            for tag, n in sorted(index.others.items())
        ),
    )


def _parser(file: str, start: Any, end: Any) -> Any:
    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler, parser.EndElementHandler = start, end

    def refuse(*_: Any) -> None:
        raise UsageError(f"{file}: has a DOCTYPE, which CVAT does not write; not read")

    parser.StartDoctypeDeclHandler = refuse
    return parser


def _parse(parser: Any, data: bytes, where: str) -> None:
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise UsageError(f"{where}: not valid XML: {one_line(str(error), 120)}") from error


def _read_element(data: bytes, where: str) -> tuple[tuple[int, int], list[Shape]]:
    """The (height, width) of an <image>, and the areas in it; `data` begins with its tag."""
    elements: list[Shape] = []
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        if depth == 0 or (depth == 1 and tag in _AREAS):
            elements.append((tag, attributes))
        depth += 1

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    closed = data.rfind(b"</image>")
    stop = closed + len(b"</image>") if closed >= 0 else data.rfind(b"/>") + len(b"/>")
    _parse(_parser(where, start, end), data[:stop], where)
    (_, image), *shapes = elements
    height, width = _whole([image.get("height"), image.get("width")], where)
    return check_size(height, width, where), shapes


def _whole(values: list[str | None], where: str) -> list[int]:
    found = numbers(values, where)
    if any(value != int(value) for value in found):
        raise UsageError(f"{where}: sizes and places of masks must be whole numbers")
    return [int(value) for value in found]


def _read_mask(attributes: dict[str, str], size: tuple[int, int], where: str) -> dict[str, Any]:
    """A mask: runs of 0 and 1 in turn, row by row, inside its box."""
    names = ("left", "top", "width", "height")
    left, top, width, height = _whole([attributes.get(n) for n in names], where)
    inside = left >= 0 and top >= 0 and width > 0 and height > 0
    if not inside or left + width > size[1] or top + height > size[0]:
        raise UsageError(f"{where}: a mask outside of its image of {size[0]} x {size[1]} px")
    try:
        runs = [int(n) for n in attributes.get("rle", "").split(",")]
    except ValueError:
        runs = [-1]
    if min(runs) < 0 or sum(runs) != width * height:
        raise UsageError(f"{where}: an rle whose runs are not of {height} x {width} px")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask = np.zeros(size[::-1], np.bool_)
    mask[left : left + width, top : top + height] = flat.reshape(height, width).T
    return encode(mask)


def _outline(tag: str, attributes: dict[str, str], where: str) -> np.ndarray:
    """The points (N, 2) x, y around a polygon, box or ellipse."""
    (angle,) = numbers([attributes.get("rotation", "0")], where)
    if tag == "polygon":
        pairs = [pair.split(",") for pair in attributes.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise UsageError(f"{where}: points that are no x,y;x,y")
        return np.array(numbers([n for pair in pairs for n in pair], where)).reshape(-1, 2)
    names = ("xtl", "ytl", "xbr", "ybr") if tag == "box" else ("cx", "cy", "rx", "ry")
    a, b, c, d = numbers([attributes.get(n) for n in names], where)
    if tag == "box":
        return rectangle((a, b, c, d), angle, ((a + c) / 2, (b + d) / 2))
    return ellipse((a, b), (c, d), angle)
