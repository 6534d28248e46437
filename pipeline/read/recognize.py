"""Choose the inputs among files: by name, and by first bytes for unknown suffixes.

Other files are counted by kind, with an example: nothing is passed over in silence.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipeline import storage
from pipeline.errors import CredentialsError, StorageError, TransientError, one_line
from pipeline.read.shard import (
    TEXT_EXTENSIONS,
    file_format,
    image_key,
    is_image,
    printable,
    strip_suffix,
)
from pipeline.storage import SPECIAL, FileInfo

# What jobs leave in their outputs, and writers such as Spark beside unfinished files.
SCRATCH = frozenset(
    (
        *("_SUCCESS", "_run.json", "_staging", "_receipts", "_prompts", "_schema.parquet"),
        *("_temporary", "_delta_log"),
    )
)
FIRST_BYTES = 512  # the magic of a tar stands at 257
_READS_AT_ONCE = 32
_PROBES = 64  # of files of one unknown suffix; the others are read where one of these is an image
_KINDS_SHOWN = 8

Named = list[tuple[str, FileInfo]]  # (path relative to the root, file)

_TEXT_SUFFIXES = tuple(f".{extension}" for extension in TEXT_EXTENSIONS)
_SUFFIX = re.compile(r"[^.](\.tar)?(\.[a-z][a-z0-9_]{0,9})$")


class LeftOut(NamedTuple):
    """Files of one kind, none of them an input."""

    files: int
    example: str
    """The first by name, relative to the input."""


def recognize_bytes(data: bytes, suffix: str = "") -> str:
    """images, tar, parquet, or "" for anything else, by the first FIRST_BYTES of a file."""
    if is_image(data, suffix):
        return "images"
    if data[:4] in (b"PAR1", b"PARE"):
        return "parquet"
    return "tar" if data[257:262] == b"ustar" else ""


def describe_left_out(left_out: dict[str, LeftOut]) -> str:
    """One line: how many files of which kinds; "" for nothing."""
    if not left_out:
        return ""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1].files, item[0]))
    shown = [f"{found.files:,} {kind} ({found.example})" for kind, found in kinds[:_KINDS_SHOWN]]
    if len(kinds) > _KINDS_SHOWN:
        shown.append(f"and {len(kinds) - _KINDS_SHOWN} more kinds")
    total = sum(found.files for found in left_out.values())
    return f"{total:,} {'file' if total == 1 else 'files'} left out: " + ", ".join(shown)


def count_left_out(kinds: Iterable[tuple[str, str]]) -> dict[str, LeftOut]:
    """(kind, name) of each file -> kind -> count and example."""
    names: dict[str, list[str]] = defaultdict(list)
    for kind, name in kinds:
        names[kind].append(name)
    return {
        kind: LeftOut(len(found), one_line(printable(min(found)), 80))
        for kind, found in sorted(names.items())
    }


def sort_files(
    root: str, files: list[FileInfo], *, by_name: bool = False
) -> tuple[dict[str, list[FileInfo]], list[tuple[str, FileInfo]]]:
    """Sort files below a root into inputs, by format, and others, with their kind.

    Files of unknown suffixes are told by their first 512 bytes: one small read each, at most 64 for
    a suffix without an image so far. Texts beside an input of their name belong to it and are not
    counted. `by_name`: hidden files are inputs, too.
    """
    inputs: dict[str, list[FileInfo]] = {"tar": [], "parquet": [], "images": []}
    left: list[tuple[str, FileInfo]] = []
    texts: list[tuple[str, FileInfo]] = []
    unknown: dict[str, Named] = defaultdict(list)
    for name, file in sorted(
        ((storage.relative(root, f.uri), f) for f in files), key=lambda pair: pair[0]
    ):
        kind, scratch = file_format(name), "" if by_name else _scratch_kind(name)
        if scratch:
            left += [(scratch, file)] if kind else []
        elif file.version == SPECIAL:
            left.append(("pipes, sockets or devices", file))
        elif kind:
            inputs[kind].append(file)
        elif name.endswith(_TEXT_SUFFIXES):  # as they are looked for
            texts.append((name, file))
        elif not file.version:
            left.append(("broken links", file))
        else:
            unknown[_suffix(name)].append((name, file))
    for suffix, some in unknown.items():
        for (_, file), kind in zip(some, _probe(some), strict=True):
            if kind == "images":
                inputs["images"].append(file)
            else:
                left.append((f"{suffix}: a {kind} by its content" if kind else suffix, file))
    owners = {
        strip_suffix(storage.relative(root, f.uri)) for f in inputs["tar"] + inputs["parquet"]
    }
    owners |= {image_key(storage.relative(root, file.uri)) for file in inputs["images"]}
    left += [(_suffix(n), file) for n, file in texts if n.rpartition(".")[0] not in owners]
    return inputs, left


def _scratch_kind(name: str) -> str:
    """Kind of a file outside any input; "" for others. Other names may begin with _."""
    parts = name.split("/")
    if any(part in SCRATCH for part in parts):
        return "scratch of a job"
    hidden = any(part.startswith(".") and part.strip(".") for part in parts)
    return "hidden" if hidden else ""


def _suffix(name: str) -> str:
    """The suffix as a kind of file; remains of CDNs and hashes at the end of a name are none."""
    match = _SUFFIX.search(name.rpartition("/")[2].lower())
    return f"{match[1] or ''}{match[2]}" if match else "without a suffix"


def _probe(files: Named) -> list[str]:
    """The format of each of some files, by its first bytes; files beyond a sample may be skipped.

    Raises TransientError and CredentialsError.
    """
    step = -(-len(files) // _PROBES)
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        sample = list(pool.map(_probe_file, files[::step]))
        if step == 1:
            return sample
        if "images" in sample:
            return list(pool.map(_probe_file, files))
    found = [""] * len(files)
    found[::step] = sample
    return found


def _probe_file(named: tuple[str, FileInfo]) -> str:
    try:
        start = storage.read_bytes(named[1].uri, limit_bytes=FIRST_BYTES)
        return recognize_bytes(start, _suffix(named[0]).removeprefix("."))
    except (CredentialsError, TransientError):
        raise
    except StorageError:  # gone since, or not to be read: counted as what its name says
        return ""
