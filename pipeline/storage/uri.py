"""URIs as users write them, in the one form that the rest uses, and what was found under one.

A URI is a local path, `file://` or `s3://`. Credentials are never part of one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import product
from urllib.parse import unquote

from pipeline.errors import UsageError

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:aws[A-Za-z0-9:._-]*")
_MAX_BRACES = 1_000_000  # names that one pattern may stand for


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One file or object as it was when listed."""

    uri: str
    size_bytes: int
    version: str  # S3: the ETag; local: "size-mtime_ns"; "" for a link that leads nowhere


def check_uri(uri: str) -> str:
    """The URI in the one form used everywhere: `s3://bucket/key` or an absolute local path.

    Raises UsageError for other schemes and for credentials inside a URI, without repeating them.
    """
    if "://" not in uri:
        if not uri:
            raise UsageError("an empty path: name a local path or an s3:// URI")
        return os.path.abspath(uri)
    scheme, _, rest = uri.partition("://")
    if scheme.lower() == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not path:
            raise UsageError("a file:// URI names an absolute path: file:///folder/file")
        return os.path.abspath(slash + unquote(path))
    if scheme.lower() != "s3":
        shown = scheme if scheme.isalnum() and len(scheme) < 12 else "this"
        raise UsageError(f"{shown}:// is not supported: name a local path or an s3:// URI")
    bucket, _, key = rest.partition("/")
    # A secret key may hold a slash, so the @ may come late: the colon is what gives it away.
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:aws")):
        raise UsageError(
            "an s3:// URI must not hold credentials: put them in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and write s3://bucket/path"
        )
    if not _BUCKET.fullmatch(bucket):
        raise UsageError("an s3:// URI begins with the name of one bucket: s3://bucket/path")
    return f"s3://{bucket}/{key}".rstrip("/")


def join(uri: str, *names: str) -> str:
    """The URI of something below a folder; empty names change nothing."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names if name)])


def parent(uri: str) -> str:
    """The folder that holds it; of a bucket, the bucket, and of the local root, the root."""
    if not is_s3(uri):
        return os.path.dirname(uri)
    bucket, _, key = uri[len("s3://") :].partition("/")
    return join(f"s3://{bucket}", key.rpartition("/")[0])


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def expand_braces(pattern: str) -> list[str]:
    """Every name a pattern stands for: `{0000..0099}` (zeros kept), `{a,b}`, several in a row."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [
        [piece] if index % 2 == 0 else _brace_choices(piece) for index, piece in enumerate(pieces)
    ]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MAX_BRACES:
        raise UsageError(f"{pattern}: stands for {count:,} names; at most {_MAX_BRACES:,}")
    return list(dict.fromkeys("".join(parts) for parts in product(*choices)))


def _brace_choices(inner: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = match.groups()
        width = max(map(len, match.groups())) if "0" in (first[0], last[0]) else 0
        start, stop = int(first), int(last)
        if abs(stop - start) >= _MAX_BRACES:
            raise UsageError(f"{{{inner}}}: stands for more than {_MAX_BRACES:,} names")
        step = 1 if start <= stop else -1
        return [f"{number:0{width}d}" for number in range(start, stop + step, step)]
    return inner.split(",") if "," in inner else [f"{{{inner}}}"]
