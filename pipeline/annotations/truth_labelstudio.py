"""Ground truth out of Label Studio's JSON export. Held in memory."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any
from urllib.parse import unquote

import numpy as np

from pipeline.annotations.truth import (
    Truth,
    TruthImage,
    TruthInstance,
    check_polygons,
    check_size,
    encode,
    name_of,
    not_empty,
)
from pipeline.annotations.truth_shapes import ellipse, numbers, rectangle
from pipeline.errors import UsageError, one_line

_SIZES_AT, _HEAD_BITS = 37, 53  # of its RLE: see annotations.labelstudio
_KINDS = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")
"""Types of results that give an area its class; the last one where the tool is apart (Brush)."""


def open_labelstudio(file: str, content: list[Any]) -> Truth:
    """Tasks of Label Studio with annotations: brush, polygon, rectangle and ellipse labels.

    Of a task with several annotations the last counts; tasks without any, and results other than
    areas of a class, are left out and reported.
    """
    tasks, results, unlabelled = [], [], 0
    others: Counter[str] = Counter()
    for task in content:
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise UsageError(f"{file}: neither COCO instances nor tasks of Label Studio")
        result = _last_result(task, file)
        if result is None:
            unlabelled += 1
            continue
        tasks.append(task["data"])
        results.append([r for r in result if _labels(r)])
        others.update(str(r.get("type")) for r in result if _is_lost(r))
    if not tasks:
        raise UsageError(
            f"{file}: no task has an annotation; export them from Label Studio as JSON"
        )
    classes = sorted({label for found in results for r in found for label in _labels(r)})

    def read(index: int) -> TruthImage:
        where = f"{file}: task of {one_line(names[index].names[0], 80)}"
        return _read_image(results[index], where)

    names = [name_of(data, _urls(data), file) for data in tasks]
    notes = [f"{unlabelled:,} tasks without an annotation are left out"] if unlabelled else []
    notes += [
        f"{n:,} results of type {one_line(kind, 40)} are left out: no area of a class"
        for kind, n in sorted(others.items())
    ]
    return Truth(
        source=file,
        classes=classes,
        images=names,
        read=read,
        instances=True,
        notes=tuple(notes),
    )


def _last_result(task: dict[str, Any], file: str) -> list[dict[str, Any]] | None:
    """The results of the last annotation not cancelled; None without one."""
    wrong = UsageError(f"{file}: annotations that are not as Label Studio exports them")
    annotations = task.get("annotations") or []
    if not isinstance(annotations, list):
        raise wrong
    done = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
    if not done:
        return None
    result = done[-1].get("result") or []
    if not isinstance(result, list) or not all(isinstance(r, dict) for r in result):
        raise wrong
    return result


def _labels(result: dict[str, Any]) -> list[str]:
    """The classes of an area; none for another result, or an area without a class."""
    value, kind = result.get("value"), result.get("type")
    found = value.get(kind) if isinstance(value, dict) and kind in _KINDS else None
    shown = isinstance(value, dict) and any(
        n in value for n in ("rle", "points", "width", "radiusX")
    )
    return list(map(str, found)) if shown and isinstance(found, list) else []


def _is_lost(result: dict[str, Any]) -> bool:
    """Whether a result says something and is not read. A tool's own result stands beside the
    labels' one."""
    tools = ("brush", "polygon", "rectangle", "ellipse")
    return not _labels(result) and result.get("type") not in tools


def _read_image(results: list[dict[str, Any]], where: str) -> TruthImage:
    sizes = [(r.get("original_height"), r.get("original_width")) for r in results]
    if not sizes:  # nothing is there, and nobody says how large the image is
        return TruthImage(size=(0, 0), instances=())
    size = check_size(*sizes[0], where)
    if any(each != size for each in sizes):
        raise UsageError(f"{where}: results of several sizes")
    if any(r.get("image_rotation") for r in results):
        raise UsageError(f"{where}: was turned in Label Studio; turn it back there")
    found = []
    for r in results:
        rle = _read_shape(r["value"], size, where)
        found += [TruthInstance(name=label, rle=rle) for label in _labels(r)]
    return TruthImage(size=size, instances=not_empty(found))


def _read_shape(value: dict[str, Any], size: tuple[int, int], where: str) -> dict[str, Any]:
    """The RLE of an area; all but brushes are in percent of the image's sides."""
    if "rle" in value:
        return encode(np.ascontiguousarray(decode_brush(value["rle"], size, where).T))
    across, down = size[1] / 100, size[0] / 100
    if "points" in value:
        try:
            points = np.array(value["points"], np.float64).reshape(-1, 2) * [across, down]
        except (ValueError, TypeError) as error:
            raise UsageError(f"{where}: a polygon whose points are no [x, y]") from error
        return check_polygons([points.ravel()], size, where)
    names = (
        ("x", "y", "radiusX", "radiusY") if "radiusX" in value else ("x", "y", "width", "height")
    )
    x, y, a, b = numbers([value.get(n) for n in names], where)
    (angle,) = numbers([value.get("rotation") or 0], where)
    x, y, a, b = x * across, y * down, a * across, b * down
    if "radiusX" in value:
        points = ellipse((x, y), (a, b), angle)
    else:  # turned around its upper left corner
        points = rectangle((x, y, x + a, y + b), angle, (x, y))
    return check_polygons([points.ravel()], size, where)


def _urls(data: dict[str, Any]) -> list[str]:
    """The paths in what a task names, without server, query and escapes."""
    paths = []
    for name, value in data.items():
        if isinstance(value, str) and name not in ("shard", "key", "member"):
            path = value.partition("?d=")[2] or value.partition("?")[0]
            paths.append(re.sub(r"^\w+://[^/]*/", "", unquote(path)))
    return paths


def decode_brush(rle: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """The mask (H, W) bool in Label Studio's RLE (see annotations.labelstudio), by its alpha.

    Raises UsageError if it is of another size.
    """
    total = size[0] * size[1] * 4
    wrong = UsageError(f"{where}: a brush mask that is no RLE of {size[0]} x {size[1]} px")
    try:
        text = "".join(f"{byte:08b}" for byte in bytes(rle))
    except (ValueError, TypeError) as error:
        raise wrong from error
    if len(text) < _HEAD_BITS or int(text[:32], 2) != total:
        raise wrong
    word = int(text[32:_SIZES_AT], 2) + 1
    head = text[_SIZES_AT:_HEAD_BITS]
    sizes = [int(head[i : i + 4], 2) + 1 for i in range(0, 16, 4)]
    pixels = np.zeros(total, np.uint8)
    at, done = _HEAD_BITS, 0
    while done < total:
        bits = sizes[int(text[at + 1 : at + 3] or "0", 2)]
        length = int(text[at + 3 : at + 3 + bits] or "0", 2) + 1
        start, repeated = at + 3 + bits, text[at : at + 1] == "1"
        at = start + word * (1 if repeated else length)
        if at > len(text) or done + length > total:
            raise wrong
        if repeated:
            pixels[done : done + length] = int(text[start:at], 2) >> max(0, word - 8)
        else:
            values = [int(text[i : i + word], 2) for i in range(start, at, word)]
            pixels[done : done + length] = np.array(values) >> max(0, word - 8)
        done += length
    return pixels.reshape(*size, 4)[..., 3] > 0
