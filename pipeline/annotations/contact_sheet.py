"""Finished tables -> a picture: a contact sheet of a few images with their masks.

One row per image: the image, then one cell per prompt with its mask over the image, the prompt, the
largest probability and the share of the image. Names and prompts are whatever the data holds, so
only printable text is drawn, cut to its cell.

Sizes in pixels; sizes of images are (height, width).
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco

from pipeline import storage
from pipeline.errors import RowError
from pipeline.prepare.images import decode_image
from pipeline.read.shard import Shard
from pipeline.read.wanted import read_rows
from pipeline.write.layout import shard_id
from pipeline.write.parts import open_part

CELL_PX = 232
GAP_PX = 16
MARGIN_PX = 28
LINE_PX = 19
MAX_HEIGHT_PX = 320  # of a cell, for tall images

_MASKS_AT_ONCE = 256
_PAPER, _INK, _FADED = (255, 255, 255), (32, 34, 38), (126, 130, 138)
# One accent for every mask that the ontology gives no colour: a colour per prompt would be read as
# the colour of what was found.
_ACCENT = "#e20074"


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
    color: str = _ACCENT
    """Of tint and outline: #rrggbb."""


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One image and its cells."""

    label: str
    size: tuple[int, int]
    image: Image.Image | None
    """RGB, of any size with the aspect of `size`; None when it could not be read."""
    cells: Sequence[Cell]


def contact_sheet(
    output: str,
    shards: Sequence[Shard],
    *,
    max_pixels: int,
    max_images: int = 8,
    max_prompts: int = 6,
    colors: Mapping[str, str] = MappingProxyType({}),
) -> Image.Image:
    """Draw the first images of a few shards, evenly spread over the input, from the tables in the
    folder `output` and the images in their shards. Images that cannot be read (any more) are grey.

    `colors`: #rrggbb of the masks of a prompt, by its name. Holds one decoded image of at most
    `max_pixels` at a time. Raises StorageError.
    """
    rows = _rows_of_output(output, shards, max_pixels, max_images, max_prompts)
    colored = (
        replace(row, cells=[replace(c, color=colors.get(c.prompt, c.color)) for c in row.cells])
        for row in rows
    )
    return draw_sheet(colored, title="Masks by prompt")


def write_contact_sheet(
    file: str, output: str, shards: Sequence[Shard], max_pixels: int, colors: Mapping[str, str]
) -> None:
    """Draw the contact sheet of a run into a PNG file."""
    picture = io.BytesIO()
    contact_sheet(output, shards, max_pixels=max_pixels, colors=colors).save(picture, "PNG")
    storage.write_bytes(storage.check_uri(file), picture.getvalue())


def draw_sheet(rows: Iterable[SheetRow], *, title: str) -> Image.Image:
    """An RGB picture of the rows under a title."""
    strips = [_draw_row(row) for row in rows]
    if not strips:
        strips = [_note("no images", (MAX_HEIGHT_PX // 2, CELL_PX * 2))]
    width = max(strip.width for strip in strips) + 2 * MARGIN_PX
    top = MARGIN_PX + 2 * LINE_PX
    height = top + sum(strip.height + GAP_PX for strip in strips) - GAP_PX + MARGIN_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    _text(sheet, (MARGIN_PX, MARGIN_PX - 6), title, width=width - 2 * MARGIN_PX, size=20)
    for strip in strips:
        sheet.paste(strip, (MARGIN_PX, top))
        top += strip.height + GAP_PX
    return sheet


def _rows_of_output(
    output: str, shards: Sequence[Shard], max_pixels: int, max_images: int, max_prompts: int
) -> Iterator[SheetRow]:
    parts = {
        table: [file.uri for file in storage.list_files(storage.join(output, table))]
        for table in ("images", "masks")
    }
    chosen = _spread(shards, max_images)
    left = max_images
    for i, shard in enumerate(chosen):
        quota = -(-left // (len(chosen) - i))
        images = _first_images(_parts_of(parts["images"], shard), quota)
        masks: dict[int, list[dict[str, Any]]] = {row: [] for row in images}
        for uri in _parts_of(parts["masks"], shard):
            for mask in _masks_of(uri, list(images), max_prompts):
                masks[mask["row"]].append(mask)
        for row, thumbnail in _thumbnails(shard, set(images), max_pixels):
            yield _sheet_row(images[row], masks[row], thumbnail)
        left -= len(images)


def _spread(shards: Sequence[Shard], count: int) -> list[Shard]:
    if len(shards) <= count:
        return list(shards)
    return [shards[i * len(shards) // count] for i in range(count)]


def _parts_of(uris: list[str], shard: Shard) -> list[str]:
    """The parts that this shard left behind: all have its id at the start of their names."""
    return sorted(uri for uri in uris if uri.rpartition("/")[2].startswith(shard_id(shard.name)))


def _first_images(uris: list[str], count: int) -> dict[int, dict[str, Any]]:
    """Up to `count` rows of the table of images, by row."""
    found: dict[int, dict[str, Any]] = {}
    for uri in uris:
        with open_part(uri) as parquet:
            columns = ["row", "key", "height", "width"]
            batches = parquet.iter_batches(batch_size=count, columns=columns, use_threads=False)
            for image in next(batches).to_pylist() if count else []:
                if len(found) < count:
                    found[image["row"]] = image
    return found


def _masks_of(uri: str, rows: Collection[int], max_prompts: int) -> Iterator[dict[str, Any]]:
    """A part is in the order of its rows: what comes after the last one wanted is not read."""
    with open_part(uri) as parquet:
        for batch in parquet.iter_batches(_MASKS_AT_ONCE, use_threads=False) if rows else ():
            wanted = pc.is_in(batch["row"], value_set=pa.array(rows, pa.int64()))
            early = pc.less(batch["prompt_id"], max_prompts)
            yield from batch.filter(pc.and_(wanted, early)).to_pylist()
            if batch["row"][-1].as_py() > max(rows):
                return


def _thumbnails(
    shard: Shard, rows: set[int], max_pixels: int
) -> Iterator[tuple[int, Image.Image | None]]:
    """Each wanted row with its image at the cell's size, or None; reads no further than needed."""
    missing = set(rows)
    for row, sample in read_rows(shard, rows):
        missing.remove(row)
        try:
            image = decode_image(sample.image, max_pixels=max_pixels).image
        except RowError:
            yield row, None
        else:
            yield row, image.resize(_fit(image.height, image.width)[::-1])
    yield from ((row, None) for row in sorted(missing))


def _sheet_row(
    image: dict[str, Any], masks: list[dict[str, Any]], thumbnail: Image.Image | None
) -> SheetRow:
    size = _fit(image["height"], image["width"])
    cells = [
        Cell(
            prompt=m["prompt"],
            mask=_decode_mask(m["rle"], size),
            score=m["score_max"],
            share=m["area"] / math.prod(m["rle"]["size"]),
        )
        for m in sorted(masks, key=lambda m: m["prompt_id"])
    ]
    return SheetRow(
        label=image["key"], size=(image["height"], image["width"]), image=thumbnail, cells=cells
    )


def _decode_mask(rle: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask at another size: (h, w) uint8, 0..255."""
    with warnings.catch_warnings():
        # pycocotools 2.0.11 makes its array in numpy 1's way.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        mask = Image.fromarray(coco.decode(rle) * np.uint8(255))
    return np.asarray(mask.resize(size[::-1], Image.Resampling.BOX))


def _fit(height: int, width: int) -> tuple[int, int]:
    """The largest size of the same aspect inside a cell."""
    scale = min(CELL_PX / width, MAX_HEIGHT_PX / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _draw_row(row: SheetRow) -> Image.Image:
    height, width = _fit(*row.size)
    columns = 1 + len(row.cells)
    strip_size = (columns * (CELL_PX + GAP_PX) - GAP_PX, height + 6 + 2 * LINE_PX)
    strip = Image.new("RGB", strip_size, _PAPER)
    image = _note("", (height, width)) if row.image is None else row.image.resize((width, height))
    strip.paste(_note("not available", (height, width)) if row.image is None else image, (0, 0))
    top = height + 6
    _text(strip, (0, top), row.label)
    _text(strip, (0, top + LINE_PX), f"{row.size[0]} x {row.size[1]} px", faded=True)
    for i, cell in enumerate(row.cells):
        left = (i + 1) * (CELL_PX + GAP_PX)
        strip.paste(_overlay(image, cell), (left, 0))
        _text(strip, (left, top), cell.prompt)
        found = f"{_percent(cell.share)} of the image" if cell.share > 0 else "no mask"
        _text(strip, (left, top + LINE_PX), f"p {cell.score:.2f}, {found}", faded=True)
    return strip


def _percent(share: float) -> str:
    return "under 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def _overlay(image: Image.Image, cell: Cell) -> Image.Image:
    """The image, grey and pale but in its own colours under the mask, tinted and outlined."""
    grey = Image.blend(image, image.convert("L").convert("RGB"), 0.85)
    pale = Image.blend(grey, Image.new("RGB", image.size, _PAPER), 0.4)
    tinted = Image.blend(image, Image.new("RGB", image.size, cell.color), 0.2)
    cover = Image.fromarray(cell.mask).resize(image.size, Image.Resampling.BILINEAR)
    pale.paste(tinted, mask=cover)
    solid = cover.point(lambda value: 255 * (value > 127))
    outline = ImageChops.difference(
        solid.filter(ImageFilter.MaxFilter(3)), solid.filter(ImageFilter.MinFilter(3))
    )
    pale.paste(ImageColor.getrgb(cell.color), mask=outline)
    return pale


def _note(text: str, size: tuple[int, int]) -> Image.Image:
    """A grey picture of `size` that says why there is nothing to see."""
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
