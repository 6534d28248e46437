"""Finished tables -> a picture: a contact sheet of a few images with their masks.

One row per image: the image, then one cell per prompt with its mask over the image, the prompt, the
largest probability and the share of the image. Names and prompts are whatever the data holds, so
only printable text is drawn, cut to its cell.

Sizes in pixels; sizes of images are (height, width).
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import storage
from pipeline.annotations.choose import (
    Candidate,
    ChosenImage,
    Parts,
    list_parts_by_shard,
    rank_images,
    read_chosen,
    spread,
)
from pipeline.annotations.overlay import (
    ACCENT,
    colors_of,
    decode_mask,
    describe_share,
    draw_overlay,
    fit,
)
from pipeline.config.segment import SUFFIXES
from pipeline.errors import RowError
from pipeline.prepare.images import decode_image
from pipeline.read.shard import Shard
from pipeline.read.wanted import read_rows
from pipeline.run.manifest import read_run

CELL_PX = 232
GAP_PX = 16
MARGIN_PX = 28
LINE_PX = 19
MAX_HEIGHT_PX = 320  # of a cell, for tall images

CELL = (MAX_HEIGHT_PX, CELL_PX)
SHARDS = 64  # that images are chosen from
_AT_ONCE = 8
_PAPER, _INK, _FADED = (255, 255, 255), (32, 34, 38), (126, 130, 138)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One prompt's mask on one image."""

    prompt: str
    mask: np.ndarray
    """(h, w) uint8, 0..255: how much of each pixel is covered; stretched over the image."""
    score: float
    """The largest probability, 0..1."""
    share: float
    """Of the image's area that is covered, 0..1."""
    color: str = ACCENT


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One image and its cells."""

    label: str
    size: tuple[int, int]
    image: Image.Image | None
    """RGB, of any size with the aspect of `size`; None when it could not be read."""
    cells: Sequence[Cell]


def write_contact_sheet(
    file: str, output: str, shards: Sequence[Shard], max_pixels: int, total: int
) -> None:
    """Draw the contact sheet of a run into a file, in the format of its suffix.

    `total`: images of the run. Raises StorageError.
    """
    picture = io.BytesIO()
    sheet = contact_sheet(output, shards, max_pixels=max_pixels, total=total)
    sheet.save(picture, SUFFIXES[PurePosixPath(file).suffix.lower()])
    storage.write_bytes(storage.check_uri(file), picture.getvalue())


def contact_sheet(
    output: str,
    shards: Sequence[Shard],
    *,
    max_pixels: int,
    total: int,
    max_images: int = 8,
    max_prompts: int = 6,
) -> Image.Image:
    """Draw a few images with something found, spread over the shards, from the tables in the folder
    `output` and the images in their shards. Unreadable images are grey. The title tells their
    number of `total`, and the prompts left out.

    Holds one decoded image of at most `max_pixels` at a time. Raises StorageError.
    """
    images, masks = (list_parts_by_shard(output, name) for name in ("images", "masks"))
    chosen = read_chosen(_choose(masks, max_images), masks, images)
    chosen.sort(key=lambda image: (image.shard, image.row))
    prompts = _choose_prompts(chosen, max_prompts)
    every = {mask.prompt_id: mask.prompt for image in chosen for mask in image.masks}
    left_out = [prompt for id_, prompt in sorted(every.items()) if id_ not in prompts]
    record = read_run(output) or {}
    return draw_sheet(
        _rows(chosen, shards, max_pixels, prompts, colors_of(record.get("config", {}))),
        title=f"Masks by prompt: {len(chosen):,} of {total:,} images",
        note=f"{len(left_out):,} prompts left out: {', '.join(left_out)}" if left_out else "",
    )


def _choose(masks: Parts, count: int) -> list[Candidate]:
    """The best images of each shard in turn, those with a mask first; of at most SHARDS shards."""

    def rank(id_: str) -> list[Candidate]:
        return rank_images({id_: masks[id_]}, sort="score", limit=count)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        ranked = list(pool.map(rank, spread(list(masks), SHARDS)))
    turns = [(not one.found, i, one) for some in ranked for i, one in enumerate(some)]
    return [one for _, _, one in sorted(turns, key=lambda turn: (*turn[:2], turn[2].shard))][:count]


def _choose_prompts(images: Sequence[ChosenImage], count: int) -> set[int]:
    """The ids of the prompts found most often in these images; of equal ones the first."""
    found: Counter[int] = Counter()
    for mask in (mask for image in images for mask in image.masks):
        found[mask.prompt_id] += mask.share > 0
    return set(sorted(found, key=lambda id_: (-found[id_], id_))[:count])


def _rows(
    chosen: Sequence[ChosenImage],
    shards: Sequence[Shard],
    max_pixels: int,
    prompts: set[int],
    colors: dict[str, str],
) -> Iterator[SheetRow]:
    by_name = {shard.name: shard for shard in shards}
    for name, some in groupby(chosen, key=lambda image: image.shard):
        of_shard = {image.row: image for image in some}
        shown = _thumbnails(by_name[name], set(of_shard), max_pixels) if name in by_name else {}
        for row, image in of_shard.items():
            cells = [
                Cell(
                    prompt=m.prompt,
                    mask=decode_mask(m.rle, fit(image.size, CELL)),
                    score=m.score,
                    share=m.share,
                    color=colors.get(m.prompt, ACCENT),
                )
                for m in image.masks
                if m.prompt_id in prompts
            ]
            yield SheetRow(label=image.key, size=image.size, image=shown.get(row), cells=cells)


def _thumbnails(shard: Shard, rows: set[int], max_pixels: int) -> dict[int, Image.Image]:
    """The wanted rows as far as readable, at the cell's size; reads no further than needed."""
    found: dict[int, Image.Image] = {}
    for row, sample in read_rows(shard, rows):
        with contextlib.suppress(RowError):
            image = decode_image(sample.image, max_pixels=max_pixels).image
            found[row] = image.resize(fit((image.height, image.width), CELL)[::-1])
    return found


def draw_sheet(rows: Iterable[SheetRow], *, title: str, note: str = "") -> Image.Image:
    """An RGB picture of the rows under a title and a note."""
    strips = [_draw_row(row) for row in rows]
    if not strips:
        strips = [_note("no images", (MAX_HEIGHT_PX // 2, CELL_PX * 2))]
    width = max(strip.width for strip in strips) + 2 * MARGIN_PX
    top = MARGIN_PX + (3 if note else 2) * LINE_PX
    height = top + sum(strip.height + GAP_PX for strip in strips) - GAP_PX + MARGIN_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    _text(sheet, (MARGIN_PX, MARGIN_PX - 6), title, width=width - 2 * MARGIN_PX, size=20)
    _text(sheet, (MARGIN_PX, MARGIN_PX + 22), note, width=width - 2 * MARGIN_PX, faded=True)
    for strip in strips:
        sheet.paste(strip, (MARGIN_PX, top))
        top += strip.height + GAP_PX
    return sheet


def _draw_row(row: SheetRow) -> Image.Image:
    height, width = fit(row.size, CELL)
    columns = 1 + len(row.cells)
    strip_size = (columns * (CELL_PX + GAP_PX) - GAP_PX, height + 6 + 2 * LINE_PX)
    strip = Image.new("RGB", strip_size, _PAPER)
    image = _note("", (height, width)) if row.image is None else row.image.resize((width, height))
    strip.paste(_note("not available", (height, width)) if row.image is None else image, (0, 0))
    top = height + 6
    _text(strip, (0, top), row.label)
    _text(
        strip, (0, top + LINE_PX), f"{row.size[0]} x {row.size[1]} px (height x width)", faded=True
    )
    for i, cell in enumerate(row.cells):
        left = (i + 1) * (CELL_PX + GAP_PX)
        strip.paste(draw_overlay(image, cell.mask, cell.color), (left, 0))
        _text(strip, (left, top), cell.prompt)
        of = " of the image" if cell.share > 0 else ""
        said = f"p {cell.score:.2f}, {describe_share(cell.share)}{of}"
        _text(strip, (left, top + LINE_PX), said, faded=True)
    return strip


def _note(text: str, size: tuple[int, int]) -> Image.Image:
    """A grey picture of `size` with the reason for the missing image."""
    height, width = size
    picture = Image.new("RGB", (width, height), (232, 233, 236))
    _text(picture, (10, max(0, height // 2 - LINE_PX // 2)), text, width=width - 20, faded=True)
    return picture


def _text(
    picture: Image.Image,
    at: tuple[int, int],
    text: str,
    *,
    width: int = CELL_PX,
    size: int = 14,
    faded: bool = False,
) -> None:
    """One line of text, printable characters only, cut with an ellipsis to `width` pixels."""
    # Wide enough for a cell of the narrowest letters; measuring megabytes would take minutes.
    text = "".join(c if c.isprintable() else " " for c in text[:300]).strip()
    font = ImageFont.load_default(size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text = text.rstrip() + "..."
    ImageDraw.Draw(picture).text(at, text, font=font, fill=_FADED if faded else _INK)
