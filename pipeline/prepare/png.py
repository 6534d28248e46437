"""The chunks of a PNG behind its pixels: checked, and the others left out.

Pillow reads metadata strictly and pixels leniently: a wrong checksum or a large text refuses an
image, whereas bits flipped inside IDAT decode silently wrong in over half the cases. libpng, and
with it every browser, does the opposite, and so does this module.
"""

from __future__ import annotations

import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# tRNS is ancillary by its name, but pixels are composited on white by it.
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
# Samples of a transparent colour, by colour type.
_TRANSPARENT_BYTES = {0: 2, 2: 6}


def pixel_chunks(data: bytes) -> bytes:
    """The same PNG with nothing but the chunks of its pixels, and the EXIF block with its
    orientation.

    An animation's further frames are left out, too: IDAT is the first frame.

    Raises ValueError for a wrong checksum of one of these chunks, an unknown critical chunk, an
    impossible order, and a file without IEND. Metadata of whatever content passes. A tRNS chunk of
    another colour type is ignored, as by libpng; one with a wrong checksum is not ignored, since
    then hidden colours would show without a word.
    """
    view, seen = memoryview(data), set[bytes]()
    kept = [[0, len(_SIGNATURE)]]  # runs of bytes: few, however many chunks there are
    at, last, colour_type, colours = len(_SIGNATURE), b"", -1, 0
    while last != b"IEND":
        length, name = _chunk_at(data, at)
        end = at + 12 + length
        _check_order(name, last, seen)
        # The checksum of IEND stands for no data.
        intact = name == b"IEND" or _is_intact(view[at:end])
        if not intact and _may_decide_pixels(name):
            raise ValueError(f"wrong checksum of a chunk {name.decode()}")
        wanted = name in _PIXELS or (name == b"eXIf" and intact and name not in seen)
        if name == b"IHDR":
            colour_type = data[at + 17] if length == 13 else -1
        elif name == b"PLTE":
            colours = length // 3
        elif name == b"tRNS":
            wanted = not seen & {b"IDAT", b"tRNS"} and _fits(length, colour_type, colours)
        elif name[:1].isupper() and not wanted:
            raise ValueError(f"an unknown critical chunk {name.decode()}")
        if wanted and kept[-1][1] == at:
            kept[-1][1] = end
        elif wanted:
            kept.append([at, end])
        if wanted:
            seen.add(name)
        at, last = end, name
    if b"IDAT" not in seen or (colour_type == 3 and not colours):
        raise ValueError("no IDAT chunk, or no palette")
    return b"".join(view[start:end] for start, end in kept)


def _chunk_at(data: bytes, at: int) -> tuple[int, bytes]:
    """Length of the data, and name, of a complete chunk."""
    if at + 8 > len(data):
        raise ValueError("the file ends before its IEND chunk")
    length, name = struct.unpack_from(">I4s", data, at)
    if not name.isalpha():
        raise ValueError("a chunk without a name")
    if name == b"IEND" and length:
        raise ValueError("an IEND chunk with data")
    if at + 12 + length > len(data):
        raise ValueError(f"the file ends inside a chunk {name.decode()}")
    return length, name


def _check_order(name: bytes, last: bytes, seen: set[bytes]) -> None:
    if (name == b"IHDR") != (not last):
        raise ValueError("IHDR is not the first chunk")
    if name in seen and (name == b"PLTE" or (name == b"IDAT" and last != b"IDAT")):
        raise ValueError(f"chunks {name.decode()} in several places")


def _is_intact(chunk: memoryview) -> bool:
    checksum: int = struct.unpack(">I", chunk[-4:])[0]
    return zlib.crc32(chunk[4:-4]) == checksum


def _may_decide_pixels(name: bytes) -> bool:
    """Whether a damaged name is critical, or one flipped bit away from a chunk of pixels."""
    found = int.from_bytes(name, "big")
    return name[:1].isupper() or any(
        (found ^ int.from_bytes(pixels, "big")).bit_count() <= 1 for pixels in _PIXELS
    )


def _fits(length: int, colour_type: int, colours: int) -> bool:
    if colour_type == 3:
        return 1 <= length <= colours
    return length == _TRANSPARENT_BYTES.get(colour_type)
