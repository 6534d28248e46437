"""URIs in one form, and the files found under them.

A URI is a local path, `file://` or `s3://`. Credentials are never part of one. An S3 key is exact:
`a//b`, `a/../b` and `/a/b` are keys of their own, and nothing here makes one of another. A folder
is its prefix without the last slash, unless another folder has that name: the folder of `a//b` is
`a//`, that of `a/b` is `a`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import takewhile
from urllib.parse import unquote

from pipeline.errors import UsageError

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:aws[A-Za-z0-9:._-]*")
# The name of an access point may itself hold slashes.
_S3 = re.compile(
    r"s3://(arn:[^/]*:(?:accesspoint|outpost/[^/]+/accesspoint)/[^/]+|[^/]+)/?(.*)", re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One file or object as it was when listed."""

    uri: str
    size_bytes: int
    version: str  # S3: the ETag; local: "size-mtime_ns-ctime_ns"; "" for a link that leads nowhere


def check_uri(uri: str) -> str:
    """The URI in the one form used everywhere: `s3://bucket/key` or an absolute local path.

    Of a list joined by `::` each part. Raises UsageError for other schemes, for commands (`pipe:`)
    and for credentials inside a URI, without repeating them.
    """
    parts = split_list(uri)
    if len(parts) > 1:
        return "::".join(check_uri(part) for part in parts)
    if uri.startswith("pipe:"):
        raise UsageError(
            "pipe: sources are commands, which are not run: name a local path or an s3:// URI"
        )
    if "://" not in uri:
        if not uri:
            raise UsageError("an empty path: name a local path or an s3:// URI")
        return _absolute(uri)
    scheme, _, rest = uri.partition("://")
    if scheme.lower() == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not path:
            raise UsageError("a file:// URI names an absolute path: file:///folder/file")
        return _absolute(slash + unquote(path))
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
    return folder_of(f"s3://{bucket}/{key}")


def _absolute(path: str) -> str:
    """Without the two slashes at the start, kept by abspath as POSIX allows."""
    return re.sub(r"^//+", "/", os.path.abspath(path))


def split_list(uri: str) -> list[str]:
    """The parts of a list joined by `::`, as webdataset has it; one if `uri` is no list.

    A local file of the very name is no list. Of S3 URIs each begins with its scheme.
    """
    if "::" not in uri or (not is_s3(uri.lower()) and os.path.lexists(uri)):
        return [uri]
    parts = re.split(r"::(?=s3://)" if is_s3(uri.lower()) else "::", uri, flags=re.IGNORECASE)
    if not all(parts):
        raise UsageError("a list joined by :: has an empty part")
    return parts


def prefix_of(folder: str) -> str:
    """The common start of all URIs in a folder."""
    return folder if folder.endswith("/") else f"{folder}/"


def folder_of(prefix: str) -> str:
    """The folder of a prefix with a slash at its end (see prefix_of); others as they are."""
    return prefix if prefix.endswith("//") else prefix.removesuffix("/")


def join(folder: str, *names: str) -> str:
    """The URI of something below a folder; empty names change nothing."""
    names = tuple(name for name in names if name)
    return prefix_of(folder) + "/".join(names) if names else folder


def relative(folder: str, uri: str) -> str:
    """The name for `join` to find something again below a folder."""
    return uri.removeprefix(prefix_of(folder))


def parent(uri: str) -> str:
    """The folder around it; of a bucket, the bucket, and of the local root, the root."""
    if not is_s3(uri):
        return os.path.dirname(uri)
    bucket, key = split_s3(uri)
    above, slash, _ = key.removesuffix("/").rpartition("/")
    return folder_of(f"s3://{bucket}/{above}{slash}")


def common_folder(folders: list[str]) -> str:
    """The folder around all of these folders; `s3://` for those of several buckets.

    Raises UsageError for local folders beside S3.
    """
    if not any(map(is_s3, folders)):
        return os.path.commonpath(folders)
    if not all(map(is_s3, folders)):
        raise UsageError("a list joined by :: names local files and S3: give each a run of its own")
    prefixes = [prefix_of(folder) for folder in folders]
    first, last = min(prefixes), max(prefixes)  # all others share what these do
    same = (one == other for one, other in zip(first, last, strict=False))
    shared = first[: sum(takewhile(bool, same))]
    return folder_of(shared[: shared.rindex("/") + 1])


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key; the key of a bucket is empty, and both are of what names no bucket."""
    parts = _S3.fullmatch(uri)
    return (parts[1], parts[2]) if parts else ("", "")


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")
