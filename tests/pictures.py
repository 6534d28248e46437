"""Pictures that tests encode, decode and compare."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from pipeline.errors import REASONS, RowError
from pipeline.prepare.images import DecodedImage, decode_image

# A preprocessor_config.json for 64 x 64 pixels.
PIXELS = {
    "do_resize": True,
    "size": {"height": 64, "width": 64},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "ViTImageProcessor",
}
MAX_PIXELS = 1_000_000
# The bound of docs/: 20 bytes x max_pixels + 6 x the encoded image + 64 MiB.
BYTES_PER_PIXEL, COPIES, MORE_BYTES = 20, 6, 64 * 2**20
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@functools.cache
def astronaut() -> np.ndarray:
    return skimage.data.astronaut()


def photo(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(astronaut()[:height, 180 : 180 + width])


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    return decode_image(data, max_pixels=max_pixels)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data).image)


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> RowError:
    with pytest.raises(RowError) as caught:
        decode(data, max_pixels)
    error = caught.value
    assert error.stage == "decode"
    assert error.reason in REASONS
    assert error.detail.isprintable()
    assert len(error.detail) <= 500
    return error


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (4, 4), colour: int = 2) -> bytes:
    """A PNG from its chunks, with IHDR and IEND around them; size is (height, width)."""
    header = struct.pack(">IIBBBBB", size[1], size[0], 8, colour, 0, 0, 0)
    body = bytearray(b"\x89PNG\r\n\x1a\n")
    for name, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        checksum = zlib.crc32(name + data)
        body += struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
    return bytes(body)


@functools.cache
def photos() -> list[bytes]:
    """Real photographs of different sizes as JPEG, and one as PNG."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    pictures = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    pictures = [
        picture.resize((w // 2, h // 2)) for p in pictures for picture in [p] for w, h in [p.size]
    ]
    out = []
    for i, picture in enumerate(pictures):
        file = io.BytesIO()
        picture.save(file, "PNG" if i == 3 else "JPEG")
        out.append(file.getvalue())
    return out
