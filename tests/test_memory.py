"""What hostile and large images may cost: the peak of a process that decodes all of them."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pictures import BYTES_PER_PIXEL, COPIES, MORE_BYTES, encode, png

ROOT = Path(__file__).parent.parent

# Decodes every file of a folder; after each, how far its largest memory is above that of imports.
_DECODE = """
import json, re, sys
from pathlib import Path
import pyarrow as pa
from pipeline import schema
from pipeline.prepare.processor import ImageProcessor
from pipeline.prepare.images import PrepareImages

prepare = PrepareImages(ImageProcessor.from_dict(json.loads(sys.argv[3])), int(sys.argv[2]))
blank = {"shard": "x", "row": 0, "key": "", "member": "", "text": "", "total": -1, "stage": "",
         "reason": "", "detail": "", "retryable": False}
def peak():
    # Not getrusage: what it says begins with the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

for path in sorted(Path(sys.argv[1]).iterdir()):
    record = blank | {"image": path.read_bytes()}
    [row] = prepare(pa.Table.from_pylist([record], schema.RECORDS)).to_pylist()
    if path.name == "0":  # a small image, which loads what is loaded late
        before = peak()
    print(json.dumps([path.name, row["reason"], peak() - before]), flush=True)
"""


def tiff(size: tuple[int, int], tile: tuple[int, int] | None, data: bytes) -> bytes:
    """A grey, deflated TIFF of one strip or one tile; sizes are (height, width)."""
    tags = {256: size[1], 257: size[0], 258: 8, 259: 8, 262: 1, 277: 1}
    body = 8 + len(data)
    if tile:
        tags |= {322: tile[1], 323: tile[0], 324: 8, 325: len(data)}
    else:
        tags |= {273: 8, 278: size[0], 279: len(data)}
    directory = struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        directory += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<I", body) + data + directory + bytes(4)


def tiff_of_strips(count: int) -> bytes:
    """An RGB float TIFF, which Pillow lacks, with the same place and length for all its strips."""
    places = {273: struct.pack(f"<{count}I", *[8] * count), 279: bytes(4 * count)}
    tags = {256: 8, 257: 8, 258: 32, 259: 1, 262: 2, 277: 3, 278: 1, 339: 3}
    entries, values, at = b"", b"", 8 + 2 + 12 * (len(tags) + len(places)) + 4
    for tag in sorted([*tags, *places]):
        if tag in tags:
            entries += struct.pack("<HHII", tag, 3, 1, tags[tag])
        else:
            entries += struct.pack("<HHII", tag, 4, count, at + len(values))
            values += places[tag]
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags) + len(places))
    return head + entries + bytes(4) + values


def zeros(size_bytes: int) -> bytes:
    """Deflated."""
    squeeze = zlib.compressobj(9)
    piece = bytes(1 << 20)
    pieces = [squeeze.compress(piece) for _ in range(size_bytes >> 20)]
    return b"".join([*pieces, squeeze.compress(bytes(size_bytes & 0xFFFFF)), squeeze.flush()])


CLIPSEG = {"image_processor_type": "ViTImageProcessor", "size": {"height": 352, "width": 352}}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}

PIXEL = (b"IDAT", zlib.compress(bytes(13) * 4))


def gif(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """One frame of one colour whose data breaks off; sizes are (height, width)."""
    head = b"GIF89a" + struct.pack("<HH", canvas[1], canvas[0]) + b"\x80\0\0" + bytes(6)
    return head + b"," + struct.pack("<4HB", 0, 0, frame[1], frame[0], 0) + b"\x02\x02\x4c\x01\0;"


def bombs() -> dict[str, tuple[bytes, str]]:
    """What looks small: the bytes, and the reason that is expected of them."""
    text = zeros(60 << 20)
    letters = b"abcdefghijklmnopqr"
    names = [(bytes(name), b"") for name in itertools.product(letters, repeat=4)]
    many = [(b"zTXt", b"a\0\0" + zeros(1 << 20)) for _ in range(200)]
    webp = bytearray(encode(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    at = webp.index(b"VP8L") + 9
    webp[at : at + 4] = struct.pack("<I", 16383 | 16383 << 14)
    jpeg = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG", progressive=True))
    at = jpeg.index(b"\xff\xc2") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65500, 65500)
    frames = [Image.new("L", (40, 40), i % 256) for i in range(800)]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return {
        "png of 900 Mpx": (png((b"IDAT", zeros(9 << 20)), size=(30000, 30000)), "too_many_pixels"),
        "png rows that never end": (png((b"IDAT", zeros(150 << 20))), ""),
        "png text": (png((b"iTXt", b"a\0\1\0\0\0" + text), PIXEL), ""),
        "png texts": (png(*many, PIXEL), ""),
        "png profile": (png((b"iCCP", b"a\0\0" + text), PIXEL), ""),
        "png chunks": (png(PIXEL, *[(b"IDAT", b"")] * 200_000), ""),
        "png names": (png(PIXEL, *names), ""),
        "tiff strips": (tiff_of_strips(2_000_000), "image_corrupt"),
        "png exif": (png((b"eXIf", b"II*\0\xff\xff\xff\x7f" * 1000), PIXEL), ""),
        "jpeg of 4 Gpx": (bytes(jpeg), "too_many_pixels"),
        "jpeg profile": (encode(Image.new("RGB", (8, 8)), "JPEG", icc_profile=bytes(4 << 20)), ""),
        "webp of 268 Mpx": (bytes(webp), "too_many_pixels"),
        "gif canvas": (gif((60000, 60000), (1, 1)), "too_many_pixels"),
        "gif frame": (gif((1, 1), (60000, 60000)), "too_many_pixels"),
        "gif of 800 frames": (animation, ""),
        "tiff of 4 Gpx": (tiff((65000, 65000), None, zeros(1 << 20)), "too_many_pixels"),
        "tiff strip that never ends": (tiff((8, 8), None, zeros(150 << 20)), ""),
        "tiff tile": (tiff((64, 64), (12288, 12288), zeros(144 << 20)), "too_many_pixels"),
    }


def strips() -> dict[str, tuple[bytes, str]]:
    """What is 1,000 times as large once its short edge has the model's size, as in bombs."""
    return {
        f"png of {width} x {height}": (encode(Image.new("RGB", (width, height)), "PNG"), "")
        for width, height in ((1, 1000), (1000, 1))
    }


def legal(max_pixels: int) -> Iterator[tuple[str, bytes]]:
    """Images of nearly `max_pixels`, each in a way that costs."""
    height, width = max_pixels // 5000, 5000
    turn = Image.Exif()
    turn[0x0112] = 5
    grey = Image.linear_gradient("L").resize((width, height))
    colour = Image.merge("RGB", (grey, grey, grey))
    yield "png", encode(colour, "PNG", compress_level=1, exif=turn)
    yield "jpeg", encode(colour, "JPEG", progressive=True, subsampling=0, exif=turn)
    yield "webp", encode(colour, "WEBP", lossless=True, quality=0, method=0, exif=turn)
    yield "avif", encode(colour, "AVIF", speed=10, subsampling="4:4:4", exif=turn)
    yield "tiff", encode(colour, "TIFF", compression="tiff_adobe_deflate", exif=turn)
    yield "gif", encode(grey, "GIF")
    yield "cmyk", encode(colour.convert("CMYK"), "JPEG", progressive=True, exif=turn)
    colour.putalpha(grey)
    yield "rgba", encode(colour, "PNG", compress_level=1, exif=turn)
    yield "rgba webp", encode(colour, "WEBP", lossless=True, quality=0, method=0, exif=turn)
    floats = Image.fromarray(np.asarray(grey, np.float32))
    yield "float", encode(floats, "TIFF", compression="tiff_adobe_deflate")
    yield "16 bit", encode(Image.fromarray(np.asarray(grey, np.uint16)), "PNG", compress_level=1)


def peaks(folder: Path, max_pixels: int, processor: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(file, reason, peak so far above that of the imports, in bytes), in the order decoded."""
    command = [sys.executable, "-c", _DECODE, str(folder), str(max_pixels), json.dumps(processor)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("max_pixels", "processor", "small"),
    [
        (4_000_000, CLIPSEG, bombs),
        (500_000, CLIP, strips),
        pytest.param(50_000_000, CLIPSEG, bombs, marks=pytest.mark.soak),
        pytest.param(50_000_000, CLIP, bombs, marks=pytest.mark.soak),
    ],
    ids=["clipseg", "clip", "clipseg-50M", "clip-50M"],
)
def test_the_whole_catalogue_stays_under_the_bound(
    tmp_path: Path,
    max_pixels: int,
    processor: dict[str, Any],
    small: Callable[[], dict[str, tuple[bytes, str]]],
) -> None:
    (tmp_path / "0").write_bytes(encode(Image.new("RGB", (8, 8)), "TIFF"))
    expected = {"0": ""}
    allowed = {"0": 0}
    for name, (data, reason) in small().items():
        (tmp_path / f"0 {name}").write_bytes(data)
        expected[f"0 {name}"] = reason
        allowed[f"0 {name}"] = COPIES * len(data) + MORE_BYTES
    for name, data in legal(max_pixels):
        (tmp_path / f"1 {name}").write_bytes(data)
        expected[f"1 {name}"] = ""
        allowed[f"1 {name}"] = BYTES_PER_PIXEL * max_pixels + COPIES * len(data) + MORE_BYTES
    found = peaks(tmp_path, max_pixels, processor)
    for line in found:
        print(line)
    assert {name: reason for name, reason, _ in found} == expected
    bound = 0
    for name, _, peak in found:  # the peak so far
        bound = max(bound, allowed[name])
        assert peak <= bound, name
