"""Ground truth out of JSON: COCO instances, and exports of Label Studio. Held in memory."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

import numpy as np

from pipeline.annotations.truth import (
    Truth,
    TruthImage,
    TruthInstance,
    TruthName,
    check_polygons,
    check_rle,
    check_size,
    encode,
)
from pipeline.errors import UsageError, one_line

_SIZES_AT, _HEAD_BITS = 37, 53  # of Label Studio's RLE: see annotations.labelstudio


def open_coco(file: str, content: dict[str, Any]) -> Truth:
    """COCO instances: polygons, RLE compressed or not. Crowds are pixels of their class."""
    names = {_id(c, file): str(c.get("name")) for c in _entries(content, "categories", file)}
    images = _entries(content, "images", file)
    place = {_id(image, file): i for i, image in enumerate(images)}
    if len(place) < len(images):
        raise UsageError(f"{file}: two of its images have one id")
    objects: list[list[dict[str, Any]]] = [[] for _ in images]
    for each in _entries(content, "annotations", file):
        where = f"{file}: annotation {one_line(str(each.get('id')), 40)}"
        if each.get("image_id") not in place or each.get("category_id") not in names:
            raise UsageError(f"{where}: its image_id or category_id is not in the file")
        objects[place[each["image_id"]]].append(each)

    def read(index: int) -> TruthImage:
        image = images[index]
        named = one_line(str(image.get("file_name")), 80)
        where = f"{file}: image {named}"
        size = check_size(image.get("height"), image.get("width"), where)
        found = []
        for each in objects[index]:
            of = f"{where}: annotation {one_line(str(each.get('id')), 40)}"
            shape = each.get("segmentation")
            if isinstance(shape, dict):
                rle = check_rle(shape, size, of)
            elif isinstance(shape, list) and shape:
                rle = check_polygons(shape, size, of)
            else:
                raise UsageError(f"{of}: has no segmentation; boxes alone are no ground truth")
            crowd = bool(each.get("iscrowd"))
            found.append(TruthInstance(name=names[each["category_id"]], rle=rle, crowd=crowd))
        return TruthImage(size=size, instances=tuple(found))

    named = [_name_of(image, [str(image.get("file_name"))], file) for image in images]
    return Truth(source=file, classes=list(names.values()), images=named, read=read, instances=True)


def _name_of(known: dict[str, Any], names: list[str], file: str) -> TruthName:
    """Our own exports tell shard, row, key and member as well."""
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


def _entries(content: dict[str, Any], name: str, file: str) -> list[dict[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise UsageError(f"{file}: not COCO instances: it needs a list of {name}")
    return entries


def _id(entry: dict[str, Any], file: str) -> Any:
    found = entry.get("id")
    if not isinstance(found, (int, str)):
        raise UsageError(f"{file}: not COCO instances: an entry without an id")
    return found


def open_labelstudio(file: str, content: list[Any]) -> Truth:
    """Tasks of Label Studio with annotations: brush and polygon labels.

    Of a task with several annotations the last counts; tasks without any are left out.
    """
    tasks, results, unlabelled = [], [], 0
    for task in content:
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise UsageError(f"{file}: neither COCO instances nor tasks of Label Studio")
        done = [
            a
            for a in task.get("annotations") or []
            if isinstance(a, dict) and not a.get("was_cancelled")
        ]
        if not done:
            unlabelled += 1
            continue
        result = done[-1].get("result") or []
        tasks.append(task["data"])
        results.append([r for r in result if isinstance(r, dict) and _labels(r)])
    if not tasks:
        raise UsageError(
            f"{file}: no task has an annotation; export them from Label Studio as JSON"
        )
    classes = sorted({label for found in results for r in found for label in _labels(r)})

    def read(index: int) -> TruthImage:
        where = f"{file}: task of {names[index].names[0]}"
        sizes = {(r.get("original_height"), r.get("original_width")) for r in results[index]}
        if len(sizes) > 1:
            raise UsageError(f"{where}: results of several sizes")
        if not sizes:  # nothing is there, and nobody says how large the image is
            return TruthImage(size=(0, 0), instances=())
        size = check_size(*sizes.pop(), where)
        found = [
            TruthInstance(name=label, rle=_read_shape(r["value"], size, where))
            for r in results[index]
            for label in _labels(r)
        ]
        return TruthImage(size=size, instances=tuple(found))

    names = [_name_of(data, _urls(data), file) for data in tasks]
    notes = (f"{unlabelled:,} tasks without an annotation are left out",) if unlabelled else ()
    return Truth(source=file, classes=classes, images=names, read=read, instances=True, notes=notes)


def _labels(result: dict[str, Any]) -> list[str]:
    value = result.get("value")
    found = value.get(result.get("type")) if isinstance(value, dict) else None
    kinds = ("brushlabels", "polygonlabels")
    return list(map(str, found)) if result.get("type") in kinds and isinstance(found, list) else []


def _urls(data: dict[str, Any]) -> list[str]:
    """The paths in what a task names, without server, query and escapes."""
    paths = []
    for name, value in data.items():
        if isinstance(value, str) and name not in ("shard", "key", "member"):
            path = value.partition("?d=")[2] or value.partition("?")[0]
            paths.append(re.sub(r"^\w+://[^/]*/", "", unquote(path)))
    return paths


def _read_shape(value: dict[str, Any], size: tuple[int, int], where: str) -> dict[str, Any]:
    if "rle" in value:
        return encode(np.ascontiguousarray(decode_brush(value["rle"], size, where).T))
    points = np.array(value.get("points", []), np.float64).reshape(-1, 2)  # percent
    return check_polygons([(points * [size[1] / 100, size[0] / 100]).ravel()], size, where)


def decode_brush(rle: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """The mask (H, W) bool in Label Studio's RLE (see annotations.labelstudio), by its alpha.

    Raises UsageError where it is not of this size.
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
