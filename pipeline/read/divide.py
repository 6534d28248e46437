"""Inputs -> shards: Parquet files by row groups, loose images by groups of one folder."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, groupby, pairwise

from pipeline import storage
from pipeline.errors import CredentialsError, RowError, StorageError, TransientError, UsageError
from pipeline.read.columns import find_image_column, holds_text, list_columns, list_urls
from pipeline.read.parquet import Footer, RowGroup, read_footer
from pipeline.read.recognize import Named
from pipeline.read.shard import (
    TEXT_EXTENSIONS,
    Shard,
    file_format,
    image_key,
    name_rows,
    printable,
    split_wanted,
)
from pipeline.storage import FileInfo

GROUP_FILES = 256  # loose images per shard; part of a run's identity, so never an option
# A larger Parquet file is several shards of about this size: what is lost with a worker, and what
# one worker does alone, stays small. It decides their names, so it is no option either.
SPLIT_BYTES = 256 * 2**20
WITHOUT_IMAGES = "Parquet without a column of images"
_FOOTERS_AT_ONCE = 32


def whole_file(name: str, file: FileInfo, column: str = "") -> Shard:
    """One tar or Parquet file as one shard."""
    return Shard(
        name=printable(name),
        uri=file.uri,
        format=file_format(name),
        size_bytes=file.size_bytes,
        version=file.version,
        column=column,
    )


# -------------------------------------------------------------------------------- Parquet


def divide_parquet(
    named: Named, wanted: str | None, text: str | None, *, alone: bool
) -> tuple[list[Shard], list[tuple[str, str]]]:
    """The shards of Parquet files, and (kind, name) of those without images.

    Every footer is read, 32 at a time, for the image column is each file's own: on S3 two requests
    a file. `alone`: the input is nothing but these: one of them must hold images.
    Raises UsageError if none does, and if none of those has the column `text`.
    """
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        footers = list(pool.map(lambda pair: _try_footer(pair[1]), named))
    shards: list[Shard] = []
    without: list[tuple[FileInfo, Footer]] = []
    lacking: list[tuple[FileInfo, Footer]] = []
    left: list[tuple[str, str]] = []
    texts = 0
    for (name, file), footer in zip(named, footers, strict=True):
        column = find_image_column(footer.schema, wanted) if footer else wanted or ""
        if footer and column is None:
            without.append((file, footer))
            left.append((WITHOUT_IMAGES, name))
            continue
        if footer and text:
            texts += holds_text(footer.schema, text)
            lacking += [] if holds_text(footer.schema, text) else [(file, footer)]
        shard = whole_file(name, file, column or "")
        if footer:
            shard = replace(shard, rows=sum(group.rows for group in footer.groups))
        large = footer and file.size_bytes > SPLIT_BYTES
        shards += _split_by(footer.groups, shard) if footer and large else [shard]
    if alone and not shards and without:
        raise UsageError(_no_images(*without[0], wanted))
    if lacking and not texts:
        file, footer = lacking[0]
        name, phrases = split_wanted(str(text))
        option = "--prompt-column" if phrases else "--text-column"
        raise UsageError(
            f"{file.uri}: no column {name!r} of text ({option}); "
            f"it has {list_columns(footer.schema)}"
        )
    return shards, left


def _try_footer(file: FileInfo) -> Footer | None:
    """Read a footer; None if it is damaged: reading the shard will report it.

    Only transient faults are raised: the names of shards must not depend on them.
    """
    if not file.version:
        return None
    try:
        return read_footer(file.uri, file.version)
    except (CredentialsError, TransientError):
        raise
    except (StorageError, RowError):
        return None


def _no_images(file: FileInfo, footer: Footer, wanted: str | None) -> str:
    what = f"no column {wanted!r} with image bytes" if wanted else "no column of image bytes"
    urls = list_urls(footer.schema)
    if urls and not wanted:
        return (
            f"{file.uri}: {what}; {', '.join(urls)} names URLs, which are not fetched: download "
            f"the images first, for example with img2dataset; it has {list_columns(footer.schema)}"
        )
    advice = "name one with --image-column"
    return f"{file.uri}: {what}: {advice}; it has {list_columns(footer.schema)}"


def _split_by(groups: list[RowGroup], shard: Shard) -> list[Shard]:
    """Divide a file: row groups with their middle in the same n-th part of it are one shard.

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
            rows=rows[stop] - rows[start],
        )
        for start, stop in pairwise(starts)
    ]


# --------------------------------------------------------------------------- loose images


def group_images(root: str, named: Named, texts: dict[str, FileInfo]) -> Iterator[Shard]:
    """Groups of at most GROUP_FILES within a folder: a new file never moves those of another.

    `texts`: possible files of texts, by name. The version covers the images, and what of `texts`
    stands beside them.
    """
    folders: dict[str, Named] = defaultdict(list)
    for name, file in named:
        folders[name[: name.rfind("/") + 1]].append((name, file))
    for folder, members in folders.items():
        for index, start in enumerate(range(0, len(members), GROUP_FILES)):
            group = members[start : start + GROUP_FILES]
            wanted = [f"{image_key(n)}.{e}" for n, _ in group for e in TEXT_EXTENSIONS]
            read = [*group, *((name, texts[name]) for name in wanted if name in texts)]
            lines = [f"{name}\0{file.size_bytes}\0{file.version}\n" for name, file in read]
            digest = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape"))
            yield Shard(
                name=printable(f"{folder}images-{index:05d}"),
                uri=root,
                format="images",
                size_bytes=sum(file.size_bytes for _, file in group),
                version=digest.hexdigest(),
                files=tuple(name for name, _ in group),
                rows=len(group),
                listed=tuple((name, file.version) for name, file in read),
            )


def list_texts(root: str, files: list[FileInfo]) -> dict[str, FileInfo]:
    """Candidate files for the texts of loose images, by their names below the root."""
    suffixes = tuple(f".{extension}" for extension in TEXT_EXTENSIONS)
    regular = (file for file in files if file.version != storage.SPECIAL)
    return {storage.relative(root, f.uri): f for f in regular if f.uri.endswith(suffixes)}
