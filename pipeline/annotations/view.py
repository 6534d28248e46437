"""A finished run of masks -> a page of images with their masks over them.

The page has the images most worth a look, each with a cell for every prompt with something found;
the other prompts are named. The images come from the shards of the run.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pipeline import storage
from pipeline.annotations.choose import (
    ChosenImage,
    list_parts_by_shard,
    rank_images,
    read_chosen,
    spread,
)
from pipeline.annotations.html import cell, dot, escape_text, make_page, missing, picture
from pipeline.annotations.overlay import (
    ACCENT,
    colors_of,
    decode_mask,
    describe_share,
    draw_overlay,
)
from pipeline.annotations.overlay import fit as fit_into
from pipeline.config.view import ViewConfig
from pipeline.errors import UsageError, one_line
from pipeline.run.images import find_images
from pipeline.run.manifest import read_run
from pipeline.run.moved import DOUBT
from pipeline.run.wanted_images import Moved, Place, read_captions, read_wanted
from pipeline.write.passes import read_added

SIDE_PX = 320  # the longer side of a picture
CELLS = 12  # prompts shown of an image
SHARDS = 500  # that images are chosen from
NAMED = 20  # prompts in one line
CAPTION_CHARACTERS = 500

_SORTED = {
    "score": "largest probability first",
    "area": "largest share of the image first",
    "uncertain": "largest probability nearest to the threshold first",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """Contents of a page."""

    facts: Mapping[str, str]
    """Lines of the header, by name."""
    images: Sequence[ChosenImage]
    pictures: Mapping[Place, Sequence[bytes] | str]
    """JPEG files of an image and of each of its shown masks; or why there are none."""
    captions: Mapping[Place, str]
    colors: Mapping[str, str]
    """By prompt, of those with a colour of their own."""
    title: str = "Masks by prompt"
    lines: Mapping[Place, str] = field(default_factory=dict)
    """A line below the heading of an image."""
    notes: Sequence[str] = ()
    """Lines for who asked for the page."""


def view_run(config: ViewConfig) -> View:
    """Choose images of a run, and draw them.

    Raises UsageError for anything but a run of masks, and for an unknown prompt or key.
    """
    output = storage.check_uri(config.run)
    record = read_run(output)
    if record is not None and "annotations" in record.get("tables", ()):
        segmented = shlex.quote(str(record.get("config", {}).get("input")))
        raise UsageError(
            f"{config.run}: holds labels; their masks are those of clipseg-ray view {segmented}"
        )
    if record is None or "masks" not in record.get("tables", ()):
        raise UsageError(f"{config.run}: holds no masks; name the OUTPUT of clipseg-ray segment")
    prompts = _prompts(output, record)
    if config.prompt is not None and config.prompt not in prompts:
        some = ", ".join(repr(one_line(p, 40)) for p in prompts[:NAMED])
        raise UsageError(f"--prompt {config.prompt!r}: the run has {some}; name one of its own")
    masks, images = (list_parts_by_shard(output, name) for name in ("masks", "images"))
    # A key may be in any shard.
    some_shards = spread(list(masks), len(masks) if config.image is not None else SHARDS)
    chosen = rank_images(
        {id_: masks[id_] for id_ in some_shards},
        sort=config.sort,
        limit=config.limit,
        key=config.image,
        prompt=config.prompt,
    )
    if not chosen and config.image is not None:
        raise UsageError(
            f"--image {config.image!r}: no image of this key came out well; "
            f"{output}/images has the keys, and clipseg-ray status {output} --errors what failed"
        )
    only = [config.prompt] if config.prompt is not None else []
    found = read_chosen(chosen, masks, images, prompts=only)
    colors = colors_of(record["config"])
    places = {(image.shard, image.row): image for image in found}

    def draw(place: Place, image: Image.Image) -> list[bytes] | str:
        return draw_pictures(places[place], image, colors, named=config.prompt is not None)

    source = find_images(output)
    moved = None
    if config.input_moved_to:
        known = {place: (image.key, image.size_bytes) for place, image in places.items()}
        moved = Moved(to=config.input_moved_to, known=known)
    pictures = read_wanted(source, set(places), draw, moved=moved)
    captions: dict[Place, str] = {}
    if config.text_column:
        captions = read_captions(source, set(places), config.text_column, config.input_moved_to)
    total = int(record.get("counts", {}).get("rows_ok", 0))
    among = (
        f", chosen from {SHARDS:,} of {len(masks):,} shards"
        if len(some_shards) < len(masks)
        else ""
    )
    of = f" of {total:,}" if total else ""
    facts = {
        "images": f"{len(found):,}{of}{among}; {_SORTED[config.sort]}",
        "prompts": _name(only or prompts),
        "threshold": f"{record['config'].get('threshold')}",
        "model": str(record["config"].get("model")),
        "input": config.input_moved_to or source.source,
        "numbers": "size as height x width; p, largest probability; share of the image",
        "run": f"{output}, started {record.get('started_at', '?')}",
    }
    notes = []
    if moved and moved.doubted:
        many = f"{len(moved.doubted):,} shards" if len(moved.doubted) > 1 else moved.doubted[0]
        notes.append(f"{many} {DOUBT}")
    return View(
        facts=facts,
        images=found,
        pictures=pictures,
        captions=captions,
        colors=colors,
        notes=notes,
    )


def _prompts(output: str, record: Mapping[str, Any]) -> list[str]:
    added = [prompt for some in read_added(output).values() for prompt in some]
    return [*record.get("fingerprint", {}).get("prompts", []), *added]


def _shown(image: ChosenImage, *, named: bool) -> list[int]:
    """Places of the masks with a cell: those not empty, or the named one."""
    return [i for i, mask in enumerate(image.masks) if named or mask.share > 0][:CELLS]


def draw_pictures(
    chosen: ChosenImage, image: Image.Image, colors: Mapping[str, str], *, named: bool = False
) -> list[bytes] | str:
    """JPEG files of an image and its shown masks, or why it is not the image of the table."""
    if (image.height, image.width) != chosen.size:
        return "another image is there now: its size has changed"
    size = fit_into(chosen.size, (SIDE_PX, SIDE_PX))
    small = image.resize(size[::-1], Image.Resampling.LANCZOS)
    masks = [chosen.masks[i] for i in _shown(chosen, named=named)]
    overlays = [
        draw_overlay(small, decode_mask(m.rle, size), colors.get(m.prompt, ACCENT)) for m in masks
    ]
    return [_jpeg(picture) for picture in (small, *overlays)]


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def draw_page(view: View, *, named: bool = False) -> str:
    """The HTML of a view; `named`: a cell for every mask, even an empty one."""
    header = "".join(
        f"<dt>{k}</dt><dd>{escape_text(v, 2000)}</dd>\n" for k, v in view.facts.items()
    )
    sections = [_section(view, image, named=named) for image in view.images]
    body = "\n".join([f"<h1>{escape_text(view.title)}</h1>\n<dl>\n{header}</dl>", *sections])
    return make_page(f"Masks: {view.facts.get('run', '')}", body)


def _section(view: View, image: ChosenImage, *, named: bool) -> str:
    place = (image.shard, image.row)
    pictures = view.pictures.get(place, "not available")
    shown = _shown(image, named=named)
    height, width = image.size
    whole = _picture(pictures, 0, image.key)
    cells = [cell(whole, "image", "", (f"{height} x {width} px", ""))]
    for number, i in enumerate(shown, 1):
        mask = image.masks[i]
        said = (f"p {mask.score:.2f}", describe_share(mask.share))
        inside = _picture(pictures, number, f"{mask.prompt} in {image.key}")
        mark = dot(view.colors.get(mask.prompt, ACCENT))
        cells.append(cell(inside, mask.prompt, "", said, before=mark))
    lines = [f"{escape_text(image.shard)}, row {image.row}"]
    if note := view.lines.get(place):
        lines.insert(0, escape_text(note))
    if caption := view.captions.get(place):
        lines.append(f"<q>{escape_text(caption, CAPTION_CHARACTERS)}</q>")
    left = [mask for i, mask in enumerate(image.masks) if i not in shown]
    if empty := [mask.prompt for mask in left if mask.share <= 0]:
        lines.append(f"nothing found for {escape_text(_name(empty), 2000)}")
    if more := [mask.prompt for mask in left if mask.share > 0]:
        lines.append(f"not shown, though found: {escape_text(_name(more), 2000)}")
    below = "<br>\n".join(lines)
    return f"<h2>{escape_text(image.key)}</h2>\n<p>{below}</p>\n<ol>\n{''.join(cells)}</ol>"


def _picture(pictures: Sequence[bytes] | str, number: int, alt: str) -> str:
    if isinstance(pictures, str):
        return missing(pictures)
    return picture(pictures[number], alt)


def _name(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - NAMED:,} more" if len(prompts) > NAMED else ""
    return ", ".join(one_line(prompt, 60) for prompt in prompts[:NAMED]) + more
