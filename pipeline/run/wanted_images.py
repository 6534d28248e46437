"""A few images of a finished run, decoded again for whoever wants to look at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from PIL import Image

from pipeline.errors import CredentialsError, PipelineError, RowError
from pipeline.prepare.images import decode_image
from pipeline.read.shard import Sample, Shard
from pipeline.read.wanted import read_rows
from pipeline.run.images import Images, find_shards, is_unchanged
from pipeline.run.moved import compare_moved

SHARDS_AT_ONCE = 4
GONE = "the input is not there any more"

T = TypeVar("T")
Place = tuple[str, int]
"""Shard and row."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The new place of an input moved since the run."""

    to: str
    known: Mapping[Place, tuple[str, int]] | None = None
    """Key and encoded bytes of the wanted images, from the run's tables; None: not compared."""
    doubted: list[str] = field(default_factory=list)
    """Filled with the names of shards that may be others: see run.moved."""


def read_wanted(
    images: Images,
    wanted: set[Place],
    draw: Callable[[Place, Image.Image], T],
    *,
    moved: Moved | None = None,
    shards: Mapping[str, Shard] | None = None,
) -> dict[Place, T | str]:
    """`draw` of each wanted image, or the reason why there is none.

    Only shards with wanted images are read, each once and no further than its last. `moved`: the
    input is elsewhere now, and is held against what is known of it. `shards`: those of the input by
    name, if known already. Raises CredentialsError: no fault of an image.
    """
    if shards is None:
        shards = list_there(images, moved.to if moved else None)
    if not shards:
        return dict.fromkeys(wanted, GONE)
    rows: dict[str, set[int]] = {}
    for shard, row in wanted:
        rows.setdefault(shard, set()).add(row)

    def read(name: str) -> dict[Place, T | str]:
        found: dict[int, T | str] = dict.fromkeys(rows[name], "not in its shard any more")
        if name not in shards:
            found = dict.fromkeys(rows[name], "the shard is not there any more")
        elif why := _why_not(images, shards[name], moved):
            found = dict.fromkeys(rows[name], why)
        else:
            for row, sample in read_rows(shards[name], rows[name]):
                image = _decode(sample, images.max_pixels)
                known = moved.known if moved else None
                if known is not None and known.get((name, row)) != (sample.key, len(sample.image)):
                    image = "another image is there now: its name or bytes have changed"
                found[row] = image if isinstance(image, str) else draw((name, row), image)
        return {(name, row): drawn for row, drawn in found.items()}

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        return {k: v for found in pool.map(read, sorted(rows)) for k, v in found.items()}


def list_there(images: Images, moved_to: str | None = None) -> dict[str, Shard]:
    """The shards there now, by name; none if the input is gone.

    Raises CredentialsError.
    """
    try:
        return find_shards(replace(images, source=moved_to) if moved_to else images)
    except CredentialsError:
        raise
    except PipelineError:
        return {}


def _why_not(images: Images, shard: Shard, moved: Moved | None) -> str:
    """Why the shard is not the one read by the run; "" if it is."""
    if moved is None:
        return "" if is_unchanged(images, shard) else "the shard has changed since"
    why, proved = compare_moved(images, shard)
    if not why and not proved:
        moved.doubted.append(shard.name)
    return why


def _decode(sample: Sample, max_pixels: int) -> Image.Image | str:
    """The upright image, or why there is none."""
    if sample.reason:
        return "the image cannot be read any more"
    try:
        return decode_image(sample.image, max_pixels=max_pixels).image
    except RowError:
        return "the image cannot be decoded"


def read_captions(
    images: Images, wanted: set[Place], column: str, moved_to: str | None = None
) -> dict[Place, str]:
    """The texts of the wanted images, of those with one: see list_shards' text_column."""
    source = replace(images, source=moved_to or images.source, text_column=column)
    rows: dict[str, set[int]] = {}
    for shard, row in wanted:
        rows.setdefault(shard, set()).add(row)
    try:
        shards = find_shards(source, texts=True)
    except CredentialsError:
        raise
    except PipelineError:
        return {}
    return {
        (name, row): sample.text
        for name, some in rows.items()
        if name in shards
        for row, sample in read_rows(shards[name], some)
        if sample.text
    }
