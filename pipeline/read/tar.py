"""Tar shards: the images of WebDataset samples, from one forward pass over the archive."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.errors import RowError, StorageError
from pipeline.read.archive import Member, TarStream
from pipeline.read.ranges import RowSet
from pipeline.read.shard import (
    CAPTION_LIMIT_BYTES,
    IMAGE_EXTENSIONS,
    IMAGE_LIMIT_BYTES,
    SNIFF_BYTES,
    TEXT_EXTENSIONS,
    TEXT_LIMIT_BYTES,
    Sample,
    cut,
    find_text,
    is_image,
    printable,
)

# Of an image in a compressed tar, where a size costs its maker nothing.
INFLATED_LIMIT_BYTES = 128 * 2**20
# Images of a sample that wait for its text; a single one may be larger.
HELD_BYTES = 32 * 2**20
# A sample of more members goes on as another one of the same key.
SAMPLE_MEMBERS = 1_000


class _Name(NamedTuple):
    """The name of a member as WebDataset reads it: `d/0.left.png`."""

    key: str
    """Up to the first dot after the last slash: d/0. Empty for hidden files."""
    extension: str
    """The rest, in lower case: left.png."""

    @property
    def inner(self) -> str:
        """Name between the key and the last suffix: left."""
        return self.extension.rpartition(".")[0]

    @property
    def suffix(self) -> str:
        """The last suffix: png."""
        return self.extension.rpartition(".")[2]


class _Text(NamedTuple):
    name: _Name
    text: str


class _OpenSample:
    """Consecutive members of one key; images wait for a text if one is wanted."""

    def __init__(self, key: str, wanted: str):
        self.key, self._wanted = key, wanted
        self._extensions: set[str] = set()
        self._texts: list[_Text] = []
        self._held: list[tuple[_Name, Sample]] = []
        self._rows = 0

    def takes(self, name: _Name) -> bool:
        """Whether a member of this name belongs to the sample."""
        room = len(self._extensions) < SAMPLE_MEMBERS
        return room and name.key == self.key and name.extension not in self._extensions

    def add_member(self, name: _Name) -> None:
        self._extensions.add(name.extension)

    def add_text(self, name: _Name, text: str | None) -> None:
        if text is not None:  # held so far that one too long is still told
            self._texts.append(_Text(name, cut(printable(text), CAPTION_LIMIT_BYTES + 4)))

    def make_room(self, size_bytes: int) -> Iterator[Sample]:
        """The rows unable to wait any longer beside so much more."""
        if size_bytes + sum(len(sample.image) for _, sample in self._held) > HELD_BYTES:
            late = f"the text stands behind more than {HELD_BYTES:,} bytes of the sample's images"
            yield from self.release(late)

    def add_image(self, name: _Name, sample: Sample) -> Iterator[Sample]:
        """The row of an image, at once if no text is wanted."""
        self._rows += 1
        self._held.append((name, sample))
        if not self._wanted:
            yield from self.release()

    def close(self) -> Iterator[Sample | None]:
        """The remaining rows; None before the sample's first."""
        yield from self.release()
        if not self._rows:
            yield None

    def release(self, without: str = "") -> Iterator[Sample]:
        """The waiting rows; `without`: why one has no text, before the end."""
        for name, sample in self._held:
            row = sample.with_text(self._wanted, self._text_of(name))
            yield row._replace(detail=without) if without and row.reason == "no_text" else row
        self._held.clear()

    def _text_of(self, image: _Name) -> str | None:
        """left.txt for left.png, else the sample's own .txt, else any; .json before .txt."""

        def rank(found: _Text) -> tuple[bool, bool, int]:
            inner, suffix = found.name.inner, found.name.suffix
            return inner != image.inner, inner != "", TEXT_EXTENSIONS.index(suffix)

        return min(self._texts, key=rank).text if self._texts else None


def read_tar(
    file: BinaryIO,
    *,
    text: str = "",
    suffix: str = "",
    limit_bytes: int = IMAGE_LIMIT_BYTES,
    skip: RowSet | None = None,
) -> Iterator[Sample | None]:
    """The images of a tar, plain or compressed, in order; None for each sample without any.

    Keys are WebDataset's: the name up to the first dot after the last slash. Consecutive members of
    one key are one sample, until an extension repeats. The last suffix of a name, in any case, says
    whether the member is an image; the first bytes do for any other suffix than an image's or
    text's. `suffix`: the extension of the members to take for images instead ("left.png"). Hidden
    files, folders, links and devices are passed over, the last two unless they are named like an
    image. `skip`: numbers of images to pass over, too: they come out empty.
    `text`: what to look for in the .json or .txt members of a sample (see find_text).
    In memory are one image of at most `limit_bytes` (in a compressed tar INFLATED_LIMIT_BYTES),
    HELD_BYTES of images waiting for their text, SAMPLE_MEMBERS texts of 64 KiB, and TarStream's
    own.
    Raises RowError (shard_empty, shard_corrupt, shard_truncated) if the archive breaks off, after
    every whole image.
    """
    stream = TarStream(file)
    limit = min(limit_bytes, INFLATED_LIMIT_BYTES) if stream.compression else limit_bytes
    sample: _OpenSample | None = None
    rows = itertools.count()
    try:
        while (member := stream.next_member()) is not None:
            name = _split(member.name)
            named = name.extension == suffix if suffix else name.suffix in IMAGE_EXTENSIONS
            if not name.key or member.is_folder or (member.is_special and not named):
                stream.skip(member)
                continue
            if sample is None or not sample.takes(name):
                if sample:
                    yield from sample.close()
                sample = _OpenSample(name.key, text)
            sample.add_member(name)
            is_text = name.suffix in TEXT_EXTENSIONS and not named
            sniffed = not (named or suffix or is_text) and member.is_plain
            start = stream.take_start(member, SNIFF_BYTES) if sniffed else b""
            if named or is_image(start, name.suffix):
                if skip and next(rows) in skip:
                    stream.skip(member, start)
                    yield from sample.add_image(name, Sample(printable(name.key), ""))
                    continue
                yield from sample.make_room(min(member.size_bytes, limit) if text else 0)
                # No name for the image here: it would stay while the next one is read.
                yield from sample.add_image(
                    name, _read_image(stream, member, name.key, start, limit)
                )
            elif text and is_text and member.is_plain and member.size_bytes <= TEXT_LIMIT_BYTES:
                sample.add_text(name, find_text(text, name.suffix, stream.read(member)))
            else:
                stream.skip(member, start)
    except (RowError, StorageError):
        if sample:
            yield from sample.release()
        raise
    if sample:
        yield from sample.close()
    stream.check_end()


def _split(name: str) -> _Name:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return _Name(folder + slash + stem if stem else "", extension.lower())


def _read_image(
    stream: TarStream, member: Member, key: str, start: bytes, limit_bytes: int
) -> Sample:
    found = Sample(printable(key), printable(member.name))
    if not member.is_plain:
        stream.skip(member)
        return found._replace(reason="member_unsupported", detail=member.kind)
    if member.size_bytes > limit_bytes:
        stream.skip(member, start)
        where = f" of a {stream.compression} stream" if stream.compression else ""
        detail = f"{member.size_bytes:,} bytes{where}; at most {limit_bytes:,} are read"
        return found._replace(reason="member_too_large", detail=detail)
    return found._replace(image=stream.read(member, start))
