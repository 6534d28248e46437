"""A mask over its image: pale and grey outside, tinted and outlined inside.

Sizes in pixels; sizes of images are (height, width).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageFilter
from pycocotools import mask as coco

from pipeline.config.ontology import read_ontology
from pipeline.errors import PipelineError

# One accent for every mask without a colour of its own: a colour per prompt would be read as the
# colour of what was found.
ACCENT = "#e20074"
_PAPER = (255, 255, 255)


def fit(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same aspect inside a box; (height, width) all."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def decode_mask(rle: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask of an RLE at another size: (h, w) uint8, 0..255."""
    with warnings.catch_warnings():
        # pycocotools 2.0.11 makes its array in numpy 1's way.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        mask = Image.fromarray(coco.decode(rle) * np.uint8(255))
    return np.asarray(mask.resize(size[::-1], Image.Resampling.BOX))


def draw_overlay(image: Image.Image, mask: np.ndarray, color: str = ACCENT) -> Image.Image:
    """The RGB image, grey and pale but in its own colours under the mask, tinted and outlined."""
    accent = ImageColor.getrgb(color)
    grey = Image.blend(image, image.convert("L").convert("RGB"), 0.85)
    pale = Image.blend(grey, Image.new("RGB", image.size, _PAPER), 0.4)
    tinted = Image.blend(image, Image.new("RGB", image.size, accent), 0.2)
    cover = Image.fromarray(mask).resize(image.size, Image.Resampling.BILINEAR)
    pale.paste(tinted, mask=cover)
    solid = cover.point(lambda value: 255 * (value > 127))
    outline = ImageChops.difference(
        solid.filter(ImageFilter.MaxFilter(3)), solid.filter(ImageFilter.MinFilter(3))
    )
    pale.paste(accent, mask=outline)
    return pale


def describe_share(share: float) -> str:
    """How much of an image a mask covers, 0..1, in words."""
    if share <= 0:
        return "no mask"
    return "under 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def colors_of(config: dict[str, Any]) -> dict[str, str]:
    """The colours of prompts by the classes of the run's ontology, as far as these have one.

    `config` as _run.json keeps it; no colours if the ontology is no longer readable.
    """
    file = config.get("ontology")
    if not isinstance(file, str):
        return {}
    try:
        classes = read_ontology(file).classes
    except PipelineError:
        return {}
    return {p.name: c.color for c in classes if c.color for p in c.prompts}
