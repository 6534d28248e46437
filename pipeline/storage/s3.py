"""S3 through s3fs: find and delete objects; `s3_read` and `s3_write` do what their names say.

Requests go to the client inside s3fs, past its own retries and with those of botocore off:
`retry.persist` alone sends a request again.
Everything here is one request, or pages with a request each: pages before a fault are kept.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import NotFoundError
from pipeline.storage.faults import sort_code
from pipeline.storage.retry import patience_s, persist
from pipeline.storage.uri import FileInfo, folder_of, join, prefix_of, relative, split_s3

_DELETE_KEYS = 1000  # the most that one DeleteObjects request takes
_CONNECTIONS = 64  # more than any caller has threads


def client() -> _Client:
    """The client of this process, shared by its threads."""
    return _client_of(os.getpid(), patience_s())


@functools.lru_cache(maxsize=4)
def _client_of(pid: int, patience_s: float) -> _Client:
    return _Client(patience_s)


class _Client:
    """The S3 client of s3fs, its coroutines called from threads.

    Methods and parameters are botocore's (get_object, put_object, ...). They run on fsspec's loop.
    """

    def __init__(self, patience_s: float):
        import s3fs  # 0.5 s, and local runs need none of it

        self._files = s3fs.S3FileSystem(
            anon=False,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "retries": {"total_max_attempts": 1},
                "connect_timeout": patience_s,
                "read_timeout": patience_s,  # for each read of the socket: a slow body is not cut
                "max_pool_connections": _CONNECTIONS,
            },
        )

    def __getattr__(self, method: str) -> Callable[..., dict[str, Any]]:
        from fsspec.asyn import sync

        loop = self._files.loop

        def request(**parameters: Any) -> dict[str, Any]:
            answer = sync(loop, getattr(self._files.s3, method), **parameters)
            if "Body" in answer:
                answer["Body"] = _Body(answer["Body"], loop)
            return answer

        return request


class _Body:
    """The content of an object while it arrives; close it."""

    def __init__(self, stream: Any, loop: Any):
        self._stream, self._loop = stream, loop

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        from fsspec.asyn import sync

        data: bytes = sync(self._loop, self._stream.read, size)
        return data

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stream.close)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key; the key of a bucket is empty."""
    bucket, key = split_s3(uri)
    if not bucket:
        raise NotFoundError(f"{uri}: not found")
    return bucket, key


def request(
    uri: str, method: str, *, timeout_s: float | None = None, **parameters: Any
) -> dict[str, Any]:
    """One request to the bucket of a URI, by botocore's name for it, tried until it is answered."""
    bucket, _ = split(uri)
    return persist(
        uri, lambda: getattr(client(), method)(Bucket=bucket, **parameters), timeout_s=timeout_s
    )


# ----------------------------------------------------------------------------------- find


def stat_object(uri: str) -> FileInfo:
    """Size and ETag of one object; NotFoundError when there is none."""
    key = split(uri)[1]
    if not key:
        raise NotFoundError(f"{uri}: not found")
    found = request(uri, "head_object", Key=key)
    return stored(uri, found["ContentLength"], found)


def object_exists(uri: str) -> bool:
    """Whether an object or a folder is there."""
    with contextlib.suppress(NotFoundError):
        stat_object(uri)
        return True
    return _folder_exists(uri, but=())


def is_empty(folder: str) -> bool:
    """Whether neither an object of this name nor any below it is there."""
    with contextlib.suppress(NotFoundError):
        stat_object(folder)
        return False
    return not _folder_exists(folder, but=(_prefix(folder),))  # what a console makes: no content


def _folder_exists(folder: str, but: tuple[str, ...]) -> bool:
    key = split(folder)[1]
    try:
        if not key and not but:
            request(folder, "head_bucket")
            return True
        page = request(folder, "list_objects_v2", Prefix=_prefix(folder), MaxKeys=2)
    except NotFoundError:
        return False
    return any(found["Key"] not in but for found in page.get("Contents", []))


def list_objects(folder: str, *, recursive: bool = True) -> Iterator[FileInfo]:
    """The objects below a folder, without empty markers of folders."""
    with contextlib.suppress(NotFoundError):
        for found in _list_all(prefix_of(folder), "" if recursive else "/"):
            if isinstance(found, FileInfo) and not _is_marker(found):
                yield found


def _is_marker(found: FileInfo) -> bool:
    return found.uri.endswith("/") and not found.size_bytes


def glob_objects(pattern: str) -> Iterator[FileInfo | str]:
    """Objects and URIs of folders matching a pattern. One listing per folder."""
    bucket, key = split(pattern)
    with contextlib.suppress(NotFoundError):  # of a bucket that is not there
        yield from _expand(f"s3://{bucket}/", key.split("/"))


def _expand(prefix: str, names: list[str]) -> Iterator[FileInfo | str]:
    """Match the first of `names` below a folder's prefix, and the rest further down."""
    first, *rest = names
    magic = re.search(r"[*?\[]", first)
    if first == "**":
        for file in list_objects(folder_of(prefix)):
            if _matches(relative(prefix, file.uri).split("/"), names):
                yield file
    elif not magic and rest:
        yield from _expand(f"{prefix}{first}/", rest)
    else:
        start = first[: magic.start()] if magic else first
        for found in _list_all(prefix + start, "/"):
            if isinstance(found, FileInfo):
                wanted = not rest and not _is_marker(found)
                if wanted and fnmatch.fnmatchcase(found.uri[len(prefix) :], first):
                    yield found
            elif not fnmatch.fnmatchcase(found[len(prefix) : -1], first):
                continue
            elif rest:
                yield from _expand(found, rest)
            else:
                yield folder_of(found)


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    first, *rest = patterns
    if first == "**":
        return any(_matches(names[start:], rest) for start in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], first) and _matches(names[1:], rest)


def _list_all(start: str, delimiter: str) -> Iterator[FileInfo | str]:
    """Objects whose URIs begin with `start` and, up to a delimiter, the prefixes of folders."""
    bucket, key = split(start)
    more: dict[str, Any] = {}
    while True:
        page = request(start, "list_objects_v2", Prefix=key, Delimiter=delimiter, **more)
        for found in page.get("Contents", []):
            yield stored(f"s3://{bucket}/{found['Key']}", found["Size"], found)
        for below in page.get("CommonPrefixes", []):
            yield f"s3://{bucket}/{below['Prefix']}"
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _prefix(folder: str) -> str:
    """How the keys below a folder begin."""
    return split(prefix_of(folder))[1]


def stored(uri: str, size_bytes: int, found: dict[str, Any]) -> FileInfo:
    """An object with the ETag of an answer about it."""
    return FileInfo(uri=uri, size_bytes=size_bytes, version=found.get("ETag", "").strip('"'))


# --------------------------------------------------------------------------------- delete


def delete_object(uri: str) -> None:
    """Delete one object, if it exists."""
    request(uri, "delete_object", Key=split(uri)[1])


def delete_objects(folder: str) -> None:
    """Delete every object below a folder, if it exists."""
    bucket, _ = split(folder)
    with contextlib.suppress(NotFoundError):
        found = [f.uri for f in _list_all(prefix_of(folder), "") if isinstance(f, FileInfo)]
        keys = [split(uri)[1] for uri in found]
        for start in range(0, len(keys), _DELETE_KEYS):
            _delete_keys(folder, bucket, keys[start : start + _DELETE_KEYS])


def _delete_keys(folder: str, bucket: str, keys: list[str]) -> None:
    objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}

    def delete() -> None:
        answer = client().delete_objects(Bucket=bucket, Delete=objects)
        for failed in answer.get("Errors", []):  # it answers 200 even where deletions failed
            raise sort_code(join(f"s3://{bucket}", failed["Key"]), failed["Code"])

    persist(folder, delete)
