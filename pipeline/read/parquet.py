"""Parquet shards, files or row groups of one; columns.py reads their cells."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import RowError
from pipeline.read.columns import (
    KEY_COLUMNS,
    Cell,
    find_image_column,
    holds_keys,
    holds_lists,
    holds_text,
    list_columns,
    read_cells,
    read_phrases,
    read_text,
    take_column,
)
from pipeline.read.ranges import RowSet
from pipeline.read.shard import IMAGE_LIMIT_BYTES, Sample, split_wanted

_BATCH_ROWS = 64
_BATCH_BYTES = 32 * 2**20
_TAIL_BYTES = 2**16  # what pyarrow asks for first: on S3 one request serves both
_PATHS_AT_ONCE = 8  # files that cells name: hides the latency of one request each

ReadPath = Callable[[str], bytes]


def read_schema(uri: str) -> pa.Schema:
    """The Arrow schema in a file's footer; RowError for none to be read."""
    return read_footer(uri).schema


class RowGroup(NamedTuple):
    """Facts of a row group in a footer."""

    rows: int
    size_bytes: int
    """Of all columns, before compression."""


class Footer(NamedTuple):
    """Facts of a file in its footer."""

    schema: pa.Schema
    groups: list[RowGroup]


def read_footer(uri: str, version: str = "") -> Footer:
    """Read the footer of this version of a file.

    Raises StorageError, and RowError for a damaged or inconsistent footer.
    """
    with storage.open_read(uri, version=version) as file, _damage():
        parquet = _open(file)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        list_columns(schema)  # names may be damaged, too
        found = map(metadata.row_group, range(metadata.num_row_groups))
        groups = [RowGroup(group.num_rows, group.total_byte_size) for group in found]
    total = sum(group.rows for group in groups)
    if total != metadata.num_rows or any(min(group) < 0 for group in groups):
        raise RowError("read", "shard_corrupt", "the footer's row groups are not the file's rows")
    return Footer(schema, groups)


def _refuse_path(path: str) -> bytes:
    raise RowError("read", "no_image", "only a path, no bytes")


def read_parquet(
    file: BinaryIO,
    column: str = "",
    *,
    text: str = "",
    groups: range | None = None,
    limit_bytes: int = IMAGE_LIMIT_BYTES,
    read_path: ReadPath = _refuse_path,
    skip: str = "",
) -> Iterator[Sample]:
    """The samples of each row in order; in memory are one page and at most 64 rows or 32 MB.

    `column`: the image column (see find_image_column); found by name when empty. `text`: the text
    column, if any. `groups`: the row groups to read: only their bytes are fetched; all when None.
    `read_path`: the bytes of a file named by a cell, or a RowError. `skip`: numbers of samples, as
    read.ranges has them, which come out empty; row groups of nothing else are not read. The key is
    the first of KEY_COLUMNS that holds text or whole numbers, else the path in a Hugging Face
    struct, else the row's number in the file; a row of several images gives each its key and, as
    the member, its place in the list.
    Raises RowError (shard_empty, shard_corrupt, shard_encrypted, column_missing).
    """
    with _damage():
        parquet = _open(file)
        whole = range(parquet.num_row_groups)
        if groups and groups.stop > len(whole):
            detail = f"{len(whole):,} row groups, of which number {groups.stop:,} is wanted"
            raise RowError("read", "shard_corrupt", detail)
        cells = _read_cells(parquet, groups or whole, column, text, RowSet(skip))
        yield from _load(_leave_out(cells, RowSet(skip)), text, limit_bytes, read_path)


class _Row(NamedTuple):
    """One image of a row."""

    key: str
    cell: Cell
    text: str | None


_DONE = _Row("", Cell(), None)


def _leave_out(rows: Iterator[_Row], skip: RowSet) -> Iterator[_Row]:
    return (_DONE if number in skip else row for number, row in enumerate(rows))


def _read_cells(
    parquet: pq.ParquetFile, groups: range, column: str, text: str, skip: RowSet
) -> Iterator[_Row]:
    schema = parquet.schema_arrow
    image = find_image_column(schema, column or None)
    if image is None:
        what = f"no column {column!r}" if column else "no column"
        raise RowError("read", "column_missing", f"{what} of images in {list_columns(schema)}")
    key = next((name for name in KEY_COLUMNS if holds_keys(schema, name)), "")
    if text and not holds_text(schema, text):
        detail = f"no column {split_wanted(text).name!r} of text in {list_columns(schema)}"
        raise RowError("read", "column_missing", detail)
    text, phrases = split_wanted(text)
    names = list(dict.fromkeys(name for name in (image, key, text) if name))
    read = read_phrases if phrases else read_text
    row = first = _count_rows(parquet.metadata, range(groups.start))
    samples = 0
    for group in groups:
        count = parquet.metadata.row_group(group).num_rows
        # Of lists nobody knows without reading how many samples they are.
        if count and not holds_lists(schema, image) and skip.holds(range(samples, samples + count)):
            yield from itertools.repeat(_DONE, count)
            row, samples = row + count, samples + count
            continue
        for batch in _batches(parquet, group, names):
            columns = {name: take_column(batch, name) for name in names}
            for index in range(len(batch)):
                known = read_text(columns[key][index]) if key else None
                words = read(columns[text][index]) if text else None
                for cell in read_cells(columns[image][index], image):
                    own = known if key else cell.path or None
                    yield _Row(str(row) if own is None else own, cell, words)
                    samples += 1
                row += 1
    whole = len(groups) == parquet.num_row_groups
    said = parquet.metadata.num_rows if whole else _count_rows(parquet.metadata, groups)
    if row - first != said:
        detail = f"{row - first:,} rows where the footer says {said:,}"
        raise RowError("read", "shard_corrupt", detail)


def _load(
    rows: Iterator[_Row], text: str, limit_bytes: int, read_path: ReadPath
) -> Iterator[Sample]:
    """The samples in order; files named by cells are read a few at a time.

    What `rows` raises is raised when all before is out.
    """
    pending: deque[Sample | Future[Sample]] = deque()
    failure: Exception | None = None
    with ThreadPoolExecutor(_PATHS_AT_ONCE) as pool:
        try:
            for row in rows:
                named = row.cell.image is None and row.cell.path
                given = (row, text, limit_bytes, read_path)
                pending.append(pool.submit(_sample, *given) if named else _sample(*given))
                while len(pending) > _PATHS_AT_ONCE or (pending and not named):
                    yield _result(pending.popleft())
        except Exception as error:
            failure = error
        while pending:
            yield _result(pending.popleft())
    if failure:
        raise failure


def _result(sample: Sample | Future[Sample]) -> Sample:
    return sample.result() if isinstance(sample, Future) else sample


def _sample(row: _Row, text: str, limit_bytes: int, read_path: ReadPath) -> Sample:
    cell = row.cell
    member = ":".join(part for part in (cell.place, cell.path) if part)
    found = Sample(row.key, member)
    image = cell.image
    if image is None and cell.path:
        try:
            image = read_path(cell.path)
        except RowError as error:
            return found._replace(reason=error.reason, detail=error.detail)
    if image is None:
        detail = "the image column is null, or its list empty"
        if cell.url:
            detail = (
                f"a URL, which is not fetched: {cell.url[:200]}; download it first (img2dataset)"
            )
        return found._replace(reason="no_image", detail=detail)
    if len(image) > limit_bytes:
        detail = f"{len(image):,} bytes; at most {limit_bytes:,} are read"
        return found._replace(reason="member_too_large", detail=detail)
    return found._replace(image=image).with_text(text, row.text)


def _count_rows(metadata: pq.FileMetaData, groups: range) -> int:
    return sum(metadata.row_group(group).num_rows for group in groups)


def _batches(parquet: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Of one row group: damage in it does not take back rows of another."""
    size = _batch_rows(parquet.metadata)
    yield from parquet.iter_batches(
        batch_size=size, row_groups=[group], columns=columns, use_threads=False
    )


def _open(file: BinaryIO) -> pq.ParquetFile:
    """Columns are streamed by pages: without pre_buffer=False a whole row group is loaded."""
    size_bytes = file.seek(0, 2)
    if size_bytes == 0:
        raise RowError("read", "shard_empty", "zero bytes")
    file.seek(max(size_bytes - _TAIL_BYTES, 0))
    if file.read(_TAIL_BYTES)[-4:] == b"PARE":
        raise RowError("read", "shard_encrypted", "the footer is encrypted")
    file.seek(0)
    try:
        return pq.ParquetFile(
            file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
        )
    except pa.ArrowException:
        raise
    # Ray registers extension types, whose code fails in its own ways on what only claims to be one.
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        detail = f"a column does not have the type it claims ({type(error).__name__})"
        raise RowError("read", "shard_corrupt", detail) from error


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Errors of pyarrow over damaged bytes; faults of storage are StorageErrors by now."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        text = (str(error).splitlines() or [""])[0]
        if "decrypt" in text:
            raise RowError("read", "shard_encrypted", f"a column is encrypted: {text}") from error
        detail = f"damaged, cut short or not Parquet: {text}"
        raise RowError("read", "shard_corrupt", detail) from error


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows per batch for about _BATCH_BYTES in the widest row group, all columns counted.

    Not the image column alone: asking damaged metadata for a column ends the process (pyarrow 26).
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    widest = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows > 0), default=1)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(widest, 1))))
