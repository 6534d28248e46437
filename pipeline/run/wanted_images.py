"""A few images of a finished run, decoded again for whoever wants to look at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from PIL import Image

from pipeline.errors import CredentialsError, PipelineError, RowError
from pipeline.prepare.images import decode_image
from pipeline.read.shard import Sample, Shard
from pipeline.read.wanted import read_rows
from pipeline.run.images import Images, find_shards, is_unchanged

SHARDS_AT_ONCE = 4
GONE = "the input is not there any more"

T = TypeVar("T")
Place = tuple[str, int]
"""Shard and row."""


def read_wanted(
    images: Images,
    wanted: set[Place],
    draw: Callable[[Place, Image.Image], T],
    *,
    moved_to: str | None = None,
    shards: Mapping[str, Shard] | None = None,
) -> dict[Place, T | str]:
    """`draw` of each wanted image; for each that cannot be had, the reason.

    Only shards with wanted images are read, each once and no further than its last. `moved_to`: the
    input's place now; there a shard counts as unchanged whatever its version. `shards`: those of
    the input by name, if known already. Raises CredentialsError: that is no fault of an image.
    """
    if shards is None:
        shards = list_there(images, moved_to)
    if not shards:
        return dict.fromkeys(wanted, GONE)
    rows: dict[str, set[int]] = {}
    for shard, row in wanted:
        rows.setdefault(shard, set()).add(row)

    def read(name: str) -> dict[Place, T | str]:
        found: dict[int, T | str] = dict.fromkeys(rows[name], "not in its shard any more")
        if name not in shards:
            found = dict.fromkeys(rows[name], "the shard is not there any more")
        elif not moved_to and not is_unchanged(images, shards[name]):
            found = dict.fromkeys(rows[name], "the shard has changed since")
        else:
            for row, sample in read_rows(shards[name], rows[name]):
                image = _decode(sample, images.max_pixels)
                found[row] = image if isinstance(image, str) else draw((name, row), image)
        return {(name, row): drawn for row, drawn in found.items()}

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        return {k: v for found in pool.map(read, sorted(rows)) for k, v in found.items()}


def list_there(images: Images, moved_to: str | None = None) -> dict[str, Shard]:
    """The shards that are there now, by name; none where the input is gone.

    Raises CredentialsError.
    """
    try:
        return find_shards(replace(images, source=moved_to) if moved_to else images)
    except CredentialsError:
        raise
    except PipelineError:
        return {}


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
    """The texts of the wanted images, of those that have one: see list_shards' text_column."""
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
