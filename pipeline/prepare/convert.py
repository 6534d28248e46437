"""Images of any mode -> RGB.

How each kind of image becomes RGB:

    transparency (RGBA, LA, PA, P or RGB with a transparent colour)   composited on white
    1, L, P, YCbCr, HSV, RGBX   Pillow's conversion
    CMYK, YCCK          Pillow's plain conversion; an embedded ICC profile is not applied
    LAB                 through littleCMS, D50 white
    16-bit grey         divided by 257, so that 65535 becomes 255 (Pillow would clip it to white)
    32-bit int, float   stretched from the image's own minimum..maximum to 0..255, as their unit is
                        unknown; infinities count as the ends, NaN as black, a flat image is black
    animations, MPO, multi-page TIFF   the first frame
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

# Conversions work on bands of rows, so that their temporary copies stay small.
_BAND_PX = 1 << 20


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image of the same size, composited on white where there is transparency."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    convert = _band_converter(image)
    canvas = Image.new("RGB", image.size, "white")
    for box in _bands(image):
        band = convert(image.crop(box))
        canvas.paste(band, box, mask=band if band.mode == "RGBA" else None)
    return canvas


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _BAND_PX // image.width)
    for top in range(0, image.height, rows):
        yield (0, top, image.width, min(top + rows, image.height))


def _band_converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """The function that makes RGB or RGBA of a band of this image, chosen by mode."""
    if image.mode.startswith("I;16"):
        # Indexed by the 16-bit value.
        table = np.rint(np.arange(65536) / 257).astype(np.uint8)
        transparent = image.info.get("transparency")
        return lambda band: _grey(table, np.asarray(band), transparent)
    if image.mode in ("I", "F"):
        low, high = _finite_range(image)
        return lambda band: _stretch(np.asarray(band, np.float64), low, high)
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


def _grey(table: np.ndarray, values: np.ndarray, transparent: int | None) -> Image.Image:
    grey = Image.fromarray(table[values])
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _finite_range(image: Image.Image) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for box in _bands(image):
        values = np.asarray(image.crop(box))
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _stretch(values: np.ndarray, low: float, high: float) -> Image.Image:
    """low..high -> 0..255, in float64; black where the whole image is flat or not finite."""
    if not low < high:
        return Image.new("RGB", (values.shape[1], values.shape[0]))
    finite = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    grey = np.rint((finite - low) / (high - low) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
