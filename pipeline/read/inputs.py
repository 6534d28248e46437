"""Input (file, folder, glob, braces) -> a sorted list of shards.

Only listings, the footers of Parquet files, and the first bytes of files of unknown suffixes are
read; tars and images with their usual suffixes need no request each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from pipeline import storage
from pipeline.errors import UsageError
from pipeline.read.divide import divide_parquet, group_images, list_texts, whole_file
from pipeline.read.recognize import LeftOut, Named, count_left_out, describe_left_out, sort_files
from pipeline.read.shard import Shard, file_format
from pipeline.storage import FileInfo
from pipeline.storage.braces import expand_braces
from pipeline.storage.uri import common_folder, split_list

_FOLDERS_AT_ONCE = 16
_MAGIC = re.compile(r"[*?\[{]")
_WANTED = "tar, Parquet or image files"


class Listing(NamedTuple):
    """Contents of an input."""

    shards: list[Shard]
    left_out: dict[str, LeftOut]
    """Files that are no inputs, by kind (see describe_left_out)."""


def list_shards(
    source: str,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    member_suffix: str | None = None,
    strict: bool = False,
) -> Listing:
    """List the shards of an input, sorted by name, and the files left out.

    `source`: a tar, Parquet or image file, a folder, a glob, or braces such as `{0000..0099}.tar`,
    local or `s3://`; several joined by `::`. Missing shards named by braces stay in the list, to be
    reported. `image_column`: the Parquet column with the images; found by name when None.
    `text_column`: the text to read with each image, if any: a Parquet column, or what
    shard.find_text finds beside it. `member_suffix`: the extension of a tar's image members; every
    image when None. `strict`: leaving anything out is an error.
    Raises UsageError without anything to read, StorageError if storage fails.
    """
    source = storage.check_uri(source)
    found = [_find_files(part) for part in split_list(source)]
    root = common_folder([part.root for part in found]) if len(found) > 1 else found[0].root
    sorted_parts = [sort_files(p.root, p.files, by_name=p.by_name) for p in found]
    by_format = {
        kind: _name_files(root, (file for inputs, _ in sorted_parts for file in inputs[kind]))
        for kind in ("tar", "parquet", "images")
    }
    left = [
        (kind, storage.relative(root, file.uri)) for _, some in sorted_parts for kind, file in some
    ]
    if not any(by_format.values()):
        raise UsageError(_nothing_found(source, count_left_out(left)))
    images = by_format["images"]
    shards, without = divide_parquet(
        by_format["parquet"], image_column, text_column, alone=not (by_format["tar"] or images)
    )
    inside = {file.uri: part.root for part in found if part.whole for file in part.files}
    shards = [replace(shard, inside=inside.get(shard.uri, "")) for shard in shards]
    shards += [whole_file(name, file) for name, file in by_format["tar"]]
    shards += group_images(root, images, _find_texts(root, found, images) if text_column else {})
    left_out = count_left_out([*left, *without])
    if strict and left_out:
        raise UsageError(f"{source}: {describe_left_out(left_out)} (--strict)")
    suffix = (member_suffix or "").lower().strip(".")
    shards = [replace(s, text=text_column or "", member_suffix=suffix) for s in shards]
    shards.sort(key=lambda shard: shard.name)
    for one, other in pairwise(shards):
        if one.name == other.name:  # of one the results would be lost
            raise UsageError(f"{source}: two names in it are both shown as {one.name}: rename one")
    return Listing(shards, left_out)


def _name_files(root: str, files: Iterable[FileInfo]) -> Named:
    """Files with their names below the root, sorted, each once."""
    found = {storage.relative(root, file.uri): file for file in files}
    return sorted(found.items(), key=lambda pair: pair[0])


# ------------------------------------------------------------------------------ find files


class _Found(NamedTuple):
    """Files of one source."""

    root: str
    """Names are relative to this folder."""
    files: list[FileInfo]
    whole: bool = False
    """Whether these are all files below the root."""
    by_name: bool = False
    """Whether the user named this one file; it may then be hidden."""


def _find_files(source: str) -> _Found:
    """Find the files of a source. Raises UsageError if there are none."""
    magic = _MAGIC.search(source)
    if magic and not storage.exists(source):
        root = storage.parent(source[: magic.start()] + "x")
        braces = "{" in source
        files = _match_braces(source) if braces else storage.glob_files(source, special=True)
        found = _Found(root, files)
    elif file_format(source) and storage.is_file(source):
        return _one_file(source)
    else:
        found = _Found(source, storage.list_files(source, special=True), whole=True)
    if not found.files and storage.is_file(source):
        return _one_file(source)
    if not found.files:
        raise UsageError(_not_there(source))
    return found


def _one_file(source: str) -> _Found:
    return _Found(storage.parent(source), [storage.stat_file(source)], by_name=True)


def _match_braces(source: str) -> list[FileInfo]:
    """Files named by braces; missing ones keep their place, with size 0, version ""."""
    found: dict[str, FileInfo] = {}
    listed: dict[str, dict[str, FileInfo]] = {}
    for uri in expand_braces(source):
        if re.search(r"[*?\[]", uri):
            found.update((file.uri, file) for file in storage.glob_files(uri, special=True))
        elif file_format(uri):
            folder = storage.parent(uri)
            if folder not in listed:
                files = storage.list_files(folder, recursive=False)
                listed[folder] = {file.uri: file for file in files}
            missing = FileInfo(uri=uri, size_bytes=0, version="")
            found[uri] = listed[folder].get(uri, missing)
        else:
            files = storage.list_files(uri, special=True)
            if not files and storage.is_file(uri):
                files = [storage.stat_file(uri)]
            if not files:
                raise UsageError(f"{uri}: nothing is there; it is named by {source}")
            found.update((file.uri, file) for file in files)
    return list(found.values()) if any(file.version for file in found.values()) else []


def _find_texts(root: str, found: list[_Found], images: Named) -> dict[str, FileInfo]:
    """Candidate files for the texts of loose images, by their names below the root."""
    files = [file for part in found for file in part.files]
    if not all(part.whole for part in found):  # a pattern may not match the texts beside its images
        folders = sorted({storage.parent(file.uri) for _, file in images})
        with ThreadPoolExecutor(_FOLDERS_AT_ONCE) as pool:
            listed = pool.map(lambda folder: storage.list_files(folder, recursive=False), folders)
            files = [file for some in listed for file in some]
    return list_texts(root, files)


# ------------------------------------------------------------------------------- say why not


def _nothing_found(source: str, left_out: dict[str, LeftOut]) -> str:
    """Files are there, and none is an input."""
    count = sum(found.files for found in left_out.values())
    kinds = sorted(left_out, key=lambda kind: (-left_out[kind].files, kind))
    seen = ", ".join(kinds[:5])
    if count == 1 and storage.is_file(source):
        what = "not a tar, Parquet or image file, by its name or its first bytes"
        return f"{source}: {what} ({seen}): rename it, or name another"
    return f"{source}: no {_WANTED} among its {count:,} files ({seen}): name their folder"


def _not_there(source: str) -> str:
    if storage.exists(source):
        return f"{source}: the folder is empty: name one that holds {_WANTED}"
    magic = _MAGIC.search(source)
    nearest = storage.parent(source[: magic.start()] + "x" if magic else source)
    while not storage.exists(nearest) and storage.parent(nearest) != nearest:
        nearest = storage.parent(nearest)
    what = "matches nothing" if magic else "no such file or folder"
    several = " (join several by ::)" if re.search(r",(s3://|/)", source) else ""
    return f"{source}: {what}{several}: the nearest folder that exists is {nearest}"
