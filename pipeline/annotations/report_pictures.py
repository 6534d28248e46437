"""The pictures of a report: which images, read again from their shards, drawn to fit a budget.

Sizes in pixels; sizes of images are (height, width).
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.annotations.choose import Parts, rows_of, spread
from pipeline.annotations.overlay import ACCENT, decode_mask, draw_overlay, fit
from pipeline.annotations.report_rows import Kind
from pipeline.annotations.report_sample import ORDERS, Candidate, Class
from pipeline.read.shard import Shard
from pipeline.run.images import Images
from pipeline.run.wanted_images import Moved, Place, read_wanted
from pipeline.write.layout import shard_id

SHARDS = 16  # that are read again
SHARD_BYTES = 2**30  # of them together, loose images apart
PICTURES = 160
CLASSES = 24  # with pictures
IN_A_ROW = 4  # of a class in each order
BUDGET_BYTES = 2_300_000  # of all JPEG files: base64 makes a third more of them
_SIDES = (400, 320, 240, 160, 96)  # of the longer side, whichever fits


class Shown(NamedTuple):
    """A picture of an image, for a class."""

    name: str
    place: Place


@dataclass(kw_only=True)
class Row:
    """The table's rows of an image and class."""

    key: str
    size: tuple[int, int] | None
    """Of the image; None where the table does not tell."""
    masks: list[dict[str, Any]] = field(default_factory=list)
    """RLEs."""


def choose_shards(ids: Iterable[str], shards: Collection[Shard]) -> list[Shard]:
    """The shards to read images from: few, and not large together."""
    there = {shard_id(shard.name): shard for shard in shards}
    chosen: list[Shard] = []
    left = SHARD_BYTES
    for id_ in spread([id_ for id_ in ids if id_ in there], SHARDS):
        shard = there[id_]
        read = 0 if shard.format == "images" else shard.size_bytes
        if not chosen or read <= left:
            chosen.append(shard)
            left -= read
    return chosen


def choose_pictures(classes: Sequence[Class]) -> dict[str, dict[str, list[Candidate]]]:
    """Images by class and order; none twice in a class."""
    some = [one for one in classes if any(one.chosen.values())][:CLASSES]
    count = max(1, min(IN_A_ROW, PICTURES // (len(ORDERS) * max(len(some), 1))))
    wanted: dict[str, dict[str, list[Candidate]]] = {}
    for one in some:
        seen: set[Place] = set()
        for order in ORDERS:
            new = [c for c in one.chosen[order] if (c.shard, c.row) not in seen][:count]
            seen |= {(c.shard, c.row) for c in new}
            wanted.setdefault(one.name, {})[order] = new
    return wanted


def read_rows(
    parts: Parts, kind: Kind, wanted: Mapping[str, Mapping[str, Sequence[Candidate]]]
) -> dict[Shown, Row]:
    """The table's rows of the chosen images. Raises JobError, StorageError."""
    rows: dict[str, set[int]] = {}
    names: dict[tuple[str, int], set[str]] = {}
    for name, orders in wanted.items():
        for one in (one for some in orders.values() for one in some):
            rows.setdefault(one.shard_id, set()).add(one.row)
            names.setdefault((one.shard_id, one.row), set()).add(name)
    columns = ["shard", "row", "key", kind.name]
    columns += ["rle", "area", "height", "width"] if kind.has_masks else []
    found: dict[Shown, Row] = {}
    for id_, some in rows.items():
        for uri in parts[id_]:
            for row in rows_of(uri, some, columns):
                name = row[kind.name]
                if name not in names[id_, row["row"]]:
                    continue
                size = (row["height"], row["width"]) if kind.has_masks else None
                new = Row(key=row["key"], size=size)
                here = found.setdefault(Shown(name, (row["shard"], row["row"])), new)
                if row.get("area"):
                    here.masks.append(row["rle"])
    return found


def draw_pictures(
    source: Images,
    shards: Mapping[str, Shard],
    rows: Mapping[Shown, Row],
    colors: Mapping[str, str],
    budget_bytes: int,
    *,
    moved: Moved | None = None,
) -> dict[Shown, bytes | str]:
    """JPEG files with the masks over the images, or why there is none.

    Together they are at most `budget_bytes`.
    """
    by_place: dict[Place, list[Shown]] = {}
    for shown in rows:
        by_place.setdefault(shown.place, []).append(shown)
    room = budget_bytes // max(len(rows), 1)

    def draw(place: Place, image: Image.Image) -> dict[Shown, bytes | str]:
        return {
            shown: _draw(image, rows[shown], colors.get(shown.name, ACCENT), room)
            for shown in by_place[place]
        }

    drawn = read_wanted(source, set(by_place), draw, moved=moved, shards=shards)
    found: dict[Shown, bytes | str] = {}
    for place, some in drawn.items():
        found |= dict.fromkeys(by_place[place], some) if isinstance(some, str) else some
    return found


def draw_thumbnails(
    source: Images,
    shards: Mapping[str, Shard],
    wanted: Sequence[Place],
    budget_bytes: int,
    *,
    moved: Moved | None = None,
) -> dict[Place, bytes | str]:
    """As draw_pictures, of plain images, some of them `wanted` several times."""
    room = budget_bytes // max(len(wanted), 1)
    plain = Row(key="", size=None)
    return read_wanted(
        source,
        set(wanted),
        lambda _, image: _draw(image, plain, ACCENT, room),
        moved=moved,
        shards=shards,
    )


def _draw(image: Image.Image, row: Row, color: str, room: int) -> bytes | str:
    if row.size not in (None, (image.height, image.width)):
        return "another image is there now: its size has changed"
    for side in _SIDES:
        size = fit((image.height, image.width), (side, side))
        drawn = image.resize(size[::-1], Image.Resampling.LANCZOS)
        if row.masks:
            covers = [decode_mask(rle, size) for rle in row.masks]
            drawn = draw_overlay(drawn, np.maximum.reduce(covers), color)
        jpeg = encode(drawn)
        if len(jpeg) <= room:
            return jpeg
    return "left out: the page would be too large with it"


def encode(image: Image.Image) -> bytes:
    """A JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
