"""Shards -> records of encoded bytes: the first stage of every job.

Nothing is decoded here. An unreadable row is a record with a reason; damage ending a shard early is
a reason on its end record; refused credentials are raised, since they end the job.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import (
    ChangedError,
    CredentialsError,
    NotFoundError,
    RowError,
    StorageError,
)
from pipeline.read.parquet import read_parquet
from pipeline.read.paths import PathReader
from pipeline.read.ranges import RowSet, iter_rows
from pipeline.read.shard import (
    IMAGE_LIMIT_BYTES,
    TEXT_EXTENSIONS,
    TEXT_LIMIT_BYTES,
    Sample,
    Shard,
    find_text,
    image_key,
    printable,
    shard_from_row,
)
from pipeline.read.tar import read_tar
from pipeline.schema import RECORDS

BATCH_ROWS = 64
BATCH_BYTES = 32 * 2**20  # of encoded images; a larger image is a batch of its own
_FILES_AT_ONCE = 8  # loose images: hides the latency of one request per file


Records = Iterator[dict[str, Any]]


def read_batches(shards: pa.Table, batch_rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """Read shards: rows of `shard_to_row` in, tables of schema.RECORDS out.

    A table holds records of one shard, at most `batch_rows` of them and BATCH_BYTES of images.
    """
    for row in shards.to_pylist():
        batch: list[dict[str, Any]] = []
        size_bytes = 0
        for record in read_shard(shard_from_row(row)):
            if batch and size_bytes + len(record["image"]) > BATCH_BYTES:
                yield pa.Table.from_pylist(batch, schema=RECORDS)
                batch, size_bytes = [], 0
            batch.append(record)
            size_bytes += len(record["image"])
            full = len(batch) == batch_rows and record["row"] >= 0
            del record  # or a large image stays while the next one is read
            if full or size_bytes >= BATCH_BYTES:
                yield pa.Table.from_pylist(batch, schema=RECORDS)
                batch, size_bytes = [], 0
        yield pa.Table.from_pylist(batch, schema=RECORDS)


def read_one_by_one(shards: pa.Table) -> Iterator[pa.Table]:
    """As read_batches, each record in a table of its own: after a crash of the reader."""
    return read_batches(shards, batch_rows=1)


def end_crashed_shard(
    shards: pa.Table, last: pa.Table | None, how: str, *, killed: bool
) -> pa.Table:
    """The end record of the shard in a one-row table, after a crash of its reader.

    `last`: the last records before it; `how` it ended; `killed`: from outside.
    """
    shard = shard_from_row(shards.to_pylist()[0])
    rows = last["row"].to_pylist() if last is not None else []
    total = max([-1, *rows, *iter_rows(shard.skip)]) + 1
    failure = RowError("read", "reader_crashed", how, retryable=killed)
    return pa.Table.from_pylist([_end(shard, total, failure)], schema=RECORDS)


def read_shard(shard: Shard) -> Records:
    """The records of one shard (columns of schema.RECORDS) in order, then its end record.

    Data never raises: damage becomes a reason. CredentialsError does.
    """
    total = skipped = 0
    failure: RowError | None = None
    skip = RowSet(shard.skip)
    try:
        for found in _read_samples(shard):
            if found is None:
                skipped += 1
                continue
            if total in skip:
                total += 1
                continue
            sample = found.with_short_names()
            yield {
                "shard": shard.name,
                "version": shard.version,
                "row": total,
                "total": -1,
                "skipped": 0,
                **sample._asdict(),
                "detail": sample.detail[:500],
                "stage": "read" if sample.reason else "",
            }
            del found, sample  # while the next one is read
            total += 1
    except CredentialsError:
        raise
    except StorageError as error:
        failure = shard_failure(error)
    except RowError as error:
        failure = error
    # The bytes are anybody's, and parsers raise what nobody has listed: one shard of a million must
    # not end the job, over which it would end again each time.
    except Exception as error:
        detail = printable(f"{type(error).__name__}: {error}")
        # Memory says nothing of the bytes: as where the storage does not give them.
        reason = "shard_unreadable" if isinstance(error, MemoryError) else "shard_corrupt"
        failure = RowError("read", reason, detail, retryable=isinstance(error, MemoryError))
    yield _end(shard, total, failure, skipped)


def _end(shard: Shard, total: int, failure: RowError | None, skipped: int = 0) -> dict[str, Any]:
    """The end record of a shard with `total` rows, and so many samples without an image."""
    return {
        "shard": shard.name,
        "version": shard.version,
        "row": -1,
        "key": "",
        "member": "",
        "image": b"",
        "text": "",
        "total": total,
        "skipped": skipped,
        "stage": failure.stage if failure else "",
        "reason": failure.reason if failure else "",
        "detail": failure.detail if failure else "",
        "retryable": failure.retryable if failure else False,
    }


def _read_samples(shard: Shard) -> Iterator[Sample | None]:
    """The samples of a shard; None for one without an image: no row.

    Those of rows in Shard.skip are empty: they are not loaded.
    """
    if shard.format == "images":
        yield from read_images(shard)
        return
    if not shard.version:
        raise NotFoundError(f"{shard.uri}: not there when the input was listed")
    with storage.open_read(shard.uri, version=shard.version) as file:
        if shard.format == "tar":
            yield from read_tar(
                file, text=shard.text, suffix=shard.member_suffix, skip=RowSet(shard.skip)
            )
        else:
            first, count = shard.first_row_group, shard.row_groups
            groups = range(first, first + count) if count else None
            yield from read_parquet(
                file,
                shard.column,
                text=shard.text,
                groups=groups,
                read_path=PathReader(shard),
                skip=shard.skip,
            )


def shard_failure(error: StorageError) -> RowError:
    """The error at the early end of a shard, as a row of the errors table."""
    detail = printable(str(error))
    if isinstance(error, NotFoundError):
        return RowError("read", "shard_missing", detail, retryable=True)
    if isinstance(error, ChangedError):
        return RowError("read", "shard_changed", detail, retryable=True)
    return RowError("read", "shard_unreadable", detail, retryable=True)


def read_images(shard: Shard) -> Iterator[Sample]:
    """One sample per loose image file, in order; the key is its path without the extension.

    Its text, if wanted, is in the .json or .txt file of the same name (see find_text), if listed
    with it. A file of a row in Shard.skip is not opened.
    """
    versions, skip = dict(shard.listed), RowSet(shard.skip)
    pending: deque[Future[Sample]] = deque()
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for row, path in enumerate(shard.files):
            if row in skip:
                pending.append(_done(Sample("", "")))
            else:
                pending.append(pool.submit(_read_image, shard, versions, path))
            if len(pending) > _FILES_AT_ONCE:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _done(sample: Sample) -> Future[Sample]:
    future: Future[Sample] = Future()
    future.set_result(sample)
    return future


def _read_image(shard: Shard, versions: dict[str, str], path: str) -> Sample:
    """`versions`: by path, as listed; "" is any."""
    stem = image_key(path)
    found = Sample(printable(stem), printable(path))
    try:
        image = storage.read_bytes(
            storage.join(shard.uri, path),
            limit_bytes=IMAGE_LIMIT_BYTES + 1,
            version=versions.get(path, ""),
        )
        beside = _read_text(shard, versions, stem) if shard.text else None
    except CredentialsError:
        raise
    except NotFoundError as error:
        return found._replace(reason="file_missing", detail=printable(str(error)), retryable=True)
    except ChangedError as error:
        detail = printable(str(error))
        return found._replace(reason="file_changed", detail=detail, retryable=True)
    except StorageError as error:
        detail = printable(str(error))
        return found._replace(reason="file_unreadable", detail=detail, retryable=True)
    except RowError as error:
        return found._replace(reason=error.reason, detail=error.detail)
    if len(image) > IMAGE_LIMIT_BYTES:
        detail = f"more than {IMAGE_LIMIT_BYTES:,} bytes"
        return found._replace(reason="member_too_large", detail=detail)
    return found._replace(image=image).with_text(shard.text, beside)


def _read_text(shard: Shard, versions: dict[str, str], stem: str) -> str | None:
    """The text beside an image, from listed files inside the input."""
    for extension in TEXT_EXTENSIONS:
        path = f"{stem}.{extension}"
        if not versions.get(path):
            continue
        uri = storage.join(shard.uri, path)
        if _leads_out(shard.uri, uri):
            detail = printable(f"{path}: a link out of the input, which is not followed")
            raise RowError("read", "no_text", detail)
        limit = TEXT_LIMIT_BYTES + 1
        data = storage.read_bytes(uri, limit_bytes=limit, version=versions[path])
        if len(data) < limit and (text := find_text(shard.text, extension, data)) is not None:
            return text  # a larger one is none, as in a tar
    return None


def _leads_out(root: str, uri: str) -> bool:
    """Whether a local path leaves a folder by a link in it."""
    if storage.is_s3(uri):
        return False
    top = os.path.realpath(root)
    return os.path.commonpath([top, os.path.realpath(uri)]) != top
