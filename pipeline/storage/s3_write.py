"""Write whole objects to S3: in one request, or as a multipart upload.

A reply can be lost after the write has happened. Writing once more is harmless, except for a
create-only write: there the second attempt is refused because of the first. After a refusal the
stored bytes are therefore compared with the new ones.
"""

from __future__ import annotations

import contextlib
import mimetypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import ChangedError, NotFoundError, StorageError
from pipeline.storage.faults import storage_errors
from pipeline.storage.s3 import request, split, stat_object
from pipeline.storage.s3_read import read_range

PART_BYTES = 32 * 2**20  # of an upload in parts, which begins at two of them
_PARTS = 10_000  # the most that S3 takes
_PARTS_AT_ONCE = 4
_ABORT_TIMEOUT_S = 5.0  # the upload has failed already: nobody should wait long for its end


def replace_object(uri: str, data: bytes, version: str) -> None:
    """Replace the object with this ETag; ChangedError if it has another.

    A server ignoring the condition replaces any object.
    """
    condition = {"IfMatch": f'"{version}"'}
    _finish(uri, "put_object", data, False, Key=split(uri)[1], **condition, Body=data)


def put_object(uri: str, source: bytes | Path, *, create: bool = False) -> None:
    """Write bytes or a local file. With `create`, FileExistsError if there is an object already.

    Equal bytes of another writer pass for ours, since the reply to ours may have been lost. A
    unique name in the bytes tells the winner among several writers.
    """
    size = _size(source)
    kind, _ = mimetypes.guess_type(uri)
    wanted: dict[str, Any] = {"Key": split(uri)[1], **({"ContentType": kind} if kind else {})}
    condition = {"IfNoneMatch": "*"} if create else {}
    if size < 2 * PART_BYTES:
        body = _read(source, 0, size)
        _finish(uri, "put_object", source, create, **wanted, **condition, Body=body)
    else:
        _put_parts(uri, source, size, create, wanted, condition)


def _put_parts(
    uri: str,
    source: bytes | Path,
    size: int,
    create: bool,
    wanted: dict[str, Any],
    condition: dict[str, str],
) -> None:
    """Upload in parts; after a failure the parts, billed unseen, are removed.

    An upload without an answer to its first request has no id to remove it by: a lifecycle rule for
    incomplete uploads clears those.
    """
    upload: dict[str, Any] = {"Key": wanted["Key"]}
    upload["UploadId"] = request(uri, "create_multipart_upload", **wanted)["UploadId"]
    step = max(PART_BYTES, -(-size // _PARTS))

    def send(start: int) -> dict[str, Any]:
        number, body = start // step + 1, _read(source, start, step)
        sent = request(uri, "upload_part", **upload, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            parts = {"Parts": list(pool.map(send, range(0, size, step)))}
        ending = {**upload, **condition, "MultipartUpload": parts}
        _finish(uri, "complete_multipart_upload", source, create, **ending)
    except BaseException:
        with contextlib.suppress(StorageError):
            request(uri, "abort_multipart_upload", timeout_s=_ABORT_TIMEOUT_S, **upload)
        raise


def _finish(uri: str, method: str, source: bytes | Path, create: bool, **parameters: Any) -> None:
    """Send the completing request of the object."""
    try:
        request(uri, method, **parameters)
    except (ChangedError, NotFoundError) as error:  # it exists; or the upload is over already
        # Perhaps by ourselves, and the answer was lost: aiohttp, too, sends a PUT again then.
        if _is_stored(uri, source):
            return
        if create and isinstance(error, ChangedError):
            raise FileExistsError(uri) from error
        raise


def _is_stored(uri: str, source: bytes | Path) -> bool:
    """Whether the object holds exactly these bytes."""
    try:
        found = stat_object(uri)
        return found.size_bytes == _size(source) and all(
            read_range(uri, start, start + len(piece), found.version)[0] == piece
            for start, piece in _pieces(source)
        )
    except (ChangedError, NotFoundError):
        return False


def _pieces(source: bytes | Path) -> Iterator[tuple[int, bytes]]:
    for start in range(0, _size(source), PART_BYTES):
        yield start, _read(source, start, PART_BYTES)


def _size(source: bytes | Path) -> int:
    if isinstance(source, bytes):
        return len(source)
    with storage_errors(str(source)):
        return source.stat().st_size


def _read(source: bytes | Path, start: int, count: int) -> bytes:
    if isinstance(source, bytes):
        return source[start : start + count]
    with storage_errors(str(source)), open(source, "rb") as file:
        file.seek(start)
        return file.read(count)
