"""Encoded bytes -> upright RGB -> uint8 pixels at the model's size. The decode stage.

What arrives is whatever the web holds, so every image either becomes upright RGB or a RowError with
a reason; nothing is dropped in silence and nothing is decoded before its size is known. How each
kind of image becomes RGB is told in convert.py.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline import schema
from pipeline.errors import RowError
from pipeline.prepare import layouts
from pipeline.prepare.convert import image_of_array, to_rgb
from pipeline.prepare.identify import describe, identify
from pipeline.prepare.png import pixel_chunks
from pipeline.prepare.resize import Box
from pipeline.prepare.upright import SIDEWAYS, TRANSPOSE, read_orientation, reduce_jpeg, turn_box

MAX_ASPECT = 1000

# The facts of a record without an image.
_UNDECODED = {
    "height": 0,
    "width": 0,
    "format": "",
    "mode": "",
    "orientation": 0,
    "size_bytes": 0,
    "pixels": b"",
}


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """An upright RGB image and what it was before."""

    image: Image.Image
    """Mode RGB, orientation applied; smaller than the size below where it was decoded so."""
    height: int
    """Of the upright image, in pixels."""
    width: int
    format: str
    """Pillow's name: JPEG, MPO, PNG, WEBP, GIF, BMP, TIFF, AVIF."""
    mode: str
    """Pillow's mode before conversion: RGB, L, CMYK, I;16, ..."""
    orientation: int
    """The EXIF orientation that was applied, 1..8; 1 when there was none."""
    box: Box | None = None
    """Left, top, right and bottom of the file's pixels in an image that was decoded smaller: its
    last row and column may stand for less than the others."""


def decode_image(
    data: bytes | np.ndarray, *, max_pixels: int, at_least: tuple[int, int] | None = None
) -> DecodedImage:
    """Decode one image to upright RGB; its peak is 4 to 13 bytes per pixel, WebP's 20.

    A JPEG is decoded to a half, a quarter or an eighth of its size if still `at_least` as large,
    (height, width): faster, by libjpeg's scaled DCT, and other pixels.

    Pixels of somebody else's decoder are taken as they are: see convert.image_of_array.

    Whatever the bytes are, a process stays below 20 x max_pixels + 6 x len(data) + 64 MiB for it.

    Raises RowError(stage="decode") with the reason image_empty, not_an_image, unsupported_format,
    too_many_pixels or extreme_aspect (both found before decoding), or image_corrupt. One image at a
    time is decoded in a process: Pillow's limits and Python's warnings are process-wide settings.
    """
    if not isinstance(data, bytes | np.ndarray):
        raise _refusal("unsupported_format", f"a {type(data).__name__}, not bytes or an array")
    if (len(data) if isinstance(data, bytes) else data.size) == 0:
        raise _refusal("image_empty", "")
    try:
        with _pillow_limited_to(max_pixels):
            return _decode(data, max_pixels, at_least)
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        found = f"more than {2 * max_pixels} px, the limit is {max_pixels}"
        raise _refusal("too_many_pixels", found) from error
    except MemoryError as error:
        # The pixel cap bounds what an image may ask for, so the machine was short of memory.
        raise _refusal("decoder_crashed", "out of memory", retryable=True) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, TypeError, RuntimeError, IndexError,
    # struct.error, zlib.error, ... on broken input: no shorter list of exceptions is complete.
    except Exception as error:
        if at_least:  # a lossless JPEG has no smaller size; what is broken is refused as always
            return decode_image(data, max_pixels=max_pixels)
        encoded = data if isinstance(data, bytes) else b""
        if layout := layouts.missing_layout(identify(encoded) or "", encoded):
            raise _refusal("unsupported_format", layout) from error
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise _refusal("image_corrupt", f"{kind}{error}") from error


class Fit(Protocol):
    """An image processor, or the looks of windows.py."""

    @property
    def least_size(self) -> tuple[int, int] | None:
        """See ImageProcessor."""
        ...

    def fit(
        self, image: Image.Image, whole: tuple[int, int] | None = None, box: Box | None = None
    ) -> Image.Image | np.ndarray:
        """The uint8 pixels of an RGB image for the model; `whole` and `box`: see ImageProcessor."""
        ...


class PrepareImages:
    """The decode stage: schema.RECORDS -> schema.PIXELS, at the size the model's processor says.

    A failed image becomes a record with stage, reason and detail; records arriving with a reason,
    and end records, pass as they are.
    """

    def __init__(self, processor: Fit, max_pixels: int, decode: str = "exact"):
        """`decode`: as in config.options.ImageOptions."""
        self.processor, self.max_pixels = processor, max_pixels
        self.at_least = processor.least_size if decode == "fast" else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        # Written into their column at once: in a list of bytes they would be copied twice more, a
        # tenth of the time of a photograph.
        column, ends = BytesIO(), [0]
        records: list[dict[str, Any]] = []
        for record in batch.to_pylist():
            records.append(self._prepare(record))
            column.write(records[-1].pop("pixels"))
            ends.append(column.tell())
        table = pa.Table.from_pylist(records, schema=schema.PIXELS)
        buffers = [None, pa.py_buffer(np.array(ends, np.int64)), pa.py_buffer(column.getbuffer())]
        pixels = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(batch), buffers)
        return table.set_column(table.schema.get_field_index("pixels"), "pixels", pixels)

    def _prepare(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record of schema.PIXELS; its pixels are bytes, or a view of an array."""
        data, record = record["image"], _blank(record)
        if record["reason"] or record["row"] < 0:
            return record
        try:
            decoded = decode_image(data, max_pixels=self.max_pixels, at_least=self.at_least)
            whole = (decoded.height, decoded.width)
            pixels = np.asarray(self.processor.fit(decoded.image, whole, decoded.box))
        except RowError as error:
            failure = error
        except MemoryError:
            failure = _refusal("decoder_crashed", "out of memory", retryable=True)
        else:
            facts = ("height", "width", "format", "mode", "orientation")
            record |= {name: getattr(decoded, name) for name in facts}
            size_bytes = len(data) if isinstance(data, bytes) else data.nbytes
            return record | {"size_bytes": size_bytes, "pixels": pixels.data}
        return _failed(record, failure)


def fail_crashed_image(
    records: pa.Table, last: pa.Table | None, how: str, *, killed: bool
) -> pa.Table:
    """The record in a one-row table, failed: its decoder ended its process.

    `how` it ended; `killed`: from outside, as the kernel does when memory is short.
    """
    failure = _refusal("decoder_crashed", how, retryable=killed)
    failed = _failed(_blank(records.to_pylist()[0]), failure)
    return pa.Table.from_pylist([failed], schema=schema.PIXELS)


def _blank(record: dict[str, Any]) -> dict[str, Any]:
    """A record of schema.PIXELS without an image."""
    return {name: value for name, value in record.items() if name != "image"} | _UNDECODED


def _failed(record: dict[str, Any], failure: RowError) -> dict[str, Any]:
    why = ("stage", "reason", "detail", "retryable")
    return record | {name: getattr(failure, name) for name in why}


def _decode(
    data: bytes | np.ndarray, max_pixels: int, at_least: tuple[int, int] | None
) -> DecodedImage:
    image = _open(data, max_pixels) if isinstance(data, bytes) else _take(data, max_pixels)
    form, mode, (width, height) = image.format or "", image.mode, image.size
    box: Box | None = None
    if form == "TIFF":
        # Pillow applies a TIFF's orientation itself while loading, and forgets it.
        orientation = read_orientation(image)
        image.load()
        image = to_rgb(image)
        width, height = image.size
    else:
        if at_least and isinstance(image, JpegImageFile):
            box = reduce_jpeg(image, at_least)
        # In this order, as asking a PNG for its EXIF loads it.
        image.load()
        orientation = read_orientation(image)
        image = to_rgb(image)
        if orientation != 1:
            image = image.transpose(TRANSPOSE[orientation])
        if orientation in SIDEWAYS:
            width, height = height, width
        if box:
            box = turn_box(box, orientation, image.size)
    return DecodedImage(
        image=image,
        height=height,
        width=width,
        format=form,
        mode=mode,
        orientation=orientation,
        box=box,
    )


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header and check the size; no pixel is decoded."""
    form = identify(data)
    if form is None:
        raise _refusal("not_an_image", describe(data))
    if form not in _formats():
        raise _refusal("unsupported_format", form)
    try:
        source = pixel_chunks(data) if form == "PNG" else data
        image = Image.open(BytesIO(source), formats=_formats())
    except UnidentifiedImageError:
        if form == "AVIF":
            _check_size(*layouts.avif_size(data), max_pixels)
        raise ValueError(f"begins like {form}, but its header is broken") from None
    height, width = image.height, image.width
    if height < 1 or width < 1:
        raise ValueError(f"{height} x {width} px")
    _check_size(height, width, max_pixels)
    if isinstance(image, TiffImageFile):
        _check_tiff(image, len(data), max_pixels)
    _check_aspect(height, width)
    layouts.correct_raw_mode(image, data)
    return image


def _take(pixels: np.ndarray, max_pixels: int) -> Image.Image:
    """The image of decoded pixels, within the bounds of encoded ones."""
    image = image_of_array(pixels)
    _check_size(image.height, image.width, max_pixels)
    _check_aspect(image.height, image.width)
    return image


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise _refusal("extreme_aspect", f"{height} x {width} px")


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise _refusal("too_many_pixels", f"{height} x {width} px, the limit is {max_pixels}")


def _check_tiff(image: TiffImageFile, size_bytes: int, max_pixels: int) -> None:
    # Each tile is decoded as a whole, however little of it the image uses.
    tags = (layouts.TILE_LENGTH, layouts.TILE_WIDTH)
    height, width = (int(image.tag_v2.get(tag, 1)) for tag in tags)
    if height * width > max_pixels:
        found = f"tiles of {height} x {width} px, the limit is {max_pixels}"
        raise _refusal("too_many_pixels", found)
    if layout := layouts.wrong_tiff_layout(image):
        if not layouts.is_whole_tiff(image.tag_v2, size_bytes):
            raise ValueError("strips or tiles outside the file")
        raise _refusal("unsupported_format", layout)


@cache
def _formats() -> tuple[str, ...]:
    """The allow-list of Image.open: no parser of another format is ever reached."""
    optional = tuple(form for form in ("WEBP", "AVIF") if features.check(form.lower()))
    return ("JPEG", "PNG", "GIF", "BMP", "TIFF", *optional)


_pillow_lock = threading.Lock()


@contextmanager
def _pillow_limited_to(max_pixels: int) -> Iterator[None]:
    """Pillow with our own pixel cap in place of its own, strict, and without its warnings.

    The cap must hold inside Pillow too: some decoders allocate the canvas while opening. Libraries
    are known to set LOAD_TRUNCATED_IMAGES for the whole process. Uncompressed TIFFs go through
    libtiff: Pillow's own reader mixes up separate planes of 16 bits, and never looks at the lengths
    of strips.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        libtiff, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
        try:
            yield
        finally:
            TiffImagePlugin.READ_LIBTIFF = libtiff
            Image.MAX_IMAGE_PIXELS = limit
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _refusal(reason: str, detail: str, *, retryable: bool = False) -> RowError:
    """A RowError with one printable line of detail, without memory addresses or the image's own
    bytes: the same image gives the same row in every run."""
    detail = re.sub(r"\bb(['\"]).*?\1", "...", detail)
    detail = re.sub(r"0x[0-9a-fA-F]{6,}", "...", detail)
    detail = "".join(c if c.isprintable() else " " for c in detail)
    return RowError("decode", reason, " ".join(detail.split()), retryable=retryable)
