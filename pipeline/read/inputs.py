"""From what the user names (file, folder, glob, braces) to the plan: a sorted list of shards.

Only listings are read, the schema of one Parquet file, and the footers of large ones; other
objects need no request each.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, groupby, pairwise

from pipeline import storage
from pipeline.errors import (
    ChangedError,
    CredentialsError,
    NotFoundError,
    RowError,
    StorageError,
    TransientError,
    UsageError,
)
from pipeline.read.parquet import (
    RowGroup,
    find_image_column,
    holds_text,
    list_columns,
    read_row_groups,
    read_schema,
)
from pipeline.read.shard import (
    TEXT_EXTENSIONS,
    Shard,
    file_format,
    name_rows,
    printable,
    strip_suffix,
)
from pipeline.storage import Stored
from pipeline.storage.braces import expand_braces

GROUP_FILES = 256  # loose images per shard; part of a run's identity, so never an option
# A larger Parquet file is several shards of about this size: what is lost with a worker, and what
# one worker does alone, stays small. It decides their names, so it is no option either.
SPLIT_BYTES = 256 * 2**20
_FOOTERS_AT_ONCE = _FOLDERS_AT_ONCE = 16
_SCHEMA_TRIES = 8  # Parquet files looked at for a readable schema

_TEXT_SUFFIXES = tuple(f".{extension}" for extension in TEXT_EXTENSIONS)
_MAGIC = re.compile(r"[*?\[{]")
_Named = list[tuple[str, Stored]]  # (path relative to the root, file)


def plan_shards(
    source: str, *, image_column: str | None = None, text_column: str | None = None
) -> list[Shard]:
    """The shards of an input, sorted by name.

    `source`: a tar or Parquet file, a folder, a glob, or braces such as `{0000..0099}.tar`, local
    or `s3://`. Shards named by braces stay in the plan when they are missing, so that they are
    reported. `image_column`: the Parquet column with the images; found by name when None.
    `text_column`: the text to read with each image, if any: a Parquet column, or what
    shard.find_text finds beside it.
    Raises UsageError where nothing can be read, StorageError where storage fails.
    """
    source = storage.check_uri(source)
    root, files = _find_files(source)
    named = _keep_inputs(root, files)
    if not named:
        raise UsageError(_nothing_found(source, files))
    by_format: dict[str, _Named] = {"tar": [], "parquet": [], "images": []}
    for name, file in named:
        by_format[file_format(name)].append((name, file))
    parquet = [file for _, file in by_format["parquet"]]
    column = _find_column(parquet, image_column, text_column)
    shards = [_whole_file(name, file) for name, file in by_format["tar"]]
    shards += _split_large([_whole_file(n, file, column) for n, file in by_format["parquet"]])
    images = by_format["images"]
    texts = _find_texts(source, root, files, images) if text_column else {}
    shards += _group_images(root, images, texts)
    shards = [replace(shard, text=text_column or "") for shard in shards]
    shards.sort(key=lambda shard: shard.name)
    for one, other in pairwise(shards):
        if one.name == other.name:  # of one the results would be lost
            raise UsageError(f"{source}: two names in it are both shown as {one.name}: rename one")
    return shards


# ------------------------------------------------------------------------------ find files


def _find_files(source: str) -> tuple[str, list[Stored]]:
    """The folder that names are relative to, and the files below it that `source` stands for."""
    magic = _MAGIC.search(source)
    if magic and not storage.exists(source):
        root = storage.parent(source[: magic.start()] + "x")
        files = _match_braces(source) if "{" in source else storage.glob_files(source)
    elif file_format(source) and storage.is_file(source):
        return storage.parent(source), [storage.stat_file(source)]
    else:
        root, files = source, storage.list_files(source)
    start = len(root.rstrip("/")) + 1
    return root, [file for file in files if not _is_scratch(file.uri[start:])]


def _match_braces(source: str) -> list[Stored]:
    """Files named by braces; those that are not there keep their place, with size 0, version ""."""
    found: dict[str, Stored] = {}
    listed: dict[str, dict[str, Stored]] = {}
    for uri in expand_braces(source):
        if re.search(r"[*?\[]", uri):
            found.update((file.uri, file) for file in storage.glob_files(uri))
        elif file_format(uri):
            folder = storage.parent(uri)
            if folder not in listed:
                files = storage.list_files(folder, recursive=False)
                listed[folder] = {file.uri: file for file in files}
            missing = Stored(uri=uri, size_bytes=0, version="")
            found[uri] = listed[folder].get(uri, missing)
        else:
            files = storage.list_files(uri)
            if not files:
                raise UsageError(f"{uri}: nothing is there; it is named by {source}")
            found.update((file.uri, file) for file in files)
    return list(found.values()) if any(file.version for file in found.values()) else []


# ---------------------------------------------------------------------------- choose inputs


def _keep_inputs(root: str, files: list[Stored]) -> _Named:
    """Tars, Parquet and images by name, without metadata that stands beside a shard.

    img2dataset writes 00000.parquet beside 00000.tar or the folder 00000/.
    """
    start = len(root.rstrip("/")) + 1
    named = sorted(((file.uri[start:], file) for file in files), key=lambda pair: pair[0])
    named = [pair for pair in named if file_format(pair[0])]
    owners: set[str] = set()
    for name, _ in named:
        if file_format(name) == "tar":
            owners.add(strip_suffix(name))
        elif file_format(name) == "images":
            parts = name.split("/")[:-1]
            owners.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return [
        (n, f) for n, f in named if file_format(n) != "parquet" or strip_suffix(n) not in owners
    ]


def _is_scratch(name: str) -> bool:
    """Hidden, or beginning with "_" (_SUCCESS, _staging/).

    Cameras write images named _MG_1.JPG, beside which _MG_1.txt may hold a text.
    """
    *folders, last = name.split("/")
    if any(part.startswith((".", "_")) for part in folders) or last.startswith("."):
        return True
    plain = file_format(last) == "images" or last.endswith(_TEXT_SUFFIXES)
    return last.startswith("_") and not plain


def _find_column(files: list[Stored], wanted: str | None, text: str | None) -> str:
    """The image column, by the schema of the first Parquet file that can be opened."""
    for file in [file for file in files if file.version][:_SCHEMA_TRIES]:
        try:
            schema = read_schema(file.uri)
        except (RowError, NotFoundError, ChangedError):
            continue  # reported when the shard is read
        found = find_image_column(schema, wanted)
        if text and not holds_text(schema, text):
            raise UsageError(
                f"{file.uri}: no column {text!r} of text (--text-column); "
                f"it has {list_columns(schema)}"
            )
        if found:
            return found
        what = f"no column {wanted!r} with image bytes" if wanted else "no column of image bytes"
        raise UsageError(
            f"{file.uri}: {what}: name one with --image-column; it has {list_columns(schema)}"
        )
    return wanted or ""


def _nothing_found(source: str, files: list[Stored]) -> str:
    wanted = "tar, Parquet or image files"
    if files:
        kinds = Counter(os.path.splitext(file.uri)[1] or "no suffix" for file in files)
        seen = ", ".join(kind for kind, _ in kinds.most_common(5))
        return f"{source}: no {wanted} among its {len(files):,} files ({seen}): name their folder"
    if storage.exists(source):
        if storage.is_file(source):
            return f"{source}: not a tar, Parquet or image file by its name: rename it"
        return f"{source}: the folder is empty: name one that holds {wanted}"
    magic = _MAGIC.search(source)
    nearest = storage.parent(source[: magic.start()] + "x" if magic else source)
    while not storage.exists(nearest) and storage.parent(nearest) != nearest:
        nearest = storage.parent(nearest)
    what = "matches nothing" if magic else "no such file or folder"
    return f"{source}: {what}: the nearest folder that exists is {nearest}"


# ------------------------------------------------------------------------------ make shards


def _whole_file(name: str, file: Stored, column: str = "") -> Shard:
    return Shard(
        name=printable(name),
        uri=file.uri,
        format=file_format(name),
        size_bytes=file.size_bytes,
        version=file.version,
        column=column,
    )


def _split_large(files: list[Shard]) -> list[Shard]:
    """Parquet files, those of more than SPLIT_BYTES by row groups."""
    large = [file for file in files if file.size_bytes > SPLIT_BYTES]
    shards = [file for file in files if file.size_bytes <= SPLIT_BYTES]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return shards + [shard for split in pool.map(_split, large) for shard in split]


def _split(shard: Shard) -> list[Shard]:
    """The shards of a large Parquet file; the file as one where its footer does not split it.

    Only what may pass is raised, not recorded: the names of shards must not depend on it.
    """
    try:
        groups = read_row_groups(shard.uri, shard.version)
    except (CredentialsError, TransientError):
        raise
    except (StorageError, RowError):
        return [shard]  # reported when the shard is read
    return _split_by(groups, shard)


def _split_by(groups: list[RowGroup], shard: Shard) -> list[Shard]:
    """Row groups whose middle is in the same n-th part of the file are one shard.

    The sizes add up to the file's: what the footer says, scaled.
    """
    parts = -(-shard.size_bytes // SPLIT_BYTES)
    rows = [0, *accumulate(group.rows for group in groups)]
    seen = [0, *accumulate(group.size_bytes for group in groups)]
    total = max(seen[-1], 1)
    ends = [shard.size_bytes * size // total for size in seen]
    filled = [index for index, group in enumerate(groups) if group.rows]
    middles = [sum(pair) * parts // (2 * total) for pair in pairwise(seen)]
    runs = [list(run) for _, run in groupby(filled, middles.__getitem__)]
    if len(runs) < 2:
        return [shard]
    starts = [0, *(run[0] for run in runs[1:]), len(groups)]
    return [
        replace(
            shard,
            name=name_rows(shard.name, rows[start], rows[stop], rows[-1]),
            size_bytes=ends[stop] - ends[start],
            first_row_group=start,
            row_groups=stop - start,
        )
        for start, stop in pairwise(starts)
    ]


def _find_texts(source: str, root: str, files: list[Stored], images: _Named) -> dict[str, Stored]:
    """The files in which the texts of loose images may be, by their paths relative to the root."""
    if source != root:  # one file or a pattern, which may not match the texts beside its images
        folders = sorted({storage.parent(file.uri) for _, file in images})
        with ThreadPoolExecutor(_FOLDERS_AT_ONCE) as pool:
            listed = pool.map(lambda folder: storage.list_files(folder, recursive=False), folders)
            files = [file for found in listed for file in found]
    start = len(root.rstrip("/")) + 1
    return {file.uri[start:]: file for file in files if file.uri.endswith(_TEXT_SUFFIXES)}


def _group_images(root: str, named: _Named, texts: dict[str, Stored]) -> Iterator[Shard]:
    """Groups of at most GROUP_FILES within a folder: a new file never moves those of another.

    The version covers the images, and what of `texts` stands beside them.
    """
    folders: dict[str, _Named] = defaultdict(list)
    for name, file in named:
        folders[name.rpartition("/")[0]].append((name, file))
    for folder, members in folders.items():
        for index, start in enumerate(range(0, len(members), GROUP_FILES)):
            group = members[start : start + GROUP_FILES]
            stems = [name.rpartition(".")[0] for name, _ in group]
            beside = [(t, texts[t]) for s in stems for e in _TEXT_SUFFIXES if (t := s + e) in texts]
            read = [*group, *beside]
            lines = [f"{name}\0{file.size_bytes}\0{file.version}\n" for name, file in read]
            digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape"))
            group_name = f"images-{index:05d}"
            yield Shard(
                name=printable(f"{folder}/{group_name}" if folder else group_name),
                uri=root,
                format="images",
                size_bytes=sum(file.size_bytes for _, file in group),
                version=digest.hexdigest(),
                files=tuple(name for name, _ in group),
            )
