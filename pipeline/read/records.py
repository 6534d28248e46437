"""Shards -> records of encoded bytes: what the first Ray tasks of every job run.

Nothing is decoded here. A row that cannot be read is a record with a reason; what ends a shard
early is a reason on its end record; refused credentials are raised, since they end the job.
"""

from __future__ import annotations

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
    TransientError,
)
from pipeline.read.inputs import plan_shards
from pipeline.read.isolate import ProcessDiedError, run_apart
from pipeline.read.parquet import read_parquet
from pipeline.read.shard import (
    IMAGE_LIMIT_BYTES,
    TEXT_EXTENSIONS,
    TEXT_LIMIT_BYTES,
    Sample,
    Shard,
    find_text,
    printable,
    shard_from_row,
    shard_to_row,
)
from pipeline.read.tar import read_tar
from pipeline.schema import RECORDS

__all__ = [
    "Shard",
    "plan_shards",
    "read_batches",
    "read_shard",
    "shard_failure",
    "shard_from_row",
    "shard_to_row",
]

BATCH_ROWS = 64
BATCH_BYTES = 32 * 2**20  # of encoded images; a larger image is a batch of its own
_FILES_AT_ONCE = 8  # loose images: hides the latency of one request per file


Records = Iterator[dict[str, Any]]


def read_batches(shards: pa.Table, *, apart: bool = False) -> Iterator[pa.Table]:
    """For Ray Data's map_batches: rows of `shard_to_row` in, tables of schema.RECORDS out.

    A table holds records of one shard, at most BATCH_ROWS of them and BATCH_BYTES of images.
    `apart`: read in a process of its own; a shard that ends it ends with reader_crashed.
    """
    read = _read_apart if apart else read_shard
    for row in shards.to_pylist():
        batch: list[dict[str, Any]] = []
        size_bytes = 0
        for record in read(shard_from_row(row)):
            size_bytes += len(record["image"])
            if batch and (len(batch) == BATCH_ROWS or size_bytes > BATCH_BYTES):
                yield pa.Table.from_pylist(batch, schema=RECORDS)
                batch, size_bytes = [], len(record["image"])
            batch.append(record)
        yield pa.Table.from_pylist(batch, schema=RECORDS)


def _read_apart(shard: Shard) -> Records:
    total = 0
    try:
        for record in run_apart(read_shard, shard):
            yield record
            total += 1
    except ProcessDiedError as death:
        failure = RowError("read", "reader_crashed", death.how, retryable=death.killed)
        yield _end(shard, total, failure)


def read_shard(shard: Shard) -> Records:
    """The records of one shard (columns of schema.RECORDS) in order, then its end record.

    Data never raises: damage becomes a reason. CredentialsError does.
    """
    total = 0
    failure: RowError | None = None
    try:
        for sample in _read_samples(shard):
            yield {
                "shard": shard.name,
                "row": total,
                "total": -1,
                **sample._asdict(),
                "detail": sample.detail[:500],
                "stage": "read" if sample.reason else "",
            }
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
        passing = isinstance(error, MemoryError)
        failure = RowError("read", "shard_corrupt", detail, retryable=passing)
    yield _end(shard, total, failure)


def _end(shard: Shard, total: int, failure: RowError | None) -> dict[str, Any]:
    """The end record of a shard with `total` rows."""
    return {
        "shard": shard.name,
        "row": -1,
        "key": "",
        "member": "",
        "image": b"",
        "text": "",
        "total": total,
        "stage": failure.stage if failure else "",
        "reason": failure.reason if failure else "",
        "detail": failure.detail if failure else "",
        "retryable": failure.retryable if failure else False,
    }


def _read_samples(shard: Shard) -> Iterator[Sample]:
    if shard.format == "images":
        yield from read_images(shard.uri, shard.files, shard.text)
        return
    if not shard.version:
        raise NotFoundError(f"{shard.uri}: not there when the input was listed")
    with storage.open_read(shard.uri, version=shard.version) as file:
        if shard.format == "tar":
            yield from read_tar(file, text=shard.text)
        else:
            first, count = shard.first_row_group, shard.row_groups
            groups = range(first, first + count) if count else None
            yield from read_parquet(file, shard.column, text=shard.text, groups=groups)


def shard_failure(error: StorageError) -> RowError:
    """What ended the reading of a shard, as the errors table says it."""
    detail = printable(str(error))
    if isinstance(error, NotFoundError):
        return RowError("read", "shard_missing", detail)
    if isinstance(error, ChangedError):
        return RowError("read", "shard_changed", detail, retryable=True)
    retryable = isinstance(error, TransientError)
    return RowError("read", "shard_unreadable", detail, retryable=retryable)


def read_images(root: str, files: tuple[str, ...], text: str = "") -> Iterator[Sample]:
    """One sample per loose image file, in order; the key is its path without the extension.

    `text`: what to look for in the .json or .txt file of the same name (see find_text).
    """
    pending: deque[Future[Sample]] = deque()
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for path in files:
            pending.append(pool.submit(_read_image, root, path, text))
            if len(pending) > _FILES_AT_ONCE:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read_image(root: str, path: str, text: str) -> Sample:
    key = printable(path.rpartition(".")[0])
    found = Sample(key, printable(path))
    try:
        image = storage.read_bytes(storage.join(root, path), limit_bytes=IMAGE_LIMIT_BYTES + 1)
        beside = _read_text(storage.join(root, path.rpartition(".")[0]), text) if text else None
    except CredentialsError:
        raise
    except NotFoundError as error:
        return found._replace(reason="file_missing", detail=printable(str(error)))
    except StorageError as error:
        return found._replace(
            reason="file_unreadable",
            detail=printable(str(error)),
            retryable=isinstance(error, TransientError),
        )
    if len(image) > IMAGE_LIMIT_BYTES:
        detail = f"more than {IMAGE_LIMIT_BYTES:,} bytes"
        return found._replace(reason="member_too_large", detail=detail)
    return found._replace(image=image).with_text(text, beside)


def _read_text(stem: str, wanted: str) -> str | None:
    for extension in TEXT_EXTENSIONS:
        try:
            data = storage.read_bytes(f"{stem}.{extension}", limit_bytes=TEXT_LIMIT_BYTES + 1)
        except NotFoundError:
            continue
        if len(data) > TEXT_LIMIT_BYTES:  # as in a tar
            continue
        if (text := find_text(wanted, extension, data)) is not None:
            return text
    return None
