"""Compressed tars, told by their first bytes and not by name: gzip, bzip2, xz and zstd."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

_PIECE_BYTES = 2**16  # of the compressed file
# xz -9 needs 65 MiB; a header may ask for 4 GiB. zstd refuses windows above 128 MiB by itself.
_XZ_MEMORY_BYTES = 2**28
_MAGIC = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
}
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte 0x50..0x5f; pzstd begins with such a frame
_NOT_READ = {
    b"PK\3\4": "a zip archive",
    b"Rar!\x1a\7": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x1f\x9d": "compress (.Z)",
    b"\x1f\xa0": "compress (.Z)",
    b"\x89LZO": "lzop",
}

INFLATE_ERRORS = (OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""Raised by a damaged stream; faults of storage are StorageErrors by then."""


class Inflated(NamedTuple):
    """A file as it reads after decompression."""

    file: Any
    """With read(size); raises EOFError where the stream is cut, or one of INFLATE_ERRORS."""
    compression: str
    """gzip, bzip2, xz or zstd; "" for a file that is not compressed."""


def inflate(file: BinaryIO) -> Inflated:
    """Open a file through the decompressor of its first bytes, if any.

    Memory: the window of the format, at most 256 MiB (xz), 128 MiB (zstd) or 4 MiB (others).
    """
    start = file.peek(10)[:10] if hasattr(file, "peek") else b""
    kind = next((name for name, magic in _MAGIC.items() if start.startswith(magic)), "")
    if kind == "bzip2" and start[4:] not in (b"1AY&SY", b"\x17rE8P\x90"):
        kind = ""  # a tar whose first member is called BZh...
    if start[1:4] == _ZSTD_SKIPPABLE and start[0] >> 4 == 5:
        kind = "zstd"
    if kind == "gzip":
        return Inflated(gzip.GzipFile(fileobj=file), kind)
    if kind == "bzip2":
        return Inflated(io.BufferedReader(_Streams(file, bz2.BZ2Decompressor)), kind)
    if kind == "xz":
        return Inflated(io.BufferedReader(_Streams(file, _make_xz)), kind)
    if kind == "zstd":
        return Inflated(_Zstd(file), kind)
    return Inflated(file, "")


def name_format(start: bytes) -> str:
    """The unsupported archive or compression of these first bytes; "" if none."""
    return next((name for magic, name in _NOT_READ.items() if start.startswith(magic)), "")


def _make_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)


class _Zstd:
    """A zstd file: pyarrow, never without zstd, tells a cut in words alone."""

    def __init__(self, file: BinaryIO):
        self._stream = pa.CompressedInputStream(file, "zstd")

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            if "truncated" in str(error).lower():
                raise EOFError from error
            raise


class _Streams(io.RawIOBase):
    """One stream after the other, as pbzip2 and xz write them, until the file ends.

    bz2.open and lzma.open take what follows a stream and is none for the end.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], Any]):
        self._file, self._make, self._stream = file, make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            piece = b""
            if self._stream.eof:
                piece = self._next_start()
                if not piece:
                    return 0
                self._stream = self._make()
            elif self._stream.needs_input:
                piece = self._file.read(_PIECE_BYTES)
                if not piece:
                    raise EOFError
            data = self._stream.decompress(piece, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next_start(self) -> bytes:
        """First bytes of the next stream, without any zeros between two."""
        piece = self._stream.unused_data.lstrip(b"\0")
        while not piece and (read := self._file.read(_PIECE_BYTES)):
            piece = read.lstrip(b"\0")
        return piece
