"""Reading the parts of an output's tables; of the input's Parquet files see read_parquet.

Never by pq.read_table: a thread of its scanner may still hold the file when Python ends, which then
aborts a process that was done (https://github.com/apache/arrow/issues/34314).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import JobError


@contextlib.contextmanager
def open_part(uri: str, version: str = "") -> Iterator[pq.ParquetFile]:
    """A part, streamed by pages. Raises JobError naming it when damaged, StorageError."""
    with storage.open_read(uri, version=version) as file, _opened(uri, file) as parquet:
        yield parquet


def read_part(uri: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a whole part, in one request. Raises as open_part does."""
    data = storage.read_bytes(uri)
    with _opened(uri, io.BytesIO(data)) as parquet:
        if missing := set(columns) - set(parquet.schema_arrow.names):
            raise JobError(f"{uri}: not a part of this table: it has no column {min(missing)!r}")
        return parquet.read(columns=list(columns), use_threads=False)


@contextlib.contextmanager
def _opened(uri: str, file: BinaryIO) -> Iterator[pq.ParquetFile]:
    try:
        yield pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise JobError(f"{uri}: damaged or not Parquet: {reason}") from error
