"""EXIF orientations, and JPEGs decoded at a fraction of their size in the upright frame."""

from __future__ import annotations

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.prepare.resize import Box

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 for none and for an invalid one."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(orientation) if orientation in TRANSPOSE else 1
    # Whatever a broken EXIF block raises, the picture itself may be fine.
    except Exception:
        return 1


def reduce_jpeg(image: JpegImageFile, at_least: tuple[int, int]) -> Box | None:
    """Have a JPEG decoded to 1/2, 1/4 or 1/8, no smaller than (height, width) once upright.

    Returns the box of its pixels; None if it stays as large as it is.
    """
    height, width = at_least[::-1] if read_orientation(image) in SIDEWAYS else at_least
    before = image.size
    drafted = image.draft(None, (width, height))
    return drafted[1] if drafted and image.size != before else None


def turn_box(box: Box, orientation: int, size: tuple[int, int]) -> Box:
    """The box after applying an orientation; `size`: (width, height) of the turned image."""
    left, top, right, bottom = box
    if orientation in SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 6, 7):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 7, 8):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom
