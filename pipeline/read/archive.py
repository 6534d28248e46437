"""Headers and data of a tar in order, strict about every header.

Python's tarfile stops without a word at a damaged header. Here the chain of headers is walked
block by block (tarfile.TarInfo parses and checks each one), and damage is reported.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.errors import RowError
from pipeline.read.inflate import INFLATE_ERRORS, inflate, name_format
from pipeline.read.shard import printable

_BLOCK_BYTES = tarfile.BLOCKSIZE
_PIECE_BYTES = 2**20  # read or skipped at once
_SIZE_DIGITS = 20  # int() of thousands of digits is an error of its own
_PAX_LENGTH = re.compile(rb"(\d{1,20}) ")
# Held of a pax record or a GNU long name; what follows is streamed past. Twice what a row may
# carry of a name (shard.NAME_LIMIT_BYTES), so that one cut here is told as too long there.
_HELD_BYTES = 8192
_PAX_WINDOW_BYTES = 2**16
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_NO_DATA = (*_LINKS, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True)
class Member:
    """Contents of the headers of a member."""

    name: str  # surrogates stand for bytes that are not UTF-8
    type: bytes
    size_bytes: int  # of the data that follows in the archive
    sparse: bool

    @property
    def is_plain(self) -> bool:
        """Whether the data after the header is the file."""
        return self.type in _PLAIN and not self.sparse

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.type == tarfile.DIRTYPE

    @property
    def is_special(self) -> bool:
        """Whether it is a link, a device or a pipe."""
        return self.type in _NO_DATA and not self.is_folder

    @property
    def kind(self) -> str:
        """The kind of a special member, for messages."""
        if self.sparse:
            return "a sparse file"
        return "a link" if self.type in _LINKS else "not a plain file"


class TarStream:
    """The members of a tar, plain or compressed; damage raises RowError.

    After next_member() read or skip its data, whole. In memory are the data read, and at most 4 MiB
    beside the window of the compression.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.compression = inflate(file)
        self._offset = 0  # bytes taken, after decompression
        self._padding = 0  # bytes up to the next block; taken late, as they hold no data

    def next_member(self) -> Member | None:
        """The next member, its extended headers applied; None at the end-of-archive marker."""
        long_name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        extended = False
        while (block := self._next_block()) is not None:
            header = self._parse(block)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._read_long_name(header.size)
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                self._read_pax(header.size, pax)
            elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self._skip_bytes(header.size)
            else:
                return self._finish_member(header, block, long_name, pax)
            extended = extended or header.type != tarfile.XGLTYPE
        if extended:
            raise self._damage("an extended header without a member")
        return None

    def take_start(self, member: Member, size: int) -> bytes:
        """The first `size` bytes of a member's data, to be handed to read() or skip() then."""
        return self._take_all(min(size, member.size_bytes), _inside(member))

    def read(self, member: Member, start: bytes = b"") -> bytes:
        """Read the data of a member. A false size costs no more memory than there is data."""
        where, left = _inside(member), member.size_bytes - len(start)
        if left <= _PIECE_BYTES:
            data = start + self._take_all(left, where)
        else:
            whole = io.BytesIO()  # grows in place, and gives its bytes away without a copy
            whole.write(start)
            while left:
                left -= whole.write(self._take_all(min(left, _PIECE_BYTES), where))
            data = whole.getvalue()
        self._padding = -member.size_bytes % _BLOCK_BYTES
        return data

    def skip(self, member: Member, start: bytes = b"") -> None:
        """Pass over the data of a member."""
        self._skip_bytes(member.size_bytes, _inside(member), taken=len(start))

    def check_end(self) -> None:
        """After the marker only zeros may follow; reading on also checks a stream's checksum."""
        if self._offset <= _BLOCK_BYTES:
            if not any(self._rest()):
                raise RowError("read", "shard_empty", f"{self._offset:,} bytes, all zero")
            raise self._damage("zeros where the first header should be")
        if any(self._rest()):
            raise self._damage("data after the end-of-archive marker (two archives in one?)")

    def _rest(self) -> Iterator[bool]:
        while chunk := self._take(_PIECE_BYTES):
            yield chunk.count(0) != len(chunk)

    def _next_block(self) -> bytes | None:
        self._take(self._padding)
        self._padding = 0
        block = self._take(_BLOCK_BYTES)
        if not block:
            if self._offset == 0:
                raise RowError("read", "shard_empty", "zero bytes")
            raise self._cut("without an end-of-archive marker")
        if len(block) < _BLOCK_BYTES and self._offset > _BLOCK_BYTES:
            raise self._cut("inside a header")
        return block if block.count(0) < len(block) else None

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if self._offset <= _BLOCK_BYTES:
                found = name_format(block)
                detail = f"{found}: unpack it, or make it a tar" if found else "not a tar archive"
                raise RowError("read", "shard_corrupt", detail) from error
            raise self._damage(f"a damaged header ({error})") from error
        if header.size < 0:
            raise self._damage("a header with a negative size")
        return header

    def _finish_member(
        self,
        header: tarfile.TarInfo,
        block: bytes,
        long_name: bytes | None,
        pax: dict[bytes, bytes],
    ) -> Member:
        size = pax.get(b"size", b"")
        if size and not (size.isdigit() and len(size) <= _SIZE_DIGITS):
            raise self._damage("a pax header with a size that is no number")
        sparse = header.type == tarfile.GNUTYPE_SPARSE
        extended = sparse and block[482]
        while extended:  # more of an old GNU sparse map; the member is refused unexpanded
            extended = self._take_all(_BLOCK_BYTES, "inside a sparse header")[504]
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or long_name
        return Member(
            name=header.name if name is None else name.decode("utf-8", "surrogateescape"),
            type=header.type,
            size_bytes=0 if header.type in _NO_DATA else int(size or header.size),
            sparse=sparse or any(keyword.startswith(b"GNU.sparse.") for keyword in pax),
        )

    def _read_long_name(self, size: int) -> bytes:
        held = self._take_all(min(size, _HELD_BYTES))
        self._skip_bytes(size, taken=len(held))
        return held.partition(b"\0")[0]

    def _read_pax(self, size: int, found: dict[bytes, bytes]) -> None:
        """Records of the form `length keyword=value newline`, length counting itself.

        Relevant ones go into `found`; the others are streamed past, however large.
        """
        data, position, left = b"", 0, size
        while left or position < len(data):
            if len(data) - position < _HELD_BYTES and left:
                piece = self._take_all(min(left, _PAX_WINDOW_BYTES))
                data, position, left = data[position:] + piece, 0, left - len(piece)
            if data[position] == 0:  # padding
                break
            match = _PAX_LENGTH.match(data, position)
            end = position + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(data) + left:
                raise self._damage("a damaged pax header")
            keyword, _, value = data[match.end() : min(end - 1, len(data))].partition(b"=")
            if end > len(data):  # the rest of a long record
                beyond = end - 1 - len(data)
                self._skip_exactly(beyond, "inside an extended header")
                data, position, left = self._take_all(1), 0, left - beyond - 1
                end = 1
            if data[end - 1 : end] != b"\n":
                raise self._damage("a damaged pax header")
            if keyword in (b"path", b"size", b"GNU.sparse.name"):
                found[keyword] = value[:_HELD_BYTES]
            elif keyword.startswith(b"GNU.sparse."):
                found[b"GNU.sparse."] = b""
            position = end
        self._skip_bytes(size, taken=size - left)

    def _skip_bytes(
        self, size: int, where: str = "inside an extended header", *, taken: int = 0
    ) -> None:
        """Pass over `size` bytes, taking so many of them, and the padding after them."""
        self._skip_exactly(size - taken, where)
        self._padding = -size % _BLOCK_BYTES

    def _skip_exactly(self, size: int, where: str) -> None:
        while size:
            size -= len(self._take_all(min(size, _PIECE_BYTES), where))

    def _take_all(self, size: int, where: str = "inside an extended header") -> bytes:
        data = self._take(size)
        if len(data) < size:
            raise self._cut(where)
        return data

    def _take(self, size: int) -> bytes:
        try:
            data: bytes = self._file.read(size) if size else b""
        except EOFError as error:
            raise self._cut(f"inside the {self.compression} stream") from error
        except INFLATE_ERRORS as error:
            raise self._damage(f"a damaged {self.compression} stream ({error})") from error
        self._offset += len(data)
        return data

    def _damage(self, what: str) -> RowError:
        return RowError("read", "shard_corrupt", f"{what}, before byte {self._offset:,}")

    def _cut(self, where: str) -> RowError:
        return RowError("read", "shard_truncated", f"ends {where}, at byte {self._offset:,}")


def _inside(member: Member) -> str:
    return f"inside the data of {printable(member.name)}"
