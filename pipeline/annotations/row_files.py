"""Rows -> numbered Parquet files, written row group by row group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.annotations.destination import Destination

GROUP_BYTES = 16 * 2**20  # of rows that are held
GROUP_ROWS = 256
FILE_BYTES = 500 * 2**20


class RowFiles:
    """<stem>-00000.parquet and so on, closed at about FILE_BYTES before compression."""

    def __init__(self, dest: Destination, stem: str, schema: pa.Schema):
        self._dest, self._stem, self._schema = dest, stem, schema
        self._rows: list[dict[str, Any]] = []
        self._held_bytes = self._file_bytes = self._files = 0
        self._writer: pq.ParquetWriter | None = None
        self._path = Path()

    def add(self, row: dict[str, Any], size_bytes: int) -> None:
        """Write one row; `size_bytes` is about what it takes in memory."""
        self._rows.append(row)
        self._held_bytes += size_bytes
        if len(self._rows) >= GROUP_ROWS or self._held_bytes >= GROUP_BYTES:
            self._flush()
            if self._file_bytes >= FILE_BYTES:
                self._end()

    def close(self) -> int:
        """End the last file, or write one without rows. Returns how many there are."""
        if self._rows or (not self._files and self._writer is None):
            self._flush()
        self._end()
        return self._files

    def _flush(self) -> None:
        if self._writer is None:
            self._path = self._dest.local_path(self._stem.replace("/", "-"))
            self._writer = pq.ParquetWriter(
                self._path, self._schema, compression="zstd", use_dictionary=False
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._file_bytes += self._held_bytes
        self._rows, self._held_bytes = [], 0

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._dest.publish_path(f"{self._stem}-{self._files:05d}.parquet", self._path)
            self._files += 1
            self._writer, self._file_bytes = None, 0
