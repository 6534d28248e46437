"""A valid file of a layout that Pillow lacks is unsupported, by name; a damaged one is corrupt."""

from __future__ import annotations

import io
import struct

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import RowError
from tests.pictures import decode, encode, photo, pixels, refusal

GREY_12 = np.asarray(photo().convert("L")).astype(np.uint16) * 16
GREY = np.asarray(photo().convert("L"))


def opencv(data: bytes) -> np.ndarray:
    """(H, W, 3) RGB."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image[..., ::-1]


# ---- JPEG ----

JPEGS = {
    "extended, 12 bits": lambda: imagecodecs.jpeg8_encode(GREY_12, bitspersample=12),
    "lossless, 12 bits": lambda: imagecodecs.jpeg8_encode(GREY_12, bitspersample=12, lossless=True),
    "lossless, 16 bits": lambda: imagecodecs.jpeg8_encode(GREY_12, bitspersample=16, lossless=True),
    "JPEG-LS, 8 bits": lambda: imagecodecs.jpegls_encode(GREY),
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_that_pillow_lacks(name: str) -> None:
    data = bytes(JPEGS[name]())
    error = refusal(data)
    assert error.reason == "unsupported_format"
    assert name in error.detail
    for share in (0.1, 0.5, 0.9):
        assert refusal(data[: int(len(data) * share)]).reason == "image_corrupt"


def reframed(marker: int, *, bits: int = 8, **options: object) -> bytes:
    """A baseline JPEG under the marker of another kind: the header of that kind's, at least."""
    data = bytearray(encode(photo(), "JPEG", **options))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, bits
    return bytes(data)


@pytest.mark.parametrize(
    ("marker", "name"), [(0xC5, "hierarchical"), (0xCB, "arithmetic lossless"), (0xC7, "lossless")]
)
def test_frames_that_no_decoder_has(marker: int, name: str) -> None:
    error = refusal(reframed(marker))
    assert error.reason == "unsupported_format"
    assert name in error.detail


@pytest.mark.parametrize(("marker", "bits"), [(0xC0, 12), (0xC0, 9), (0xC1, 10), (0xC2, 0)])
def test_depths_that_no_frame_has(marker: int, bits: int) -> None:
    assert refusal(reframed(marker, bits=bits)).reason == "image_corrupt"


def test_a_jpeg_of_two_components() -> None:
    data = bytearray(encode(photo().convert("L"), "JPEG"))
    at = data.index(b"\xff\xc0")
    header = data[at + 4 : at + 9] + b"\2" + data[at + 10 : at + 13] + b"\2\x11\0"
    data[at + 2 : at + 13] = struct.pack(">H", 14) + header
    assert "2 components" in refusal(bytes(data)).detail


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_supported_jpegs_equal_opencv_and_stay_corrupt_when_damaged(
    mode: str, options: dict[str, object]
) -> None:
    data = encode(photo().convert(mode), "JPEG", **options)
    assert np.abs(pixels(data).astype(int) - opencv(data)).max() <= (mode == "CMYK")
    for share in (0.2, 0.5, 0.9):
        assert refusal(data[: int(len(data) * share)]).reason == "image_corrupt"
    lossless = bytes(imagecodecs.jpeg8_encode(np.asarray(photo()), lossless=True))
    assert np.array_equal(pixels(lossless), np.asarray(photo()))
    assert refusal(lossless[: len(lossless) // 2]).reason == "image_corrupt"


# ---- BMP ----


def bmp(
    bits: int,
    body: bytes,
    *,
    header: int = 40,
    compression: int = 0,
    palette: bytes = b"",
    colours: int = 0,
    masks: tuple[int, ...] = (),
) -> bytes:
    """20 x 37 pixels."""
    info = struct.pack("<IiiHHIIiiII", header, 37, 20, 1, bits, compression, 0, 0, 0, colours, 0)
    fields = struct.pack(f"<{len(masks)}I", *masks)
    info = info + fields if header == 40 else (info + fields).ljust(header, b"\0")
    start = 14 + len(info) + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    return head + info + palette + body


def rows(bits: int, seed: int = 0, mask: int = 255) -> bytes:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, 20 * ((37 * bits + 31) // 32 * 4)) & mask).astype("u1").tobytes()


BLACK_WHITE = bytes([0, 0, 0, 0, 255, 255, 255, 0])
GREY_RAMP = b"".join(bytes([i, i, i, 0]) for i in range(16))
BMPS_WRONG_IN_PILLOW = {
    "8 bits, two colours": bmp(8, rows(8, mask=1), palette=BLACK_WHITE, colours=2),
}
BMPS = {
    **{f"{bits} bits": bmp(bits, rows(bits)) for bits in (24, 32)},
    **{f"{bits} bits": bmp(bits, rows(bits), palette=rows(32)[: 4 << bits]) for bits in (1, 4, 8)},
    "1 bit, black and white": bmp(1, rows(1), palette=BLACK_WHITE),
    "8 bits, grey ramp": bmp(8, rows(8, mask=15), palette=GREY_RAMP, colours=16),
    "bitfields of 32": bmp(32, rows(32), compression=3, masks=(0xFF0000, 0xFF00, 0xFF), header=56),
    **BMPS_WRONG_IN_PILLOW,
}
BMPS_LACKING = {
    "2 bits": bmp(2, rows(2), palette=bytes(16)),
    "bitfields f00 f0 f of 16": bmp(16, rows(16), compression=3, masks=(0xF00, 0xF0, 0xF)),
    "bitfields 3ff00000 ffc00 3ff of 32": bmp(
        32, rows(32), compression=3, masks=(0x3FF00000, 0xFFC00, 0x3FF)
    ),
    "bitfields ff ff00 ff0000 of 32": bmp(
        32, rows(32), compression=3, masks=(0xFF, 0xFF00, 0xFF0000), header=108
    ),
    "JPEG inside": bmp(0, encode(photo(), "JPEG"), compression=4),
    "PNG inside": bmp(0, encode(photo(), "PNG"), compression=5),
    "OS/2, run-length": bmp(24, rows(24), compression=4, header=64),
    "grey palette": bmp(4, rows(4, mask=0x11), palette=BLACK_WHITE, colours=2),
    "4 bits with a grey palette": bmp(4, rows(4), palette=GREY_RAMP, colours=16),
    "pixels left out": bmp(
        8, b"\5\7\0\2\3\4\6\x09\0\0\5\x08\0\1", compression=1, palette=rows(32)[:1024]
    ),
}


@pytest.mark.parametrize("name", BMPS)
def test_bmps_equal_opencv(name: str) -> None:
    assert np.array_equal(pixels(BMPS[name]), opencv(BMPS[name]))
    assert refusal(BMPS[name][:-100]).reason == "image_corrupt"


@pytest.mark.parametrize("name", BMPS_LACKING)
def test_bmps_that_pillow_lacks(name: str) -> None:
    error = refusal(BMPS_LACKING[name])
    assert error.reason == "unsupported_format"
    assert name in error.detail
    assert refusal(BMPS_LACKING[name][:-6]).reason == "image_corrupt"


@pytest.mark.parametrize("masks", [(0xF0F, 0xF0, 0), (0xFF, 0xFF, 0xFF), (0xFF00, 0xFFF, 0)])
def test_bitfields_that_cannot_be(masks: tuple[int, ...]) -> None:
    assert refusal(bmp(16, rows(16), compression=3, masks=masks)).reason == "image_corrupt"


# ---- others ----


def test_an_avif_beyond_its_decoders_limit_has_too_many_pixels() -> None:
    data = bytearray(encode(photo(), "AVIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", 17000, 17000)
    error = refusal(bytes(data))
    assert (error.reason, "17000 x 17000" in error.detail) == ("too_many_pixels", True)
    data[at : at + 8] = struct.pack(">II", 0, 80)
    assert refusal(bytes(data)).reason == "image_corrupt"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_tga_is_no_icon(mode: str, compression: str | None) -> None:
    data = encode(photo().convert(mode), "TGA", compression=compression)
    for form in (data, data[:-26]):  # with its footer, and of version 1
        assert (refusal(form).reason, refusal(form).detail) == ("unsupported_format", "TGA")


def test_icons_are_icons() -> None:
    icon = encode(photo().resize((32, 32)), "ICO", sizes=[(32, 32)])
    assert refusal(icon).detail == "ICO"
    assert refusal(icon[:2] + b"\2" + icon[3:]).detail == "CUR"


@pytest.mark.parametrize("form", ["PCX", "SGI", "PPM", "JPEG2000", "DDS", "ICNS", "MSP", "XBM"])
def test_what_pillow_writes_is_named_if_it_can_be(form: str) -> None:
    image = photo().resize((64, 64)).convert("1" if form in ("MSP", "XBM") else "RGB")
    error = refusal(encode(image, form))
    expected = "not_an_image" if form in ("MSP", "XBM") else "unsupported_format"
    assert error.reason == expected


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\n<!DOCTYPE HTML><html>404</html>", "HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "not found"}', "JSON"),
        (b"Not Found", "plain text"),
        (bytes(1000), "zero bytes"),
        (b"\x1f\x8b\x08\0\0", "gzip"),
        (b"PK\3\4zip", "ZIP"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "MP4"),
        (b"RIFF\0\0\0\0WAVEfmt ", "RIFF"),
        (b"\x1a\x45\xdf\xa3\x9f\x42", "Matroska"),
        (bytes(range(1, 256)), "no image format"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, named: str) -> None:
    error = refusal(data)
    assert (error.reason, named in error.detail) == ("not_an_image", True)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_flipped_bits_are_never_called_a_layout_of_another_kind(form: str) -> None:
    """A flip may make a valid header of another layout: rarely, and then it names that one."""
    whole = encode(photo(), form)
    rng, called = np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(4, min(len(data), 700))] ^= 1 << rng.integers(8)
        try:
            decode(bytes(data))
        except RowError as error:
            called += error.reason == "unsupported_format"
    assert called <= 6


def test_gifs_equal_opencv_and_disposal_leaves_the_first_frame_alone() -> None:
    image = photo().quantize(32)
    data = encode(image, "GIF")
    assert np.array_equal(pixels(data), opencv(data))
    frames = [photo().rotate(angle).quantize(32) for angle in (0, 90, 180)]
    for disposal in (0, 1, 2, 3):
        moving = encode(
            frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=disposal
        )
        assert np.array_equal(pixels(moving), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_equals_opencv(lossless: bool) -> None:
    data = encode(photo(), "WEBP", lossless=lossless)
    assert np.array_equal(pixels(data), opencv(data))


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avif_equals_opencv(bits: int) -> None:
    samples = np.asarray(photo()).astype(np.uint8 if bits == 8 else np.uint16)
    data = bytes(imagecodecs.avif_encode(samples << (bits - 8), bitspersample=bits))
    assert np.abs(pixels(data).astype(int) - opencv(data)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_pngs_equal_opencv(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, channels)).astype(np.uint16)
    values[..., 3:] = 65535
    data = cv2.imencode(".png", values)[1].tobytes()
    # Grey is rounded here, and cut off there.
    assert np.abs(pixels(data).astype(int) - opencv(data)).max() <= (channels == 1)


def test_ycck_equals_opencv() -> None:
    data = encode(photo().convert("CMYK"), "JPEG", quality=95)
    start = data.index(b"Adobe")
    ycck = data[: start + 11] + b"\2" + data[start + 12 :]
    assert Image.open(io.BytesIO(ycck)).mode == "CMYK"
    assert np.abs(pixels(ycck).astype(int) - opencv(ycck)).max() <= 1
