"""Shards and their samples, and the file names of an input."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2"),
    *(".tar.xz", ".txz", ".tar.zst", ".tzst"),
)
PARQUET_SUFFIXES = (".parquet", ".pq")
_DECODED = (
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "png",
    "apng",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
)
_REFUSED = ("heic", "heif", "jp2", "svg", "psd")  # reported by decoding rather than passed over
IMAGE_EXTENSIONS = frozenset(_DECODED + _REFUSED)
TEXT_EXTENSIONS = ("json", "txt")  # in the order in which a text is looked for
TEXT_LIMIT_BYTES = 2**20
# Larger members, files and cells are reported without being read into memory.
IMAGE_LIMIT_BYTES = 512 * 2**20
# Longer ones are reported and not carried: a key goes into every row of its image, and Arrow's
# columns of strings end at 2 GiB. No path that Linux opens is longer.
NAME_LIMIT_BYTES = 4096
CAPTION_LIMIT_BYTES = 2**16  # of the text of a row
MAX_PHRASES = 100  # of a row
SNIFF_BYTES = 32
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|8BPS\0"
    rb"|II[*+]\0|MM\0[*+]"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"
    rb"|....ftyp(?:avif|avis|heic|heix|heif|mif1|msf1)"
    rb"|\0\0\0\x0cjP  ",
    re.DOTALL,
)
# TIFF by their first bytes, of which only a preview would be decoded.
_RAW_SUFFIXES = ("arw", "cr2", "dng", "nef", "nrw", "orf", "pef", "rw2", "srw")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One input object, some row groups of a large Parquet file, or a fixed group of loose image
    files: the unit of work."""

    name: str
    """The `shard` column: the path relative to the input's root, unique in an input; of row
    groups as name_rows has it."""
    uri: str
    """URI to open; for loose images the root folder."""
    format: str
    """tar, parquet or images."""
    size_bytes: int
    """Of row groups: their share of the file."""
    version: str
    """S3: the ETag; local: size and times; loose images: a hash over all of them; "" if missing."""
    files: tuple[str, ...] = ()
    """Loose images: paths relative to `uri`, in the order of their rows."""
    listed: tuple[tuple[str, str], ...] = ()
    """Loose images: path and version of each of `files`, and of the texts beside them."""
    column: str = ""
    """Parquet: the image column of this file; "" leaves it to the reader."""
    inside: str = ""
    """Parquet: its cells may name files below this folder; "" is the file's own."""
    text: str = ""
    """Place of each row's text (see find_text, as_phrases); "" for no text."""
    member_suffix: str = ""
    """Tar: the extension of the image members; "" takes every image."""
    first_row_group: int = 0
    row_groups: int = 0
    """Parquet: how many row groups from `first_row_group` on; 0 is the whole file."""
    rows: int = field(default=-1, compare=False)
    """How many there are, where a listing or a footer tells; else -1."""
    skip: str = field(default="", compare=False)
    """Rows with results already, not to be read (see ranges)."""


class Sample(NamedTuple):
    """One image as a reader found it, or the reason why there is none."""

    key: str
    member: str
    image: bytes = b""
    reason: str = ""
    detail: str = ""
    retryable: bool = False
    text: str = ""

    def with_text(self, wanted: str, text: str | None) -> Sample:
        """The sample with its text, or failed if a wanted text is missing."""
        if not wanted or self.reason:
            return self
        phrases = split_wanted(wanted).phrases
        if text is None and phrases:
            return self
        if text is None:
            detail = f"no text {wanted!r} beside the image"
            return self._replace(image=b"", reason="no_text", detail=printable(detail))
        text = printable(text)
        if len(text.encode()) > CAPTION_LIMIT_BYTES:
            detail = f"more than {CAPTION_LIMIT_BYTES:,} bytes"
            return self._replace(image=b"", reason="text_too_long", detail=detail)
        if phrases and (count := len(parse_phrases(text))) > MAX_PHRASES:
            detail = f"{count:,} phrases; at most {MAX_PHRASES}"
            return self._replace(image=b"", reason="text_too_long", detail=detail)
        return self._replace(text=text)

    def with_short_names(self) -> Sample:
        """The sample, or failed with its names cut if one is longer than NAME_LIMIT_BYTES."""
        key, member = (cut(name, NAME_LIMIT_BYTES) for name in (self.key, self.member))
        if (key, member) == (self.key, self.member):
            return self
        short = self._replace(key=key, member=member)
        if self.reason:
            return short
        detail = f"a name of more than {NAME_LIMIT_BYTES:,} bytes"
        return short._replace(image=b"", text="", reason="name_too_long", detail=detail)


def is_image(start: bytes, suffix: str = "") -> bool:
    """Whether a file is an image, by its first SNIFF_BYTES."""
    return _MAGIC.match(start) is not None and suffix not in _RAW_SUFFIXES


def find_text(wanted: str, extension: str, data: bytes) -> str | None:
    """The text in a file beside an image: the field `wanted` of a .json, else a .txt as it is."""
    wanted, phrases = split_wanted(wanted)
    if extension == "txt":
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").strip()
        return format_phrases(text) if phrases else text
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    found = value.get(wanted) if isinstance(value, dict) else None
    if phrases:
        return format_phrases(found)
    return found.strip() if isinstance(found, str) else None


def shard_to_row(shard: Shard) -> dict[str, Any]:
    """A shard as a row for Arrow; paths as bytes, for names outside UTF-8."""
    return {
        **vars(shard),
        "uri": _to_bytes(shard.uri),
        "inside": _to_bytes(shard.inside),
        "files": [_to_bytes(path) for path in shard.files],
        "listed": [_to_bytes(part) for pair in shard.listed for part in pair],
    }


def shard_from_row(row: dict[str, Any]) -> Shard:
    """The shard of `shard_to_row`; columns of other names are left out."""
    values = {name: row[name] for name in Shard.__dataclass_fields__}
    values["uri"] = _from_bytes(row["uri"])
    values["inside"] = _from_bytes(row["inside"])
    values["files"] = tuple(_from_bytes(path) for path in row["files"])
    parts = map(_from_bytes, row["listed"])
    values["listed"] = tuple(zip(parts, parts, strict=True))
    return Shard(**values)


def file_format(path: str) -> str:
    """tar, parquet, images, or "" for others, by the name alone."""
    name = path.rpartition("/")[2].lower()
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "images" if name.rpartition(".")[2] in IMAGE_EXTENSIONS and "." in name else ""


def image_key(path: str) -> str:
    """The key of a loose image: its path without an image's extension."""
    before, dot, extension = path.rpartition(".")
    return before if dot and extension.lower() in IMAGE_EXTENSIONS else path


class Wanted(NamedTuple):
    """Source of a row's text."""

    name: str
    """Of the column or field."""
    phrases: bool
    """Whether it is a phrase or a list of them, which a row may lack, as format_phrases has it."""


def as_phrases(name: str) -> str:
    """The name of a text made of phrases: see Wanted. No real name holds a NUL."""
    return f"{name}\0"


def split_wanted(wanted: str) -> Wanted:
    """The inverse of as_phrases, also of the name of a text."""
    return Wanted(wanted.removesuffix("\0"), wanted.endswith("\0"))


def format_phrases(value: Any) -> str | None:
    """A phrase, or the texts of a list, as a JSON list; None without any."""
    values = value if isinstance(value, list) else [value]
    texts = [printable(text).strip() for text in values if isinstance(text, str | bytes)]
    found = [text for text in texts if text]
    return json.dumps(found, ensure_ascii=False) if found else None


def parse_phrases(text: str) -> list[str]:
    """The phrases of a row's text, in order; none without a text."""
    found: list[str] = json.loads(text) if text else []
    return found


def printable(name: str | bytes) -> str:
    """The name as valid UTF-8; other bytes are escaped (`\\xff`)."""
    if isinstance(name, bytes):
        return name.decode("utf-8", "backslashreplace")
    try:
        encoded = _to_bytes(name)
    except UnicodeEncodeError:  # JSON may hold half a character: "\ud83d"
        encoded = name.encode("utf-8", "surrogatepass")
    return encoded.decode("utf-8", "backslashreplace")


def cut(text: str, limit_bytes: int) -> str:
    """The printable text, or as many of its characters as fit."""
    if len(text) * 4 <= limit_bytes:
        return text
    return text.encode()[:limit_bytes].decode("utf-8", "ignore")


def strip_suffix(path: str) -> str:
    """The path without its input suffix: img2dataset's shard id."""
    return re.sub(r"\.(tar\.(gz|bz2|xz|zst)|[^./]+)$", "", path, flags=re.IGNORECASE)


def name_rows(file: str, first: int, end: int, total: int) -> str:
    """The name of the shard of a file's rows `first` to `end` (excluded): `x.parquet#rows=05-11`.

    Zeros make the names of a file with `total` rows sort as their rows do.
    """
    width = len(str(total - 1))
    return f"{file}#rows={first:0{width}d}-{end - 1:0{width}d}"


def file_of(name: str) -> str:
    """The file behind a shard of rows, the folder of a group of images; others as they are."""
    return re.sub(r"#rows=\d+-\d+$|(?<![^/])images-\d{5,}$", "", name)


def _to_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _from_bytes(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
