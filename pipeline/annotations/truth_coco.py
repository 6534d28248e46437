"""Ground truth out of COCO instances. Held in memory."""

from __future__ import annotations

from typing import Any

from pipeline.annotations.truth import (
    Truth,
    TruthImage,
    TruthInstance,
    check_polygons,
    check_rle,
    check_size,
    name_of,
)
from pipeline.errors import UsageError, one_line


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
        ids = (each.get("image_id"), each.get("category_id"))
        plain = all(isinstance(i, (int, str)) for i in ids)
        if not plain or ids[0] not in place or ids[1] not in names:
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

    named = [name_of(image, [str(image.get("file_name"))], file) for image in images]
    return Truth(source=file, classes=list(names.values()), images=named, read=read, instances=True)


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
