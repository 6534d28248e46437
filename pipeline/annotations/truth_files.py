"""Ground truth in Parquet and in folders of PNGs, read image by image; and the kind of a path."""

from __future__ import annotations

import io
import json
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.annotations.truth import (
    Truth,
    TruthImage,
    TruthInstance,
    TruthName,
    check_rle,
    check_size,
    encode,
    not_empty,
)
from pipeline.annotations.truth_coco import open_coco
from pipeline.annotations.truth_cvat import open_cvat
from pipeline.annotations.truth_labelstudio import open_labelstudio
from pipeline.errors import StorageError, UsageError, one_line
from pipeline.storage import FileInfo
from pipeline.write.parts import open_part, read_part

_LIMIT_WHOLE_BYTES = 2**31
_LIMIT_PNG_BYTES = 2**28
_LIMIT_LIST_BYTES = 2**23
_NAMES = ("file_name", "member", "key")
_CLASSES = ("class", "prompt", "label")
_HELD_BYTES = 2**28  # of row groups: all that an image needs, where each has another class
_MODES = ("L", "P", "1", "I;16", "I")
VOID = 255
_KNOWN = "COCO .json, Label Studio .json, CVAT .xml, masks .parquet, or a folder of PNGs"


def open_truth(source: str) -> Truth:
    """Ground truth of any kind. Raises UsageError for a path of no kind, or a malformed one."""
    uri = storage.check_uri(source)
    try:
        if uri.lower().endswith(".json"):
            return _open_json(uri)
        if uri.lower().endswith(".xml"):
            return open_cvat(uri, _read_whole(uri))
        if uri.lower().endswith(".parquet"):
            return open_parquet(uri, [uri])
        files = storage.list_files(uri)
    except StorageError as error:
        raise UsageError(f"--ground-truth {uri}: cannot be read ({error})") from error
    parts = [f.uri for f in files if f.uri.endswith(".parquet") and "/_" not in f.uri]
    pngs = [f for f in files if f.uri.lower().endswith(".png")]
    if pngs:
        return open_pngs(uri, files)
    if parts:
        return open_parquet(uri, parts)
    raise UsageError(f"--ground-truth {uri}: none of {_KNOWN}")


def _open_json(uri: str) -> Truth:
    try:
        content = json.loads(_read_whole(uri))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{uri}: not valid JSON: {str(error)[:200]}") from error
    if isinstance(content, dict):
        return open_coco(uri, content)
    if isinstance(content, list):
        return open_labelstudio(uri, content)
    raise UsageError(f"--ground-truth {uri}: none of {_KNOWN}")


def _read_whole(uri: str) -> bytes:
    data = storage.read_bytes(uri, limit_bytes=_LIMIT_WHOLE_BYTES + 1)
    if len(data) > _LIMIT_WHOLE_BYTES:
        raise UsageError(f"{uri}: larger than 2 GiB; give the truth as Parquet")
    return data


def open_parquet(source: str, parts: list[str]) -> Truth:
    """A row for each mask: `rle` (COCO's), `class`, `prompt` or `label`, and names of the image.

    The names are `shard` with `row`, or one of `file_name`, `member`, `key`. An empty mask stands
    for an absent class. Row groups are read as they are needed; of each row 4 bytes are held.
    """
    index: dict[tuple[Any, ...], int] = {}
    groups: list[tuple[str, int, np.ndarray]] = []
    of_image: dict[int, list[int]] = defaultdict(list)
    classes: set[str] = set()
    for part in parts:
        with open_part(part) as parquet:
            columns = parquet.schema_arrow.names
            by = [n for n in ("shard", "row", *_NAMES) if n in columns]
            kind = next((n for n in _CLASSES if n in columns), None)
            if kind is None or "rle" not in columns or not by:
                raise UsageError(
                    f"{part}: ground truth needs the columns rle, one of {', '.join(_CLASSES)}, "
                    f"and shard and row, or one of {', '.join(_NAMES)}"
                )
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, [*by, kind], use_threads=False)
                rows = zip(*(table[n].to_pylist() for n in by), strict=True)
                numbers = [
                    index.setdefault(tuple(zip(by, row, strict=True)), len(index)) for row in rows
                ]
                classes.update(map(str, table[kind].unique().to_pylist()))
                for image in set(numbers):
                    of_image[image].append(len(groups))
                groups.append((part, group, np.array(numbers, np.int32)))
    read_group = _hold(lambda i: _read_group(*groups[i][:2]))

    def read(image: int) -> TruthImage:
        found, size = [], None
        for number in of_image[image]:
            of_row = groups[number][2]
            table = read_group(number)
            for i in np.flatnonzero(of_row == image).tolist():
                name, rle = str(table[0][i].as_py()), table[1][i].as_py()
                where = f"{source}: {name!r} of {_names(images[image])}"
                if not isinstance(rle, dict) or len(rle.get("size") or ()) != 2:
                    raise UsageError(f"{where}: its rle has no size")
                size = check_size(rle["size"][0], rle["size"][1], where) if size is None else size
                checked = check_rle(rle, size, where)
                found.append(TruthInstance(name=name, rle=checked))
        return TruthImage(size=size or (0, 0), instances=not_empty(found))

    images = [_row_name(dict(key)) for key in index]
    return Truth(source=source, classes=sorted(classes), images=images, read=read, instances=True)


def _read_group(part: str, group: int) -> list[Any]:
    with open_part(part) as parquet:
        kind = next(n for n in _CLASSES if n in parquet.schema_arrow.names)
        table = parquet.read_row_group(group, [kind, "rle"], use_threads=False)
        return [table[kind], table["rle"]]


def _hold(read: Callable[[int], list[Any]]) -> Callable[[int], list[Any]]:
    """Hold the last results of a function, columns of tables, up to _HELD_BYTES together."""
    held: OrderedDict[int, list[Any]] = OrderedDict()

    def get(number: int) -> list[Any]:
        if number not in held:
            found = read(number)
            sizes = [sum(column.nbytes for column in each) for each in (*held.values(), found)]
            while held and sum(sizes) > _HELD_BYTES:
                held.popitem(last=False)
                del sizes[0]
            held[number] = found
        held.move_to_end(number)
        return held[number]

    return get


def _row_name(known: dict[str, Any]) -> TruthName:
    names = tuple(str(known[n]) for n in _NAMES if known.get(n))
    whole = known.get("shard") is not None and known.get("row") is not None
    shard, row = (str(known["shard"]), int(known["row"])) if whole else (None, None)
    return TruthName(names=names or (f"{shard} row {row}",), shard=shard, row=row)


def _names(image: TruthName) -> str:
    return one_line(image.names[0], 80)


def open_pngs(folder: str, files: list[FileInfo]) -> Truth:
    """Maps with a number a pixel, beside classes.json or labelmap.txt as `export` writes them; or
    one folder for each class, with a mask for each image, 0 elsewhere."""
    listed = [storage.relative(folder, file.uri) for file in files]
    pngs = [name for name in listed if name.lower().endswith(".png")]
    for place in ("masks", "SegmentationClass"):
        pngs = [n for n in pngs if f"/{place}/" in f"/{n}"] or pngs
    known = _exported_names(folder, listed)
    numbers = _class_numbers(folder, listed)
    if numbers is not None:
        void, values = numbers
        images = [_png_name(name, known) for name in pngs]

        def read_map(index: int) -> TruthImage:
            pixels = _read_png(storage.join(folder, pngs[index]))
            found = [
                TruthInstance(name=name, rle=encode(pixels == value))
                for value, name in values.items()
                if (pixels == value).any()
            ]
            size = (pixels.shape[1], pixels.shape[0])
            return TruthImage(size=size, instances=tuple(found), void=pixels == void)

        return Truth(
            source=folder,
            classes=list(values.values()),
            images=images,
            read=read_map,
            instances=False,
        )
    of_image: dict[str, dict[str, str]] = defaultdict(dict)
    for name in pngs:
        above, _, image = name.partition("/")
        if not image:
            raise UsageError(
                f"{folder}: {one_line(name, 80)}: no classes.json or labelmap.txt tells its "
                "numbers; or put the masks of each class into a folder of its name"
            )
        of_image[image][above] = name
    stems = list(of_image)

    def read_masks(index: int) -> TruthImage:
        found, size = [], None
        for name, file in of_image[stems[index]].items():
            pixels = _read_png(storage.join(folder, file))
            if size not in (None, (pixels.shape[1], pixels.shape[0])):
                raise UsageError(f"{folder}: {one_line(file, 80)}: of another size than its like")
            size = (pixels.shape[1], pixels.shape[0])
            mask = pixels > (127 if pixels.max() > 1 else 0)
            if mask.any():
                found.append(TruthInstance(name=name, rle=encode(mask)))
        return TruthImage(size=size or (0, 0), instances=tuple(found))

    return Truth(
        source=folder,
        classes=sorted({name for found in of_image.values() for name in found}),
        images=[TruthName(names=(name,)) for name in stems],
        read=read_masks,
        instances=False,
    )


def _class_numbers(folder: str, listed: list[str]) -> tuple[int, dict[int, str]] | None:
    """The void number, and the class of each other; None if no file tells them."""
    above = storage.parent(folder)
    for name in ("classes.json", "labelmap.txt"):
        uri = storage.join(folder if name in listed else above, name)
        if name not in listed and not storage.is_file(uri):
            continue
        text = storage.read_bytes(uri, limit_bytes=_LIMIT_LIST_BYTES).decode("utf-8-sig", "replace")
        if name == "labelmap.txt":
            lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
            return VOID, {i: n.partition(":")[0] for i, n in enumerate(lines) if i}
        try:
            content = json.loads(text)
            return int(content.get("void", VOID)), {
                int(c["value"]): str(c["name"]) for c in content["classes"]
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f'{uri}: needs {{"classes": [{{"value": 1, "name": ...}}]}}'
            ) from error
    return None


def _exported_names(folder: str, listed: list[str]) -> dict[str, TruthName]:
    """Of an export of ours the shard, row and key of each file, by its name without ending."""
    known = {}
    columns = ["file_name", "shard", "row", "key", "member"]
    for name in listed:
        if name.startswith("_images-") and name.endswith(".parquet"):
            for row in read_part(storage.join(folder, name), columns).to_pylist():
                known[row["file_name"].rpartition(".")[0]] = _row_name(row)
    return known


def _png_name(name: str, known: dict[str, TruthName]) -> TruthName:
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return known.get(stem) or TruthName(names=(name,))


def _read_png(uri: str) -> np.ndarray:
    """(W, H) of one channel; raises UsageError."""
    try:
        data = storage.read_bytes(uri, limit_bytes=_LIMIT_PNG_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                check_size(image.height, image.width, uri)
                if image.mode not in _MODES:
                    raise UsageError(f"{uri}: has colours; a mask has one channel")
                return np.ascontiguousarray(np.asarray(image).T)
    except (OSError, ValueError, SyntaxError, StorageError, Image.DecompressionBombError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{uri}: cannot be read as PNG ({one_line(str(error))})") from error
