"""Every kind of dirty image becomes upright RGB or a row with a reason; files are made here."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from pipeline import schema
from pipeline.errors import RowError
from pipeline.prepare.images import PrepareImages
from pipeline.prepare.processor import ImageProcessor
from tests.pictures import FORMATS, MAX_PIXELS, decode, encode, photo, pixels, png, refusal

# ---- what decodes ----


@pytest.mark.parametrize("form", FORMATS)
def test_formats_on_the_allow_list(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    decoded = decode(encode(photo(), form, **options))
    assert (decoded.format, decoded.orientation) == (form, 1)
    assert (decoded.height, decoded.width) == (60, 80)
    assert (decoded.image.mode, decoded.image.size) == ("RGB", (80, 60))
    if form in ("PNG", "WEBP", "BMP", "TIFF"):
        assert np.array_equal(np.asarray(decoded.image), np.asarray(photo()))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_compressions(compression: str) -> None:
    assert np.array_equal(pixels(encode(photo(), "TIFF", compression=compression)), photo())


def test_jpeg_pixels_are_pillows_own() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_the_first_frame_of_many(form: str) -> None:
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    decoded = decode(data)
    assert decoded.format == form
    red = np.asarray(decoded.image, np.int16) - (255, 0, 0)
    assert np.abs(red).max() <= 8


# ---- modes ----


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_plain_modes_are_pillows_own(mode: str) -> None:
    image = photo().convert(mode)
    data = encode(image, "TIFF")
    decoded = decode(data)
    assert decoded.mode == mode
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decoded.image), expected)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_converted(form: str) -> None:
    decoded = decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), form))
    assert decoded.mode == "CMYK"
    red = np.asarray(decoded.image, np.int16) - (255, 0, 0)
    assert np.abs(red).max() <= 4


def test_ycck_is_converted() -> None:
    # Adobe's marker with transform 2 makes the same components YCCK.
    data = encode(photo().convert("CMYK"), "JPEG", quality=95)
    at = data.index(b"\xff\xda")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x02"
    start = data.index(b"Adobe") - 4 if b"Adobe" in data else None
    if start is not None:
        data = data[:start] + adobe + data[start + len(adobe) :]
    else:
        data = data[:at] + adobe + data[at:]
    decoded = decode(data)
    assert (decoded.mode, decoded.image.mode) == ("CMYK", "RGB")
    with Image.open(io.BytesIO(data)) as plain:
        assert np.array_equal(np.asarray(decoded.image), np.asarray(plain.convert("RGB")))


def test_lab_is_converted() -> None:
    decoded = decode(encode(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"))
    assert decoded.mode == "LAB"
    assert np.asarray(decoded.image).min() >= 250


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = decode(encode(Image.fromarray(values), form))
    assert decoded.mode.startswith("I;16")
    expected = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(decoded.image), np.repeat(expected[..., None], 3, 2))


def test_16_bit_grey_big_endian() -> None:
    values = np.linspace(0, 65535, 64).astype(">u2").reshape(8, 8)
    image = Image.frombytes("I;16B", (8, 8), values.tobytes())
    assert np.array_equal(pixels(encode(image, "TIFF"))[..., 0], np.rint(values / 257.0))


def test_16_bit_grey_with_a_transparent_value() -> None:
    values = np.array([[0, 1000], [2000, 65535]], np.uint16)
    data = encode(Image.fromarray(values), "PNG", transparency=1000)
    assert pixels(data)[..., 0].tolist() == [[0, 255], [8, 255]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_unknown_units_are_stretched_over_the_images_own_range(dtype: type) -> None:
    values = np.array([[-100, 0], [100, 300]], dtype)
    decoded = decode(encode(Image.fromarray(values), "TIFF"))
    assert decoded.mode in ("I", "F")
    assert np.asarray(decoded.image)[..., 1].tolist() == [[0, 64], [128, 255]]


def test_floats_that_are_not_finite() -> None:
    values = np.array([[np.nan, np.inf, -np.inf], [0, 0.5, 1]], np.float32)
    assert pixels(encode(Image.fromarray(values), "TIFF"))[..., 0].tolist() == [
        [0, 255, 0],
        [0, 128, 255],
    ]


@pytest.mark.parametrize("value", [0.0, 7.5, np.nan, np.inf])
def test_flat_floats_are_black(value: float) -> None:
    image = Image.fromarray(np.full((3, 3), value, np.float32))
    assert not pixels(encode(image, "TIFF")).any()


def test_the_whole_range_of_floats() -> None:
    values = np.array([[-3e38, 0, 3e38]], np.float32)
    assert pixels(encode(Image.fromarray(values), "TIFF"))[..., 0].tolist() == [[0, 128, 255]]


# ---- transparency ----


def half_transparent(mode: str) -> Image.Image:
    """Left opaque black, right black behind full transparency."""
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (0, 0, 4, 4))
    image = Image.new("L" if mode == "LA" else "RGB", (8, 4), "black")
    image.putalpha(alpha)
    return image


def palette_with_transparency(transparency: int | bytes) -> bytes:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.paste(1, (4, 0, 8, 4))
    return encode(image, "PNG", transparency=transparency)


TRANSPARENT: dict[str, Callable[[], bytes]] = {
    "RGBA png": lambda: encode(half_transparent("RGBA"), "PNG"),
    "RGBA webp": lambda: encode(half_transparent("RGBA"), "WEBP", lossless=True),
    "RGBA avif": lambda: encode(half_transparent("RGBA"), "AVIF", quality=100),
    "RGBA tiff": lambda: encode(half_transparent("RGBA"), "TIFF"),
    "RGBa tiff": lambda: encode(half_transparent("RGBA"), "TIFF", tiffinfo={338: 1}),
    "LA png": lambda: encode(half_transparent("LA"), "PNG"),
    "LA tiff": lambda: encode(half_transparent("LA"), "TIFF"),
    "P one colour": lambda: palette_with_transparency(1),
    "P alpha table": lambda: palette_with_transparency(b"\xff\x00"),
    "P gif": lambda: encode(
        Image.open(io.BytesIO(palette_with_transparency(1))), "GIF", transparency=1
    ),
    "RGB with a transparent colour": lambda: png(
        (b"tRNS", struct.pack(">HHH", 9, 9, 9)),
        (b"IDAT", zlib.compress((b"\0" + bytes(12) + b"\x09" * 12) * 4)),
        size=(4, 8),
    ),
    "L with a transparent value": lambda: png(
        (b"tRNS", struct.pack(">H", 9)),
        (b"IDAT", zlib.compress((b"\0" + bytes(4) + b"\x09" * 4) * 4)),
        size=(4, 8),
        colour=0,
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_composited_on_white(name: str) -> None:
    image = pixels(TRANSPARENT[name]())
    assert image.shape == (4, 8, 3)
    assert image[:, :4].max() <= 3
    assert image[:, 4:].min() >= 252


def test_half_transparency_is_mixed() -> None:
    assert pixels(encode(Image.new("RGBA", (2, 2), (200, 0, 100, 128)), "PNG"))[0, 0].tolist() == [
        227,
        127,
        177,
    ]


def test_wide_images_are_composited_in_bands_without_seams() -> None:
    image = Image.effect_noise((1500, 1200), 90).convert("RGB")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    white = Image.new("RGBA", image.size, "white")
    expected = np.asarray(Image.alpha_composite(white, image).convert("RGB"), np.int16)
    actual = np.asarray(decode(encode(image, "PNG"), max_pixels=10**7).image, np.int16)
    assert np.abs(actual - expected).max() <= 1


# ---- orientation ----


def oriented(form: str, orientation: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations(form: str, orientation: int) -> None:
    data = oriented(form, orientation)
    decoded = decode(data)
    assert decoded.orientation == orientation
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(decoded.image), upright)
    turned = orientation >= 5
    assert (decoded.height, decoded.width) == ((80, 60) if turned else (60, 80))


# Orientation as the text "6".
_TEXT = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0" + bytes(4)


@pytest.mark.parametrize("orientation", [0, 9, 65535, _TEXT])
def test_orientations_that_mean_nothing(orientation: int | bytes) -> None:
    if isinstance(orientation, bytes):
        data = encode(photo(), "JPEG", exif=b"Exif\0\0" + orientation)
    else:
        data = oriented("JPEG", orientation)
    decoded = decode(data)
    assert (decoded.orientation, decoded.height) == (1, 60)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 40]
)
def test_a_broken_exif_block_does_not_fail_the_image(form: str, exif: bytes) -> None:
    decoded = decode(encode(photo(), form, exif=exif))
    assert (decoded.orientation, decoded.height, decoded.width) == (1, 60, 80)


# ---- what is refused ----


def test_zero_bytes() -> None:
    assert refusal(b"").reason == "image_empty"


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"<html><svg></svg></html>",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        b'{"error": "not found"}',
        b"Not Found",
        b"BMW is a car maker, this is no bitmap",
        b"\0" * 1000,
        bytes(range(256)),
        b"\x1f\x8b\x08\0\0\0\0\0",
        b"PK\x03\x04 zip",
        b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41",
        b"\x89",
    ],
)
def test_what_is_not_an_image(data: bytes) -> None:
    assert refusal(data).reason == "not_an_image"


UNSUPPORTED = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "HEIC as mif1": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100),
    "SVG": b"\xef\xbb\xbf\n<?xml version='1.0'?><!-- hi --><svg xmlns='x'></svg>",
    "bare SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "DICOM": bytes(128) + b"DICM" + bytes(100),
    "CR2": b"II*\0\x10\0\0\0CR\x02\0" + bytes(100),
    "FITS": b"SIMPLE  =                    T" + b" " * 2850,
    "PSD": b"8BPS\0\1" + bytes(100),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "JXL": b"\xff\x0a" + bytes(100),
    "CR3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(100),
    "PCX": b"\n\5\1\x08" + bytes(124),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_formats_off_the_allow_list(name: str) -> None:
    error = refusal(UNSUPPORTED[name])
    assert error.reason == "unsupported_format"
    assert error.detail.split()[0] in name or error.detail in ("camera raw", "JPEG XL")


@pytest.mark.parametrize("form", ["EPS", "PDF", "PPM", "ICO", "DDS", "SGI", "JPEG2000", "QOI"])
def test_formats_that_pillow_could_open_are_not_opened(form: str) -> None:
    assert refusal(encode(photo(), form)).reason == "unsupported_format"


@pytest.mark.parametrize("form", [*FORMATS, "MPO"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_truncated_files(form: str, share: float) -> None:
    frames = {"save_all": True, "append_images": [photo()]} if form == "MPO" else {}
    data = encode(photo(), form, **frames)
    # Nine tenths of an MPO still hold its whole first frame.
    cut = int(len(data) * min(share, 0.4 if form == "MPO" else 1))
    assert refusal(data[: max(cut, 30)]).reason == "image_corrupt"


@pytest.mark.parametrize("at", [0.2, 0.4, 0.6, 0.8])
def test_a_png_with_a_flipped_bit(at: float) -> None:
    data = bytearray(encode(photo(), "PNG"))
    data[int(len(data) * at)] ^= 1
    assert refusal(bytes(data)).reason == "image_corrupt"


def test_every_flipped_bit_of_a_png_is_noticed() -> None:
    """Pillow alone gives other pixels for some of them; only the last checksum holds none."""
    whole = encode(photo(4, 5), "PNG")
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert np.array_equal(pixels(bytes(data)), photo(4, 5))
        except RowError as error:
            refused = error
        else:
            assert bit // 8 >= len(whole) - 4
            continue
        assert refused.reason in ("image_corrupt", "not_an_image", "too_many_pixels")


def test_truncated_stays_truncated_where_a_library_made_pillow_lenient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert refusal(encode(photo(), "JPEG")[:-400]).reason == "image_corrupt"
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_bombs_are_refused_before_decoding() -> None:
    rows = zlib.compress(bytes(30001) * 3, 9)  # far fewer rows than promised: never looked at
    error = refusal(png((b"IDAT", rows), size=(30000, 10000)))
    assert error.reason == "too_many_pixels"
    assert str(MAX_PIXELS) in error.detail


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_the_pixel_cap_is_exact(form: str) -> None:
    data = encode(Image.new("RGB", (100, 50)), form)
    assert decode(data, 5000).width == 100
    assert refusal(data, 4999).reason == "too_many_pixels"
    assert refusal(data, 1000).reason == "too_many_pixels"


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (1, 1001)])
def test_extreme_aspects(size: tuple[int, int]) -> None:
    assert refusal(encode(Image.new("L", size), "PNG")).reason == "extreme_aspect"


def test_the_longest_aspect_that_passes() -> None:
    assert decode(encode(Image.new("L", (1, 1000)), "PNG")).height == 1000


def test_pillows_own_bomb_check_stays_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow warns above its limit and raises above twice that.
    data = encode(photo(), "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(data).width == 80
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_metadata_bombs_stay_small() -> None:
    text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(50_000_000), 9)
    pixel_rows = (b"IDAT", zlib.compress(bytes(13) * 4))
    assert not pixels(png((b"iTXt", text), pixel_rows)).any()


def patched_tiff(tag: int, value: int) -> bytes:
    """An 8 x 8 grey TIFF whose tag (SHORT or LONG, one value) has been overwritten."""
    data = bytearray(encode(Image.new("L", (8, 8)), "TIFF"))
    at = struct.unpack_from("<I", data, 4)[0]
    for i in range(struct.unpack_from("<H", data, at)[0]):
        entry = at + 2 + 12 * i
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HII", data, entry + 2, 4, 1, value)
            return bytes(data)
    raise KeyError(tag)


@pytest.mark.parametrize(
    ("tag", "value", "reason"),
    [
        (256, 10**9, "too_many_pixels"),
        (257, 2**32 - 1, "too_many_pixels"),
        (256, 0, "image_corrupt"),
        (258, 999, "image_corrupt"),
        (259, 4242, "image_corrupt"),
        (273, 2**31, "image_corrupt"),
        (262, 77, "image_corrupt"),
    ],
)
def test_tiffs_with_absurd_tags(tag: int, value: int, reason: str) -> None:
    assert refusal(patched_tiff(tag, value)).reason == reason


def test_details_are_the_same_in_every_run_and_hold_no_bytes_of_the_image() -> None:
    data = encode(photo(), "PNG").replace(b"IDAT", b"ID\xffT")
    first, second = refusal(data), refusal(bytes(bytearray(data)))
    assert first.detail == second.detail
    for raw in ("0x", "\\x", "b'"):
        assert raw not in first.detail


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*FORMATS, "MPO"]), st.data())
def test_damage_never_escapes(form: str, data: st.DataObject) -> None:
    broken = bytearray(encode(photo(24, 24), form))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(RowError):
            assert decode(bytes(broken)).image.mode == "RGB"


# ---- the stage ----

PROCESSOR = ImageProcessor.from_dict(
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 32}}
)


def record(row: int, image: bytes = b"", **columns: Any) -> dict[str, Any]:
    blank = {"stage": "", "reason": "", "detail": "", "retryable": False}
    return {
        "shard": "a.tar",
        "version": "v1",
        "row": row,
        "key": f"k{row}",
        "member": f"k{row}.jpg",
        "image": image,
        "text": "",
        "total": -1,
        "skipped": 0,
        **blank,
        **columns,
    }


def test_a_batch_of_records() -> None:
    records = [
        record(0, oriented("JPEG", 6)),
        record(1, b"<html>"),
        record(2, stage="read", reason="member_too_large", detail="big", retryable=True),
        record(3, encode(half_transparent("RGBA"), "PNG")),
        record(-1, total=4, stage="read", reason="shard_truncated", detail="cut"),
        record(-1, total=4),
    ]
    table = PrepareImages(PROCESSOR, MAX_PIXELS)(pa.Table.from_pylist(records, schema.RECORDS))
    assert table.schema.equals(schema.PIXELS)
    out = table.to_pylist()

    carried = set(schema.RECORDS.names) - {"image", "stage", "reason", "detail"}
    assert [{name: row[name] for name in carried} for row in out] == [
        {name: row[name] for name in carried} for row in records
    ]
    expected = PROCESSOR.resize(decode(records[0]["image"]).image)
    assert np.array_equal(np.frombuffer(out[0]["pixels"], np.uint8).reshape(24, 32, 3), expected)
    assert len(out[3]["pixels"]) == 24 * 32 * 3
    assert not any(out[i]["pixels"] for i in (1, 2, 4, 5))

    reasons = ["", "not_an_image", "member_too_large", "", "shard_truncated", ""]
    assert [row["reason"] for row in out] == reasons
    assert [row["stage"] for row in out] == ["", "decode", "read", "", "read", ""]
    assert out[2]["detail"] == "big"
    assert out[1]["detail"]

    facts = ("height", "width", "format", "mode", "orientation", "size_bytes")
    found = [[row[name] for name in facts] for row in out]
    assert found[0] == [80, 60, "JPEG", "RGB", 6, len(records[0]["image"])]
    assert found[3] == [4, 8, "PNG", "RGBA", 1, len(records[3]["image"])]
    assert found[1] == [0, 0, "", "", 0, 0]


def test_an_empty_batch() -> None:
    out = PrepareImages(PROCESSOR, MAX_PIXELS)(schema.RECORDS.empty_table())
    assert out.equals(schema.PIXELS.empty_table())
