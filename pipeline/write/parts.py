"""The parts of an output's tables: Parquet files, written whole and read without the scanner.

Never read by pq.read_table: a thread of its scanner may still hold the file when Python ends, and
abort a finished process (https://github.com/apache/arrow/issues/34314).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import JobError
from pipeline.write.layout import EMPTY_PART, ERRORS

# Bounds of a row group, whichever is met first: small enough for range reads and for memory, large
# enough to compress.
ROW_GROUP_ROWS = 10_000
ROW_GROUP_BYTES = 64 * 2**20
# Of a part that is read in one request; a larger one is streamed.
WHOLE_BYTES = 64 * 2**20


@contextlib.contextmanager
def open_part(uri: str, version: str = "") -> Iterator[pq.ParquetFile]:
    """A part, streamed by pages. Raises JobError naming it when damaged, StorageError."""
    with storage.open_read(uri, version=version) as file, _opened(uri, file) as parquet:
        yield parquet


@contextlib.contextmanager
def open_listed(part: storage.FileInfo) -> Iterator[pq.ParquetFile]:
    """A part as it was listed, to be read from end to end; raises as open_part does.

    One of WHOLE_BYTES at most is read in one request, and decoded without the GIL.
    """
    if 0 < part.size_bytes <= WHOLE_BYTES:
        data = storage.read_bytes(part.uri, version=part.version)
        with _opened(part.uri, pa.BufferReader(data), buffer_size=0) as parquet:
            yield parquet
    else:
        with open_part(part.uri, part.version) as parquet:
            yield parquet


def read_part(uri: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a whole part, in one request. Raises as open_part does."""
    data = storage.read_bytes(uri)
    with _opened(uri, pa.BufferReader(data), buffer_size=0) as parquet:
        if missing := set(columns) - set(parquet.schema_arrow.names):
            raise JobError(f"{uri}: not a part of this table: it has no column {min(missing)!r}")
        return parquet.read(columns=list(columns), use_threads=False)


@contextlib.contextmanager
def _opened(
    uri: str, file: BinaryIO | pa.BufferReader, *, buffer_size: int = 2**20
) -> Iterator[pq.ParquetFile]:
    with damage_named(uri):
        yield pq.ParquetFile(
            file, buffer_size=buffer_size, pre_buffer=False, page_checksum_verification=True
        )


@contextlib.contextmanager
def damage_named(uri: str) -> Iterator[None]:
    """Errors of Arrow's reader as a JobError naming the part."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise JobError(f"{uri}: damaged or not Parquet: {reason}") from error


class PartWriter:
    """One part, written into a local file row group by row group.

    The bytes depend on the rows and their order alone, not on how `add` was given them.
    """

    def __init__(self, path: Path, columns: pa.Schema, group_bytes: int = ROW_GROUP_BYTES):
        self.path, self.rows, self._group_bytes = path, 0, group_bytes
        self._pending: list[pa.Table] = []
        self._pending_rows = self._pending_bytes = 0
        vectors = [f.name for f in columns if pa.types.is_fixed_size_list(f.type)]
        floats = [n for n in vectors if pa.types.is_float32(columns.field(n).type.value_type)]
        self._columns = columns.with_metadata(_metadata(columns))
        self._file = pq.ParquetWriter(
            path,
            self._columns,
            compression="zstd",
            compression_level=1,
            write_page_checksum=True,
            # Floats of vectors hardly repeat, but their bytes of one significance look alike.
            use_dictionary=[n for n in columns.names if n not in vectors],
            use_byte_stream_split=[f"{name}.list.element" for name in floats],
        )

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        self.rows += len(table)
        table = table.combine_chunks()
        ends = np.cumsum(_row_bytes(table))
        start = 0
        while start < len(table):
            done = ends[start - 1] if start else 0
            room_rows = ROW_GROUP_ROWS - self._pending_rows
            room_bytes = self._group_bytes - self._pending_bytes
            # The row that fills the group is its last.
            fits = int(np.searchsorted(ends[start:] - done, room_bytes)) + 1
            count = min(fits, room_rows, len(table) - start)
            self._pending.append(table.slice(start, count))
            self._pending_rows += count
            self._pending_bytes += int(ends[start + count - 1] - done)
            start += count
            if self._pending_rows >= ROW_GROUP_ROWS or self._pending_bytes >= self._group_bytes:
                self._flush()

    def close(self) -> dict[str, Any]:
        """Finish the file; returns its rows, bytes and sha256. Raises JobError if rows are lost."""
        if self._pending:
            self._flush()
        self._file.close()
        if pq.read_metadata(self.path).num_rows != self.rows:
            raise JobError("a Parquet part came out with another number of rows than went in")
        with self.path.open("rb") as file:
            digest = _digest(file)
        return {"rows": self.rows, "bytes": self.path.stat().st_size, "sha256": digest}

    def _flush(self) -> None:
        rows = pa.concat_tables(self._pending).combine_chunks()
        self._file.write_table(rows.cast(self._columns), row_group_size=max(len(rows), 1))
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0


def write_empty_parts(output: str, tables: dict[str, schema.Table]) -> None:
    """Give every table of a run its part without rows."""
    for name, columns in schemas_of(tables).items():
        sink = io.BytesIO()
        # No row group either: Hugging Face datasets stumbles over one that is empty.
        pq.ParquetWriter(sink, columns.with_metadata(_metadata(columns))).close()
        storage.write_bytes(storage.join(output, name, EMPTY_PART), sink.getvalue())


def schemas_of(tables: dict[str, schema.Table]) -> dict[str, pa.Schema]:
    """The schema of every table of a run, the errors' too."""
    return {**{name: table.schema for name, table in tables.items()}, ERRORS: schema.ERRORS}


def _row_bytes(table: pa.Table) -> np.ndarray:
    """Bytes of each row (N,) int64: of strings and binaries as they are, 8 for any other value."""
    sizes = np.zeros(len(table), np.int64)
    for column in table.columns:
        for leaf in _leaves(column):
            if pa.types.is_fixed_size_list(leaf.type):
                sizes += 4 * leaf.type.list_size
            elif pa.types.is_binary(leaf.type) or pa.types.is_string(leaf.type):
                lengths = pc.fill_null(pc.binary_length(leaf), 0)
                sizes += np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)
            else:
                sizes += 8
    return sizes


def _leaves(column: pa.ChunkedArray) -> list[pa.Array]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.flatten() if pa.types.is_struct(array.type) else [array]


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _metadata(columns: pa.Schema) -> dict[bytes, bytes]:
    """Key-value metadata of a file: the schema's own facts, and the version of the columns."""
    version = str(schema.SCHEMA_VERSION).encode()
    return {**(columns.metadata or {}), b"clipseg_ray.schema_version": version}
