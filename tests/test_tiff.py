"""Every TIFF either gives the samples that tifffile reads, or is refused by its layout's name."""

from __future__ import annotations

import io
import itertools
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.color
import tifffile
from PIL import Image
from tiffs import DEFLATE, JPEG, LZW, NONE, PACKBITS, Tiff, file

from tests.pictures import decode, encode, photo, pixels, refusal

HEIGHT, WIDTH = 21, 37
WHITE_IS_ZERO, GREY, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
ANY, ASSOCIATED, UNASSOCIATED = 0, 1, 2  # extra samples

# Name: photometric, bits, type, samples, extra samples.
Kind = tuple[int, int, str, int, tuple[int, ...]]
DECODED: dict[str, Kind] = {
    **{f"grey {bits}": (GREY, bits, "u", 1, ()) for bits in (1, 2, 4, 8, 12, 16, 32)},
    **{f"white {bits}": (WHITE_IS_ZERO, bits, "u", 1, ()) for bits in (1, 2, 4, 8, 16)},
    **{f"grey {bits} signed": (GREY, bits, "i", 1, ()) for bits in (8, 16, 32)},
    "grey float": (GREY, 32, "f", 1, ()),
    "white float": (WHITE_IS_ZERO, 32, "f", 1, ()),
    "grey and more": (GREY, 8, "u", 2, (ANY,)),
    "grey premultiplied": (GREY, 8, "u", 2, (ASSOCIATED,)),
    "grey alpha": (GREY, 8, "u", 2, (UNASSOCIATED,)),
    **{f"palette {bits}": (PALETTE, bits, "u", 1, ()) for bits in (1, 2, 4, 8)},
    "palette and more": (PALETTE, 8, "u", 2, (ANY,)),
    "palette alpha": (PALETTE, 8, "u", 2, (UNASSOCIATED,)),
    **{f"rgb {bits}": (RGB, bits, "u", 3, ()) for bits in (8, 16)},
    **{f"rgb {bits} and more": (RGB, bits, "u", 4, (ANY,)) for bits in (8, 16)},
    **{f"rgb {bits} premultiplied": (RGB, bits, "u", 4, (ASSOCIATED,)) for bits in (8, 16)},
    **{f"rgb {bits} alpha": (RGB, bits, "u", 4, (UNASSOCIATED,)) for bits in (8, 16)},
    "rgb 8 and two more": (RGB, 8, "u", 5, (ANY, ANY)),
    "rgb 8 alpha and more": (RGB, 8, "u", 5, (UNASSOCIATED, ANY)),
    **{f"cmyk {bits}": (CMYK, bits, "u", 4, ()) for bits in (8, 16)},
    "cmyk 8 and more": (CMYK, 8, "u", 5, (ANY,)),
    "ycbcr": (YCBCR, 8, "u", 3, ()),
}
REFUSED: dict[str, Kind] = {
    **{f"grey {bits} float": (GREY, bits, "f", 1, ()) for bits in (16, 64)},
    **{f"rgb {bits}": (RGB, bits, "u", 3, ()) for bits in (4, 12, 32)},
    **{f"rgb {bits} signed": (RGB, bits, "i", 3, ()) for bits in (8, 16)},
    "rgb float": (RGB, 32, "f", 3, ()),
    "grey 16 alpha": (GREY, 16, "u", 2, (UNASSOCIATED,)),
    "white alpha": (WHITE_IS_ZERO, 8, "u", 2, (UNASSOCIATED,)),
    "white signed": (WHITE_IS_ZERO, 16, "i", 1, ()),
    "cmyk alpha": (CMYK, 8, "u", 5, (UNASSOCIATED,)),
    "lab 16": (CIELAB, 16, "u", 3, ()),
    "icclab": (9, 8, "u", 3, ()),
    "ycbcr 16": (YCBCR, 16, "u", 3, ()),
    "colour filter array": (32803, 16, "u", 1, ()),
}
# What is refused in one storage, and decoded in another.
PLANES_REFUSED = ("grey premultiplied", "grey alpha", "palette alpha", "rgb 8 alpha and more")
BIG_ENDIAN_REFUSED = ("grey 12", "grey 32", "white 16")

STORAGE = [
    {"tile": tile, "order": order, "compression": compression, "predictor": predictor}
    for tile, order, (compression, predictor) in itertools.product(
        (0, 16), "<>", ((NONE, 1), (LZW, 1), (LZW, 2), (DEFLATE, 3), (DEFLATE, 1), (PACKBITS, 1))
    )
]


def make(kind: Kind, **storage: Any) -> Tiff:
    photometric, bits, letter, count, extra = kind
    rng = np.random.default_rng(bits)
    if letter == "f":
        samples = rng.normal(size=(HEIGHT, WIDTH, count)).astype(f"f{bits // 8}")
    else:
        low, high = (0, 1 << bits) if letter == "u" else (-1 << bits - 1, 1 << bits - 1)
        size = {1: 1, 2: 1, 4: 1, 12: 2}.get(bits, bits // 8)
        samples = rng.integers(low, high, (HEIGHT, WIDTH, count)).astype(f"{letter}{size}")
    if extra[:1] == (ASSOCIATED,):
        alpha = samples[..., -1:] / ((1 << bits) - 1)
        samples[..., :-1] = (samples[..., :-1] * alpha).astype(samples.dtype)
    tags = {530: [1, 1]} if photometric == YCBCR else {}
    if photometric == PALETTE:
        tags = {320: rng.integers(256, 65536, 3 << bits).tolist()}
    fields: dict[str, Any] = {"photometric": photometric, "bits": bits, "extra": extra}
    return Tiff(samples=samples, tags=tags, **fields, **storage)


def expected(tiff: Tiff, samples: np.ndarray) -> np.ndarray:
    """The RGB of the rules in pipeline/prepare/convert.py, in float64."""
    largest = (1 << tiff.bits) - 1
    values = samples.astype(np.float64)
    first = values[..., 0]
    if tiff.photometric in (WHITE_IS_ZERO, GREY):
        if samples.dtype.kind == "u" and tiff.bits <= 16:
            low, high = 0.0, float(largest)
        else:
            low, high = first.min(), first.max()
        grey = (first - low) / (high - low) * 255
        grey = np.rint(255 - grey if tiff.photometric == WHITE_IS_ZERO else grey)
        rgb = np.repeat(grey[..., None], 3, 2)
    elif tiff.photometric == PALETTE:
        rgb = (np.reshape(tiff.tags[320], (3, -1)).T >> 8)[samples[..., 0]].astype(np.float64)
    else:
        upper = np.ascontiguousarray(samples >> (tiff.bits - 8)).astype(np.uint8)
        if tiff.photometric == RGB:
            rgb = upper[..., :3].astype(np.float64)
        else:
            mode, bands = ("CMYK", 4) if tiff.photometric == CMYK else ("YCbCr", 3)
            image = Image.frombytes(mode, (WIDTH, HEIGHT), upper[..., :bands].tobytes())
            rgb = np.asarray(image.convert("RGB"), np.float64)
    if not tiff.extra or tiff.extra[0] == ANY:
        return rgb
    alpha = np.floor(values[..., -len(tiff.extra)] * 256 / (largest + 1))[..., None]
    if tiff.extra[0] == UNASSOCIATED:
        rgb = rgb * alpha / 255
    return np.clip(rgb + 255 - alpha, 0, 255)


def read(data: bytes, planar: int) -> np.ndarray:
    """(H, W, S): the reference."""
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        samples = opened.pages[0].asarray()
    if samples.dtype == bool:
        samples = samples.astype(np.uint8)
    if samples.ndim == 2:
        samples = samples[..., None]
    return np.moveaxis(samples, 0, 2) if planar == 2 and samples.shape[2] == WIDTH else samples


def suits(storage: dict[str, Any], kind: Kind) -> bool:
    _, bits, letter, _, _ = kind
    if storage["predictor"] == 2:
        return letter != "f" and bits in (8, 16, 32)
    return storage["predictor"] == 1 or letter == "f"


def assert_right(tiff: Tiff) -> None:
    data = tiff.encode()
    samples = read(data, tiff.planar)
    assert np.array_equal(samples, tiff.samples)
    difference = np.abs(pixels(data) - expected(tiff, samples))
    assert difference.max() <= (2 if tiff.photometric == YCBCR or tiff.extra else 0), tiff


def assert_refused(tiff: Tiff) -> None:
    error = refusal(tiff.encode())
    assert error.reason == "unsupported_format", tiff
    assert f"{tiff.samples.shape[2]} x {tiff.bits}-bit" in error.detail
    assert ("separate planes" in error.detail) == (tiff.planar == 2)


@pytest.mark.parametrize("planar", [1, 2], ids=["contiguous", "planes"])
@pytest.mark.parametrize("name", DECODED)
def test_pixels_equal_tifffiles_samples(name: str, planar: int) -> None:
    kind = DECODED[name]
    for storage in STORAGE:
        if not suits(storage, kind):
            continue
        tiff = make(kind, planar=planar, **storage)
        refused = (planar == 2 and name in PLANES_REFUSED) or (
            storage["order"] == ">" and name in BIG_ENDIAN_REFUSED
        )
        (assert_refused if refused else assert_right)(tiff)


@pytest.mark.parametrize("planar", [1, 2], ids=["contiguous", "planes"])
@pytest.mark.parametrize("name", REFUSED)
def test_layouts_off_pillows_tables_are_named(name: str, planar: int) -> None:
    for storage in STORAGE:
        if suits(storage, REFUSED[name]):
            assert_refused(make(REFUSED[name], planar=planar, **storage))


@pytest.mark.parametrize("name", ["rgb 8", "rgb 16", "grey 16", "rgb 8 alpha", "grey 1", "grey 32"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_planes_and_tiles(name: str, orientation: int) -> None:
    for planar, tile, compression in itertools.product((1, 2), (0, 16), (NONE, LZW)):
        tiff = make(DECODED[name], planar=planar, tile=tile, compression=compression)
        tiff.tags[274] = [orientation]
        plain = expected(tiff, tiff.samples)
        turn = {
            2: lambda rgb: rgb[:, ::-1],
            3: lambda rgb: rgb[::-1, ::-1],
            4: lambda rgb: rgb[::-1],
            5: lambda rgb: rgb.transpose(1, 0, 2),
            6: lambda rgb: np.rot90(rgb, -1),
            7: lambda rgb: np.rot90(rgb[::-1], -1)[::-1, ::-1],
            8: np.rot90,
        }.get(orientation, lambda rgb: rgb)
        decoded = decode(tiff.encode())
        assert decoded.orientation == orientation
        assert np.abs(np.asarray(decoded.image) - turn(plain)).max() <= 2 * bool(tiff.extra)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("compression", [NONE, LZW])
def test_bits_filled_in_from_the_right(bits: int, compression: int) -> None:
    assert_right(make((GREY, bits, "u", 1, ()), compression=compression, fill=2))


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("photometric", [GREY, RGB, YCBCR])
def test_jpeg_inside(photometric: int, tile: int) -> None:
    samples = np.asarray(photo(32, 48))[..., : 1 if photometric == GREY else 3]
    tags = {530: [1, 1]} if photometric == YCBCR else {}
    tiff = Tiff(
        samples=samples, photometric=photometric, compression=JPEG, tile=tile, bits=8, tags=tags
    )
    data = tiff.encode()
    assert np.array_equal(pixels(data), opencv(data))


def opencv(data: bytes) -> np.ndarray:
    """(H, W, 3) RGB."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image[..., ::-1]


def test_a_palette_of_8_bits() -> None:
    tiff = make(DECODED["palette 8"])
    tiff.tags[320][:] = np.random.default_rng(0).integers(0, 256, 768).tolist()
    data = tiff.encode()
    assert np.array_equal(pixels(data), opencv(data))


@pytest.mark.parametrize("tags", [{530: ("H", [2, 2])}, {}], ids=["2 x 2", "as by default"])
def test_subsampled_ycbcr_without_compression(tags: dict[int, Any]) -> None:
    ycbcr = np.asarray(photo(16, 32).convert("YCbCr"))
    blocks = ycbcr.reshape(8, 2, 16, 2, 3).transpose(0, 2, 1, 3, 4)
    units = np.concatenate([blocks[..., 0].reshape(8, 16, 4), blocks[:, :, 0, 0, 1:]], axis=2)
    tags = tags | {256: ("I", [32]), 257: ("I", [16]), 258: ("H", [8, 8, 8]), 259: ("H", [1])}
    tags |= {262: ("H", [YCBCR]), 277: ("H", [3]), 278: ("I", [16])}
    tags |= {273: ("I", [8]), 279: ("I", [units.size])}
    data = file(tags, units.tobytes())
    assert np.array_equal(pixels(data), opencv(data))


def test_cielab_under_d50() -> None:
    rgb = np.asarray(photo())
    # Bradford's adaptation of D65, which is sRGB's, to D50 (Lindbloom).
    to_d50 = [
        [1.0478112, 0.0228866, -0.0501270],
        [0.0295424, 0.9904844, -0.0170491],
        [-0.0092345, 0.0150436, 0.7521316],
    ]
    lab = skimage.color.xyz2lab(skimage.color.rgb2xyz(rgb) @ np.transpose(to_d50), "D50")
    samples = np.dstack([np.rint(lab[..., 0] * 2.55), np.rint(lab[..., 1:]).astype(int) & 255])
    data = Tiff(samples=samples.astype(np.uint8), photometric=CIELAB).encode()
    difference = np.abs(pixels(data).astype(int) - rgb)
    assert difference.mean() < 1.5
    assert difference.max() <= 16


@pytest.mark.parametrize(
    "compression", ["webp", "jpeg2000", "png", "jpegxl", "jpegxr", "lerc", "zstd", "lzma"]
)
def test_other_compressions(compression: str) -> None:
    """Which of them a build of Pillow knows is its own affair."""
    written = io.BytesIO()
    options = {"compressionargs": {"level": 100, "lossless": True}} if compression == "webp" else {}
    samples = np.asarray(photo(32, 32))
    tifffile.imwrite(written, samples, photometric="rgb", compression=compression, **options)
    data = written.getvalue()
    if compression in ("zstd", "lzma"):
        assert np.array_equal(pixels(data), samples)
        return
    error = refusal(data)
    assert error.reason == "unsupported_format"
    assert f"{compression} inside" in error.detail.lower().replace(" 2000", "2000").replace(
        "jpeg x", "jpegx"
    )
    # Half of the file is no layout, but damage.
    directory_first = refusal(data[: len(data) - 200])
    assert directory_first.reason == "image_corrupt"


@pytest.mark.parametrize("order", "<>")
def test_bigtiff(order: str) -> None:
    written = io.BytesIO()
    samples = np.asarray(photo())
    tifffile.imwrite(written, samples, photometric="rgb", bigtiff=True, byteorder=order)
    if order == "<":
        assert np.array_equal(pixels(written.getvalue()), samples)
    else:
        assert "BigTIFF" in refusal(written.getvalue()).detail


def test_the_first_page_of_many() -> None:
    written = io.BytesIO()
    tifffile.imwrite(written, np.stack([photo(), photo().point(lambda x: 255 - x)]), planarconfig=1)
    assert np.array_equal(pixels(written.getvalue()), np.asarray(photo()))


def test_cmyk_of_other_inks() -> None:
    tiff = make(DECODED["cmyk 8"])
    tiff.tags[332] = [2]
    assert refusal(tiff.encode()).reason == "unsupported_format"


# ---- damage is no layout ----


@pytest.mark.parametrize("name", ["rgb float", "rgb 12", "grey 64 float", "lab 16"])
@pytest.mark.parametrize("tile", [0, 16])
def test_a_truncated_file_of_a_layout_that_pillow_lacks(name: str, tile: int) -> None:
    data = make(REFUSED[name], tile=tile).encode()
    assert refusal(data).reason == "unsupported_format"
    # The directory first, so that it survives.
    at = int.from_bytes(data[4:8], "little")
    assert refusal(data[: at + 4]).reason == "image_corrupt"


@pytest.mark.parametrize("name", ["rgb 8", "rgb 16", "grey 16", "palette 8"])
@pytest.mark.parametrize("start", [0, 1 << 30])
def test_strips_that_are_not_there(name: str, start: int) -> None:
    """In a sparse file of GDAL's, offset and length are 0: Pillow would decode the header."""
    data = bytearray(make(DECODED[name]).encode())
    with tifffile.TiffFile(io.BytesIO(data)) as opened:
        tags = opened.pages[0].tags
        places = [(tags[273].valueoffset, start), (tags[279].valueoffset, 0 if not start else 99)]
    for place, value in places:
        data[place + 4 : place + 8] = value.to_bytes(4, "little")
    assert refusal(bytes(data)).reason == "image_corrupt"


@pytest.mark.parametrize("name", ["RGB", "L", "CMYK", "P"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_a_truncated_tiff(name: str, compression: str) -> None:
    data = encode(photo().convert(name), "TIFF", compression=compression)
    for share in (0.3, 0.6, 0.9):
        assert refusal(data[: int(len(data) * share)]).reason == "image_corrupt"
