"""Resize an image and crop its centre, without ever holding much of the rest.

With its short edge at the model's size, an image 1,000 times as long as wide is 1,000 times its
centre crop: 200 MB of 1 x 1,000 pixels at 224, 4 GB at 1,024.
"""

from __future__ import annotations

import math

from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom of a part of an image, in pixels."""

# Of a resized image, held at once: a photograph of 3 : 2 at 1,024 is one piece.
PIECE_PX = 1 << 21
# At once, however long they are: what a line of such a length costs beforehand, they share.
LEAST_LINES = 8


def resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    crop: tuple[int, int],
    resample: int,
    box: Box | None = None,
) -> Image.Image:
    """Pixel for pixel image.resize(size, box=box) and its centre `crop`, zeros beyond the image.

    Sizes are (height, width). Pillow makes each row wider by itself, rounds to 8 bits, and then
    makes each column higher by itself: so a few rows at a time, and then a few columns, give the
    same. An image of falling height is resized as a whole: Pillow 13 may take its columns first,
    and with its aspect kept the result is smaller than the image.
    """
    (height, width), (kept_height, kept_width) = size, crop
    if box or size == crop or height < image.height or height * width <= PIECE_PX:
        resized = image.resize((width, height), Image.Resampling(resample), box=box)
        return crop_center(resized, crop)
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    first, last = _sources(image.height, height, top, kept_height)
    rows = image.crop((0, first, image.width, last))
    rows = _resize_rows(rows, 0, image.width, width, left, kept_width, resample)
    columns = rows.transpose(Image.Transpose.TRANSPOSE)
    columns = _resize_rows(columns, first, image.height, height, top, kept_height, resample)
    return columns.transpose(Image.Transpose.TRANSPOSE)


def crop_center(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    """The centre (height, width) of an image, zeros beyond it."""
    if (image.height, image.width) == crop:  # Pillow would copy it
        return image
    top, left = (image.height - crop[0]) // 2, (image.width - crop[1]) // 2
    return image.crop((left, top, left + crop[1], top + crop[0]))


def _sources(length: int, resized: int, offset: int, kept: int) -> tuple[int, int]:
    """The range of a line's pixels with influence on its kept part, once lengthened."""
    scale, margin = length / resized, 4  # no filter is wider than 3
    first = math.floor(offset * scale) - margin
    return max(first, 0), min(math.ceil((offset + kept) * scale) + margin, length)


def _resize_rows(
    image: Image.Image, start: int, length: int, width: int, left: int, kept: int, resample: int
) -> Image.Image:
    """Rows of `length` columns, those from `start` on in `image`, made `width` wide; and of these,
    `kept` columns from `left` on."""
    out = Image.new(image.mode, (kept, image.height))
    step = max(LEAST_LINES, PIECE_PX // max(length, width))
    for y in range(0, image.height, step):
        bottom = min(y + step, image.height)
        rows = image.crop((-start, y, length - start, bottom))
        rows = rows.resize((width, bottom - y), Image.Resampling(resample))
        out.paste(rows.crop((left, 0, left + kept, bottom - y)), (0, y))
    return out
