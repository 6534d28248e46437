"""Images of any mode -> RGB.

How each kind of image becomes RGB:

    transparency (RGBA, LA, PA, P or RGB with a transparent colour)   composited on white
    1, L, P, YCbCr, HSV, RGBX   Pillow's conversion
    CMYK, YCCK          Pillow's plain conversion; an embedded ICC profile is not applied
    LAB                 through littleCMS, D50 white
    16-bit colour       its upper 8 bits
    12-, 16-bit grey    scaled so that the largest value becomes 255 (Pillow would clip it to white)
    signed, 32-bit, float   stretched from the image's own minimum..maximum to 0..255, as their unit
                        is unknown; infinities are the ends, NaN is black, a flat image is black
    white is zero       inverted
    animations, MPO, multi-page TIFF   the first frame

Pixels decoded elsewhere become an image first, and then RGB by the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COLORMAP,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from pipeline.errors import RowError

# Conversions work on bands of rows, so that their temporary copies stay small.
_BAND_PX = 1 << 20
_GREY_ARRAYS = ("uint8", "bool", "uint16", "int32", "float32")


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image of the same size, transparency composited on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    _mend_palette(image)
    convert = _band_converter(image)
    canvas = Image.new("RGB", image.size, "white")
    for box in _bands(image):
        band = convert(image.crop(box))
        canvas.paste(band, box, mask=band if band.mode == "RGBA" else None)
    return canvas


def image_of_array(pixels: np.ndarray) -> Image.Image:
    """The image of decoded pixels: uint8 (H, W), or (H, W, C) of C = 1 grey, 2 grey and alpha,
    3 RGB, 4 RGBA; or bool, uint16, int32 or float32 (H, W).

    Raises RowError(stage="decode") with the reason unsupported_format for other arrays.
    """
    plain = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    known = {2: _GREY_ARRAYS, 3: ("uint8",)}.get(plain.ndim, ())
    if plain.dtype.name not in known or plain.shape[2:] not in ((), (2,), (3,), (4,)):
        shape = " x ".join(map(str, pixels.shape))
        raise RowError("decode", "unsupported_format", f"an array of {shape} {pixels.dtype}")
    return Image.fromarray(np.ascontiguousarray(plain))


def _mend_palette(image: Image.Image) -> None:
    """Read a TIFF's palette of values below 256 as 8-bit colours, as libtiff does."""
    colours = _tags(image).get(COLORMAP) if image.mode in ("P", "PA") else None
    if colours and max(colours) < 256:
        image.putpalette(bytes(colours), "RGB;L")


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _BAND_PX // image.width)
    for top in range(0, image.height, rows):
        yield (0, top, image.width, min(top + rows, image.height))


def _band_converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The conversion of a band of this image to RGB or RGBA, chosen by mode."""
    # Pillow inverts up to 8 bits itself.
    inverted = bool(_tags(image)) and _tags(image).get(PHOTOMETRIC_INTERPRETATION, 0) == 0
    if image.mode.startswith("I;16"):
        # Indexed by the 16-bit value.
        white = (1 << _bits(image)) - 1
        table = np.rint(np.minimum(np.arange(65536) / white, 1) * 255).astype(np.uint8)
        if inverted:
            table = 255 - table
        transparent = image.info.get("transparency")
        return lambda band: _grey(table, np.asarray(band), transparent)
    if dtype := _unknown_unit(image):
        low, high = _finite_range(image, dtype)
        ends = (high, low) if inverted else (low, high)
        return lambda band: _stretch(np.asarray(band).view(dtype), *ends)
    if image.mode == "LAB":
        from_lab = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        return from_lab.apply
    if image.mode == "La":
        return lambda band: band.convert("LA").convert("RGBA")
    if image.has_transparency_data:
        return lambda band: band.convert("RGBA")
    return lambda band: band.convert("RGB")


def _tags(image: Image.Image) -> Mapping[int, Any]:
    return image.tag_v2 if isinstance(image, TiffImageFile) else {}


def _bits(image: Image.Image) -> int:
    bits = _tags(image).get(BITSPERSAMPLE, 16)
    return int(bits[0] if isinstance(bits, tuple) else bits)


def _unknown_unit(image: Image.Image) -> type[np.generic] | None:
    """The type of samples of unknown meaning; None if the largest stands for white."""
    kind = _tags(image).get(SAMPLEFORMAT, 1)
    signed = (max(kind) if isinstance(kind, tuple) else kind) == 2
    if image.mode == "I":
        # Pillow holds 32 unsigned bits as signed ones, and 8 signed ones as unsigned.
        return np.uint32 if _tags(image) and not signed else np.int32
    if image.mode == "L":
        return np.int8 if signed else None
    return np.float32 if image.mode == "F" else None


def _grey(table: np.ndarray, values: np.ndarray, transparent: int | None) -> Image.Image:
    grey = Image.fromarray(table[values])
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _finite_range(image: Image.Image, dtype: type[np.generic]) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for box in _bands(image):
        values = np.asarray(image.crop(box)).view(dtype)
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _stretch(values: np.ndarray, black: float, white: float) -> Image.Image:
    """black..white -> 0..255, in float64; black for an image wholly flat or not finite."""
    low, high = min(black, white), max(black, white)
    if not np.isfinite(high - low) or low == high:
        return Image.new("RGB", (values.shape[1], values.shape[0]))
    finite = np.nan_to_num(values.astype(np.float64), nan=black, posinf=high, neginf=low)
    grey = np.rint((finite - black) / (white - black) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
