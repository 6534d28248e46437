"""Tar shards: WebDataset samples from one forward pass, strict about every header.

Python's tarfile stops without a word at a damaged header. Here the chain of headers is walked
block by block (tarfile.TarInfo parses and checks each one), so that what cannot be read is said.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.errors import RowError, StorageError
from pipeline.read.shard import (
    IMAGE_EXTENSIONS,
    IMAGE_LIMIT_BYTES,
    TEXT_EXTENSIONS,
    TEXT_LIMIT_BYTES,
    Sample,
    find_text,
    printable,
)

_BLOCK_BYTES = tarfile.BLOCKSIZE
_SKIP_BYTES = 2**20
_EXTENDED_LIMIT_BYTES = 2**20  # of a pax header or a GNU long name, which are read into memory
_SIZE_DIGITS = 20  # int() of thousands of digits is an error of its own
_PAX_LENGTH = re.compile(rb"(\d{1,7}) ")
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_NO_DATA = (*_LINKS, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@dataclass
class _Member:
    name: str  # surrogates stand for bytes that are not UTF-8
    type: bytes
    size_bytes: int  # of the data that follows in the archive
    sparse: bool


@dataclass
class _OpenSample:
    key: str
    member: str  # name of the first member
    extensions: dict[str, None] = field(default_factory=dict)  # an ordered set
    image: Sample | None = None
    texts: dict[str, str] = field(default_factory=dict)  # by extension

    def close(self, wanted: str) -> Sample:
        """The row of this sample, with the text that is wanted."""
        if self.image is None:
            shown = ", ".join("." + extension for extension in list(self.extensions)[:10])
            detail = printable(f"the sample has {shown}; a key ends at the first dot")
            found = Sample(printable(self.key), printable(self.member))
            return found._replace(reason="no_image", detail=detail)
        text = next((self.texts[e] for e in TEXT_EXTENSIONS if e in self.texts), None)
        return self.image.with_text(wanted, text)


def read_tar(
    file: BinaryIO, *, text: str = "", limit_bytes: int = IMAGE_LIMIT_BYTES
) -> Iterator[Sample]:
    """The samples of a tar, plain or gzipped, in order; one sample is in memory at a time.

    The key of a member is its name up to the first dot after the last slash, the rest is its
    extension, in any case. Consecutive members of one key are one sample, until an extension
    repeats; its image is the first member with an image's extension. Hidden files and folders are
    passed over, and links and devices unless they are named like an image. `text`: what to look
    for in the .json or .txt member of a sample (see find_text).
    Raises RowError (shard_empty, shard_corrupt, shard_truncated) where the archive breaks off,
    after every sample whose image was whole.
    """
    stream = _TarStream(file)
    sample: _OpenSample | None = None
    try:
        while (member := stream.next_member()) is not None:
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()
            is_image = extension in IMAGE_EXTENSIONS
            odd = member.type == tarfile.DIRTYPE or (member.type in _NO_DATA and not is_image)
            if not stem or odd:
                stream.skip(member)
                continue
            key = folder + slash + stem
            if sample is None or key != sample.key or extension in sample.extensions:
                if sample:
                    yield sample.close(text)
                sample = _OpenSample(key, member.name)
            sample.extensions[extension] = None
            if is_image and not sample.image:
                sample.image = _read_image(stream, member, key, limit_bytes)
            elif text and extension in TEXT_EXTENSIONS and _is_small(member):
                found = find_text(text, extension, stream.read(member))
                sample.texts |= {} if found is None else {extension: found}
            else:
                stream.skip(member)
    except (RowError, StorageError):
        if sample and sample.image:
            yield sample.close(text)
        raise
    if sample:
        yield sample.close(text)
    stream.check_end()


def _is_small(member: _Member) -> bool:
    plain = member.type in _PLAIN and not member.sparse
    return plain and member.size_bytes <= TEXT_LIMIT_BYTES


def _read_image(stream: _TarStream, member: _Member, key: str, limit_bytes: int) -> Sample:
    found = Sample(printable(key), printable(member.name))
    if member.sparse or member.type not in _PLAIN:
        stream.skip(member)
        kind = "a link" if member.type in _LINKS else "not a plain file"
        detail = "a sparse file" if member.sparse else kind
        return found._replace(reason="member_unsupported", detail=detail)
    if member.size_bytes > limit_bytes:
        stream.skip(member)
        detail = f"{member.size_bytes:,} bytes; at most {limit_bytes:,} are read"
        return found._replace(reason="member_too_large", detail=detail)
    return found._replace(image=stream.read(member))


class _TarStream:
    """Headers and data of a tar in order; what is damaged or missing raises RowError."""

    def __init__(self, file: BinaryIO):
        start = file.peek(2)[:2] if hasattr(file, "peek") else b""
        self._file = gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file
        self._offset = 0  # bytes taken, after decompression
        self._padding = 0  # bytes up to the next block; taken late, as they hold no data

    def next_member(self) -> _Member | None:
        """The next member, its extended headers applied; None at the end-of-archive marker."""
        long_name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        while (block := self._next_block()) is not None:
            header = self._parse(block)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._read_extended(header).partition(b"\0")[0]
            elif header.type == tarfile.GNUTYPE_LONGLINK:
                self._read_extended(header)
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax.update(self._parse_pax(self._read_extended(header)))
            elif header.type == tarfile.XGLTYPE:
                self._skip_bytes(header.size)
            else:
                return self._finish_member(header, block, long_name, pax)
        if long_name is not None or pax:
            raise self._damage("an extended header without a member")
        return None

    def read(self, member: _Member) -> bytes:
        data = self._take(member.size_bytes)
        if len(data) < member.size_bytes:
            raise self._cut(f"inside the data of {printable(member.name)}")
        self._padding = -member.size_bytes % _BLOCK_BYTES
        return data

    def skip(self, member: _Member) -> None:
        self._skip_bytes(member.size_bytes, f"inside the data of {printable(member.name)}")

    def check_end(self) -> None:
        """After the marker only zeros may follow; reading on also checks a gzip stream's CRC."""
        if self._offset <= _BLOCK_BYTES:
            if not any(self._rest()):
                raise RowError("read", "shard_empty", f"{self._offset:,} bytes, all zero")
            raise self._damage("zeros where the first header should be")
        if any(self._rest()):
            raise self._damage("data after the end-of-archive marker (two archives in one?)")

    def _rest(self) -> Iterator[bool]:
        while chunk := self._take(_SKIP_BYTES):
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
                raise RowError("read", "shard_corrupt", "not a tar archive") from error
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
    ) -> _Member:
        size = pax.get(b"size", b"")
        if size and not (size.isdigit() and len(size) <= _SIZE_DIGITS):
            raise self._damage("a pax header with a size that is no number")
        sparse = header.type == tarfile.GNUTYPE_SPARSE
        extended = sparse and block[482]
        while extended:  # more of an old GNU sparse map; the member is refused unexpanded
            block = self._take(_BLOCK_BYTES)
            if len(block) < _BLOCK_BYTES:
                raise self._cut("inside a sparse header")
            extended = block[504]
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or long_name
        return _Member(
            name=header.name if name is None else name.decode("utf-8", "surrogateescape"),
            type=header.type,
            size_bytes=0 if header.type in _NO_DATA else int(size or header.size),
            sparse=sparse or any(keyword.startswith(b"GNU.sparse.") for keyword in pax),
        )

    def _read_extended(self, header: tarfile.TarInfo) -> bytes:
        if header.size > _EXTENDED_LIMIT_BYTES:
            raise self._damage(f"an extended header of {header.size:,} bytes")
        data = self._take(header.size)
        if len(data) < header.size:
            raise self._cut("inside an extended header")
        self._padding = -header.size % _BLOCK_BYTES
        return data

    def _parse_pax(self, data: bytes) -> dict[bytes, bytes]:
        """Records of the form `length keyword=value newline`, length counting itself."""
        records: dict[bytes, bytes] = {}
        position = 0
        while position < len(data) and data[position] != 0:
            match = _PAX_LENGTH.match(data, position)
            end = position + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
                raise self._damage("a damaged pax header")
            keyword, _, value = data[match.end() : end - 1].partition(b"=")
            records[keyword] = value
            position = end
        return records

    def _skip_bytes(self, size: int, where: str = "inside an extended header") -> None:
        left = size
        while left:
            taken = len(self._take(min(left, _SKIP_BYTES)))
            if not taken:
                raise self._cut(where)
            left -= taken
        self._padding = -size % _BLOCK_BYTES

    def _take(self, size: int) -> bytes:
        try:
            data = self._file.read(size) if size else b""
        except EOFError as error:
            raise self._cut("inside the gzip stream") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self._damage(f"a damaged gzip stream ({error})") from error
        self._offset += len(data)
        return data

    def _damage(self, what: str) -> RowError:
        return RowError("read", "shard_corrupt", f"{what}, before byte {self._offset:,}")

    def _cut(self, where: str) -> RowError:
        return RowError("read", "shard_truncated", f"ends {where}, at byte {self._offset:,}")
