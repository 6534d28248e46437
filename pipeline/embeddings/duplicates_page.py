"""Groups of near-duplicates -> a page to look at before any is deleted, the one kept first.

Keys and shards are hostile: see annotations/html.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.annotations.html import cell, escape_text, make_page
from pipeline.embeddings.duplicates import Duplicates
from pipeline.embeddings.gallery import read_thumbnails, show_thumbnail
from pipeline.run.images import Images

GROUPS = 200  # on the page
MEMBERS = 12  # of a group

Member = dict[str, Any]
"""A row of duplicates.DUPLICATES."""


def write_duplicates(file: str, found: Duplicates, cosine: float, images: Images) -> None:
    """Write the page of the groups into an HTML file. Raises StorageError."""
    groups = choose_groups(found.read())
    wanted = {(one["shard"], one["row"]) for _, members in groups for one in members}
    page = draw_duplicates(found, groups, cosine, read_thumbnails(images, wanted))
    storage.write_bytes(storage.check_uri(file), page.encode())


def choose_groups(tables: Iterable[pa.Table]) -> list[tuple[int, list[Member]]]:
    """The groups least alike, by the smallest cosine to their first member.

    Each with its size, its first member and the MEMBERS - 1 least like it; groups in memory are
    those on the page.
    """
    best: list[tuple[float, int, int, list[Member]]] = []  # a heap, the most alike on top
    for number, size, members in _groups(tables):
        entry = (-members[1]["cosine"], -number, size, members)
        if len(best) < GROUPS:
            heapq.heappush(best, entry)
        else:
            heapq.heappushpop(best, entry)
    return [(size, members) for *_, size, members in sorted(best, reverse=True)]


def _groups(tables: Iterable[pa.Table]) -> Iterator[tuple[int, int, list[Member]]]:
    """Number, size, and the members for the page: the first, then those least like it."""
    for table in tables:  # a group is never parted
        ends = table["group"].to_numpy()
        start = 0
        while start < len(table):
            end = int(ends.searchsorted(ends[start], side="right"))
            others = table.slice(start + 1, end - start - 1)
            near = others.sort_by("cosine").slice(0, MEMBERS - 1).to_pylist()
            yield int(ends[start]), end - start, [*table.slice(start, 1).to_pylist(), *near]
            start = end


def draw_duplicates(
    found: Duplicates,
    groups: list[tuple[int, list[Member]]],
    cosine: float,
    thumbnails: dict[tuple[str, int], bytes | str],
) -> str:
    """The page; `thumbnails` are JPEG files, or say why there is none, by shard and row."""
    every = len(found.sizes)
    said = (
        f"{found.rows:,} of {len(found.roots):,} images are in {every:,} groups of a cosine of at "
        f"least {cosine:g}; with the first of each kept, {found.kept:,} remain."
    )
    which = "The least alike first" if len(groups) == every else f"The {len(groups):,} least alike"
    parts = [f"<h1>Near-duplicates</h1>\n<p>{said} {which}; cosines are to the one kept.</p>"]
    for size, members in groups:
        cells = []
        for i, one in enumerate(members):
            inside = show_thumbnail((one["shard"], one["row"]), one["key"], thumbnails)
            beside = "kept" if not i else f"{one['cosine']:.4f}"
            below = (one["shard"], f"row {one['row']}")
            cells.append(cell(inside, one["key"], beside, below, strong=not i))
        more = f", {size - len(members):,} not shown" if size > len(members) else ""
        title = escape_text(members[0]["key"], 80)
        parts.append(f"<h2>{title}</h2>\n<p>{size:,} images{more}</p>")
        parts.append(f"<ol>\n{''.join(cells)}</ol>")
    return make_page("Near-duplicates", "\n".join(parts))
