"""Masks of one image -> one map with a number a pixel, as PNG; and the colours of classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.annotations.labelled import Class, Instance

VOID = 255  # a pixel that several claim: trainers leave it out


class LabelMap(NamedTuple):
    """A number for each pixel, and what one number a pixel cannot tell."""

    pixels: np.ndarray
    """(H, W): 0 background, then from 1; the largest value of its type where several claim one."""
    contested: int
    """How many pixels several claim."""


def label_map(
    size: tuple[int, int], instances: Sequence[Instance], numbers: Sequence[int], kind: type
) -> LabelMap:
    """One number a pixel, each from 1 to below the largest of the integer type `kind`.

    Instances with one number may overlap; a pixel of two numbers is void.
    """
    void = np.iinfo(kind).max
    pixels: np.ndarray = np.zeros(size, kind)
    for instance, number in zip(instances, numbers, strict=True):
        x, y, width, height = instance.bbox
        window = pixels[y : y + height, x : x + width]
        inside = instance.crop() > 0
        taken = inside & (window != 0) & (window != number)
        window[inside] = number
        window[taken] = void
    return LabelMap(pixels, int((pixels == void).sum()))


def encode_png(pixels: np.ndarray, palette: Sequence[int] = ()) -> bytes:
    """A PNG of one channel: (H, W) uint8 or uint16; of mode P if there is a palette."""
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(list(palette))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@cache
def voc_palette() -> tuple[int, ...]:
    """The 256 colours of the PASCAL VOC devkit, as 768 numbers 0..255.

    The three lowest bits of the index are the highest bit of red, green and blue, and so on.
    """
    colours = []
    for index in range(256):
        for channel in range(3):
            bits = [(index >> (3 * k + channel)) & 1 for k in range(3)]
            colours.append(sum(bit << (7 - k) for k, bit in enumerate(bits)))
    return tuple(colours)


def color_of(classes: Sequence[Class], class_id: int) -> str:
    """The colour of a class as #rrggbb: the ontology's, else one of VOC's palette."""
    at = 3 * (1 + class_id % 254)
    return classes[class_id].color or "#{:02x}{:02x}{:02x}".format(*voc_palette()[at : at + 3])
