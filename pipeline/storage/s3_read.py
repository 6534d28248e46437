"""Read objects from S3 in pieces; a fault costs at most one."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from pipeline.errors import ChangedError, StorageError
from pipeline.storage.faults import error_code
from pipeline.storage.retry import persist
from pipeline.storage.s3 import client, split, stat_object, stored

BLOCK_BYTES = 8 * 2**20  # one ranged GET; a tar is read forward in such steps
_WHOLE_BYTES = 64 * 2**20  # one ranged GET where a whole object is read
_PIECE_BYTES = 2**20  # of a body, kept as it arrives


class ObjectFile(io.RawIOBase):
    """One version of an object as a file, fetched in blocks.

    Position and block change only after a block has arrived, so a failed read can be repeated:
    nothing is lost and nothing comes twice.
    """

    def __init__(self, uri: str):
        found = stat_object(uri)
        self.version = found.version
        self._uri, self._size = uri, found.size_bytes
        self._position = self._start = 0
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        offset = self._position - self._start
        if self._position >= self._size:
            return 0
        if not 0 <= offset < len(self._block):
            end = min(self._position + BLOCK_BYTES, self._size)
            block, _ = read_range(self._uri, self._position, end, self.version)
            if len(block) != end - self._position:
                raise StorageError(f"{self._uri}: ends before its size")
            self._block, self._start, offset = block, self._position, 0
        view = memoryview(self._block)[offset : offset + len(buffer)]
        buffer[: len(view)] = view
        self._position += len(view)
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start of the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position


def read_object(uri: str, limit_bytes: int, version: str = "") -> bytes:
    """A whole object, or its first `limit_bytes`; one request unless it is large.

    `version` as for read_range.
    """
    pieces: list[bytes] = []
    start = 0
    while start < limit_bytes:
        end = min(start + _WHOLE_BYTES, limit_bytes)
        piece, version = read_range(uri, start, end, version)
        pieces.append(piece)
        start += len(piece)
        if start < end:
            break
    return b"".join(pieces)


def read_range(uri: str, start: int, end: int, version: str) -> tuple[bytes, str]:
    """Bytes `start` to `end` of an object, fewer at its end, and its version.

    After a fault only what has not arrived yet is asked for. A version other than the one given
    ("" is any), or than that of the first attempt, is a ChangedError.
    """
    bucket, key = split(uri)
    data = bytearray()

    def receive() -> None:
        nonlocal version
        from botocore.exceptions import ClientError

        condition = {"IfMatch": f'"{version}"'} if version else {}
        first = start + len(data)
        wanted = f"bytes={first}-{end - 1}"
        try:
            answer = client().get_object(Bucket=bucket, Key=key, Range=wanted, **condition)
        except ClientError as error:
            if error_code(error)[0] in ("InvalidRange", "416"):  # it ends here
                return
            raise
        found = stored(uri, 0, answer).version
        with contextlib.closing(answer["Body"]) as body:
            if version not in ("", found):  # from a server that ignores the condition
                raise ChangedError(f"{uri}: overwritten while it was being read")
            if first and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise StorageError(f"{uri}: the server sends whole objects only, not parts of them")
            version = found
            while piece := body.read(_PIECE_BYTES):
                data.extend(piece)

    if start < end:
        persist(uri, receive)
    return bytes(data), version
