"""Finished tables of masks -> the few images worth a look, and their masks.

Columns without the masks themselves decide; of the chosen images alone the masks are read. Of a run
with many shards some are looked at, spread evenly over them.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.write.layout import EMPTY_PART
from pipeline.write.parts import open_part

Sort = Literal["score", "area", "uncertain"]
"""By the largest probability, the share of the image, or nearness of the largest probability to the
threshold; the largest, or nearest, of the prompts counts."""

_AT_ONCE = 8  # shards that are read
_MASKS_AT_ONCE = 256
_COLUMNS = ["shard", "row", "key", "prompt_id", "prompt", "score_max", "threshold", "area"]

Parts = dict[str, list[str]]
"""URIs of the parts of each shard, of all passes, by shard id."""


class Candidate(NamedTuple):
    """An image, and how much it is worth a look."""

    worth: float
    shard_id: str
    shard: str
    row: int
    found: bool
    """Whether any of its masks is not empty."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """One prompt's mask on one image."""

    prompt_id: int
    prompt: str
    rle: dict[str, Any]
    score: float
    """The largest probability, 0..1."""
    share: float
    """Of the image's area that is covered, 0..1."""


@dataclass(kw_only=True)
class ChosenImage:
    """An image with its masks, in the order of their prompts."""

    shard: str
    row: int
    key: str
    size: tuple[int, int]
    """(height, width)."""
    size_bytes: int = 0
    """Of the encoded image; 0: not asked for."""
    masks: list[Mask] = field(default_factory=list)


_NAMED = ("shard", "row", "key", "size_bytes")


def list_parts_by_shard(output: str, table: str) -> Parts:
    """The parts of a table, by the id of their shard, sorted; the part without rows left out."""
    found: Parts = {}
    for file in storage.list_files(storage.join(output, table), recursive=False):
        name = file.uri.rpartition("/")[2]
        if name.endswith(".parquet") and name != EMPTY_PART:
            id_ = name.removesuffix(".parquet").partition(".from-")[0]
            found.setdefault(id_, []).append(file.uri)
    return {id_: sorted(found[id_]) for id_ in sorted(found)}


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def rank_images(
    parts: Parts,
    *,
    sort: Sort,
    limit: int,
    key: str | None = None,
    prompt: str | None = None,
) -> list[Candidate]:
    """The images most worth a look, best first; images with a mask before those without.

    `key`: images of this name alone; `prompt`: by this prompt alone. Raises JobError for a damaged
    part, StorageError.
    """
    asked = {"key": key, "prompt": prompt}
    only = {name: value for name, value in asked.items() if value is not None}

    def rank(pair: tuple[str, list[str]]) -> list[Candidate]:
        found: dict[int, Candidate] = {}
        for uri in pair[1]:
            for one in _rank_part(pair[0], uri, sort, limit, only):
                other = found.get(one.row)
                if other:
                    worth, any_ = max(one.worth, other.worth), one.found or other.found
                    one = one._replace(worth=worth, found=any_)
                found[one.row] = one
        return heapq.nsmallest(limit, found.values(), key=_order)

    best: list[Candidate] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(rank, parts.items()):
            best = heapq.nsmallest(limit, [*best, *found], key=_order)
    return best


def _order(one: Candidate) -> tuple[bool, float, str, int]:
    return (not one.found, -one.worth, one.shard, one.row)


def _rank_part(
    id_: str, uri: str, sort: Sort, limit: int, only: dict[str, str]
) -> Iterator[Candidate]:
    """The best images of each row group of a part; its rows stand in the order of the images.

    `only`: required values of columns.
    """
    with open_part(uri) as parquet:
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, [*_COLUMNS, "rle.size"], use_threads=False)
            for name, value in only.items():
                table = table.filter(pc.equal(table[name], value))
            if not len(table):
                continue
            rows = table["row"].to_numpy()
            worth, area = _worth(table, sort), table["area"].to_numpy()
            starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
            best = np.maximum.reduceat(worth, starts)
            found = np.add.reduceat(area, starts) > 0
            shard = table["shard"][0].as_py()
            # In the order of _order.
            for i in np.lexsort((rows[starts], -best, ~found))[:limit]:
                yield Candidate(float(best[i]), id_, shard, int(rows[starts[i]]), bool(found[i]))


def _worth(table: pa.Table, sort: Sort) -> np.ndarray:
    """(N,) float64, the larger the more worth a look."""
    score = table["score_max"].to_numpy().astype(np.float64)
    if sort == "score":
        return score
    if sort == "uncertain":
        distance: np.ndarray = -np.abs(score - table["threshold"].to_numpy())
        return distance
    return np.asarray(table["area"].to_numpy() / _pixels(table))


def _pixels(table: pa.Table) -> np.ndarray:
    """Pixels of the grid of each mask: the image's, or the model's."""
    sizes = pc.struct_field(table["rle"].combine_chunks(), "size")
    sides = np.asarray(pc.list_flatten(sizes).to_numpy(), np.int64).reshape(-1, 2)
    return np.asarray(sides.prod(axis=1))


def read_chosen(
    chosen: Sequence[Candidate], masks: Parts, images: Parts, *, prompts: Collection[str] = ()
) -> list[ChosenImage]:
    """The chosen images in their order, with the masks of some prompts, or of all.

    Raises JobError, StorageError.
    """
    wanted: dict[str, list[int]] = {}
    for one in chosen:
        wanted.setdefault(one.shard_id, []).append(one.row)

    def read(id_: str) -> dict[tuple[str, int], ChosenImage]:
        rows = wanted[id_]
        found: dict[tuple[str, int], ChosenImage] = {}
        for uri in images.get(id_, []):
            for image in rows_of(uri, rows, [*_NAMED, "height", "width"]):
                size = (image["height"], image["width"])
                named = {name: image[name] for name in _NAMED}
                found[(id_, image["row"])] = ChosenImage(size=size, **named)
        for uri in masks.get(id_, []):
            columns = ["row", "prompt_id", "prompt", "rle", "score_max", "area"]
            for mask in rows_of(uri, rows, columns):
                if (id_, mask["row"]) in found and (not prompts or mask["prompt"] in prompts):
                    found[(id_, mask["row"])].masks.append(_mask(mask))
        return found

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = {k: v for some in pool.map(read, wanted) for k, v in some.items()}
    for image in found.values():
        image.masks.sort(key=lambda mask: mask.prompt_id)
    places = [(one.shard_id, one.row) for one in chosen]
    return [found[place] for place in places if place in found]


def _mask(row: dict[str, Any]) -> Mask:
    height, width = row["rle"]["size"]
    return Mask(
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        rle=row["rle"],
        score=row["score_max"],
        share=row["area"] / max(height * width, 1),
    )


def rows_of(uri: str, rows: Collection[int], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Columns of some rows of a part, by their number, read from their row groups alone."""
    wanted = sorted(rows)
    with open_part(uri) as parquet:
        at = parquet.schema_arrow.names.index("row")  # no column in front of it has several leaves
        groups = []
        for group in range(parquet.num_row_groups):
            known = parquet.metadata.row_group(group).column(at).statistics
            first = bisect.bisect_left(wanted, known.min) if known else 0
            if first < len(wanted) and (not known or wanted[first] <= known.max):
                groups.append(group)
        batches = parquet.iter_batches(
            _MASKS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False
        )
        for batch in batches if groups else ():
            here = pc.is_in(batch["row"], value_set=pa.array(wanted, pa.int64()))
            yield from batch.filter(here).to_pylist()
            if batch["row"][-1].as_py() > wanted[-1]:
                return
