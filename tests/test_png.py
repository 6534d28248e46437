"""PNGs as libpng sees them: metadata never refuses an image, and damage of pixels always does."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.pictures import encode, photo, pixels, png, refusal

BOMB = zlib.compress(bytes(40 << 20), 9)
TEXT = {
    "iCCP": b"icc\0\0" + BOMB,
    "zTXt": b"workflow\0\0" + BOMB,
    "iTXt": b"workflow\0\1\0\0\0" + BOMB,
    "tEXt": b"workflow\0" + b"x" * (2 << 20),
    "eXIf": b"II*\0\xff\xff\xff\x7f" * 1000,
    "pHYs": b"",
    "gAMA": b"nonsense",
    "cHRM": bytes(7),
    "sRGB": b"",
    "sBIT": bytes(100),
    "bKGD": b"",
    "hIST": b"x",
    "tIME": b"",
    "acTL": bytes(3),
    "fcTL": bytes(26),
    "vpAg": bytes(9),
    "iDOT": bytes(28),
}


def chunk(name: str | bytes, data: bytes, *, checksum: int | None = None) -> bytes:
    name = name.encode() if isinstance(name, str) else name
    right = zlib.crc32(name + data)
    return (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", right if checksum is None else checksum)
    )


def with_chunk(data: bytes, added: bytes, before: bytes = b"IDAT") -> bytes:
    at = data.index(before) - 4
    return data[:at] + added + data[at:]


def opencv(data: bytes) -> np.ndarray | None:
    """(H, W, 3) RGB, without regard to transparency; None where it is refused."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if image is None else image[..., ::-1]


def as_opencv(data: bytes) -> bool:
    found = opencv(data)
    return found is not None and np.array_equal(pixels(data), found)


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("name", TEXT)
def test_metadata_of_any_content_leaves_the_pixels_alone(name: str, before: bytes) -> None:
    for checksum in (None, 0):
        data = with_chunk(
            encode(photo(), "PNG"), chunk(name, TEXT[name], checksum=checksum), before
        )
        assert np.array_equal(pixels(data), np.asarray(photo()))
        if name not in ("acTL", "fcTL", "bKGD"):  # OpenCV's own use of these is strict
            assert as_opencv(data)


@pytest.mark.parametrize("form", ["interlaced", "palette", "grey", "1 bit", "16 bit"])
def test_other_pngs_with_broken_metadata(form: str) -> None:
    image = {
        "palette": lambda: photo().quantize(16),
        "grey": lambda: photo().convert("L"),
        "1 bit": lambda: photo().convert("1"),
    }.get(form, photo)()
    data = encode(image, "PNG")
    if form == "16 bit":
        wide = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
        data = cv2.imencode(".png", wide)[1].tobytes()
    assert as_opencv(with_chunk(data, chunk("pHYs", bytes(9), checksum=1)))


@pytest.mark.parametrize("tail", [b"\0\0", b"\0\0\0\0IEND\xae\x42\x60\x82xx", b"x" * 1000])
def test_junk_behind_the_end(tail: bytes) -> None:
    assert as_opencv(encode(photo(), "PNG") + tail)


def test_the_checksum_of_iend_stands_for_no_data() -> None:
    assert as_opencv(encode(photo(), "PNG")[:-4] + bytes(4))


@pytest.mark.parametrize("cut", [1, 4, 5, 8, 12, 13, 16, 100])
def test_a_png_that_breaks_off(cut: int) -> None:
    data = encode(photo(), "PNG")[:-cut]
    assert opencv(data) is None
    assert refusal(data).reason == "image_corrupt"


BROKEN = {
    "empty name": chunk(b"\0\0\0\0", b""),
    "unknown critical": chunk("ABCD", b"x"),
    "second header": chunk("IHDR", bytes(13)),
    "end with data": chunk("IEND", b"x"),
    "too long": struct.pack(">I", 1 << 18) + b"tEXtabc",
}


@pytest.mark.parametrize("name", BROKEN)
def test_chunks_that_cannot_be(name: str) -> None:
    data = with_chunk(encode(photo(), "PNG"), BROKEN[name])
    assert opencv(data) is None
    assert refusal(data).reason == "image_corrupt"


@pytest.mark.parametrize("name", ["IHDR", "PLTE", "IDAT", "tRNS"])
@pytest.mark.parametrize("bit", [0, 7, 31])
def test_the_checksum_of_chunks_that_decide_pixels(name: str, bit: int) -> None:
    image = photo().quantize(16)
    data = bytearray(encode(image, "PNG", transparency=bytes([255, 0, 128])))
    at = data.index(name.encode())
    length = int.from_bytes(data[at - 4 : at], "big")
    assert len(pixels(bytes(data)))
    data[at + 4 + length + bit // 8] ^= 1 << bit % 8
    assert refusal(bytes(data)).reason == "image_corrupt"


@pytest.mark.parametrize("name", ["PLTE", "IDAT", "IEND", "tRNS"])
def test_a_name_that_a_flipped_bit_makes_ancillary(name: str) -> None:
    image = photo().quantize(16)
    whole = encode(image, "PNG", transparency=bytes([255, 0, 128]))
    at = whole.index(name.encode())
    for bit in range(32):
        data = bytearray(whole)
        data[at + bit // 8] ^= 1 << bit % 8
        assert refusal(bytes(data)).reason == "image_corrupt"


def test_a_palette_image_without_a_palette() -> None:
    data = png((b"IDAT", zlib.compress(bytes(5) * 4)), colour=3)
    assert refusal(data).reason == "image_corrupt"


@pytest.mark.parametrize("size", [0, 17, 300, 5000])
def test_transparency_that_does_not_fit_is_ignored_as_by_libpng(size: int) -> None:
    data = encode(photo().quantize(16), "PNG")
    assert as_opencv(with_chunk(data, chunk("tRNS", bytes(size))))
    assert as_opencv(with_chunk(data, chunk("tRNS", bytes(3)), b"PLTE"))
    assert as_opencv(with_chunk(data, chunk("tRNS", bytes(3)), b"IEND"))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_transparency_of_other_lengths(mode: str) -> None:
    data = encode(photo().convert(mode), "PNG")
    assert as_opencv(with_chunk(data, chunk("tRNS", bytes(5))))


def test_an_orientation_behind_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    data = with_chunk(encode(photo(), "PNG"), chunk("eXIf", block), b"IEND")
    upright = photo()
    upright.getexif()[0x0112] = 6
    assert np.array_equal(pixels(data), np.asarray(ImageOps.exif_transpose(upright)))


def test_many_chunks() -> None:
    data = encode(photo(), "PNG", compress_level=0)
    at = data.index(b"IDAT")
    length = int.from_bytes(data[at - 4 : at], "big")
    body = data[at + 4 : at + 4 + length]
    pieces = b"".join(chunk("IDAT", body[i : i + 7]) for i in range(0, len(body), 7))
    split = data[: at - 4] + pieces + data[at + 8 + length :]
    assert as_opencv(split)
    between = split.index(b"IDAT", at + 30) - 4
    apart = split[:between] + chunk("tEXt", b"a\0b") + split[between:]
    assert refusal(apart).reason == "image_corrupt"


def test_apples_own_pngs_are_named() -> None:
    data = encode(photo(), "PNG")
    crushed = data[:8] + chunk("CgBI", b"\x50\x00\x20\x06") + data[8:]
    error = refusal(crushed)
    assert (error.reason, "CgBI" in error.detail) == ("unsupported_format", True)
