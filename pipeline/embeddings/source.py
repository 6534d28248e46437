"""A finished table of embeddings as the input of a job (see run.finished)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from pipeline import storage
from pipeline.embeddings.vectors import (
    EmbeddingTable,
    Vectors,
    find_parts,
    open_table,
    read_vectors,
)
from pipeline.errors import RowError
from pipeline.read.parquet import read_schema
from pipeline.read.shard import shard_from_row
from pipeline.run.finished import empty_record, read_finished
from pipeline.schema import VECTORS
from pipeline.storage import FileInfo

BATCH_ROWS = 1024  # 2 MB of vectors at 512 dimensions


def open_embeddings(source: str) -> EmbeddingTable | None:
    """The table of embeddings at an input, or None for other inputs, such as images.

    Raises UsageError for a table without rows, and as open_table.
    """
    _, parts = find_parts(storage.check_uri(source))
    try:
        metadata = read_schema(parts[0].uri).metadata if parts else None
    except RowError:
        return None  # damaged, so who reads it as images says what is wrong with it
    return open_table(source) if b"clipseg_ray.dimension" in (metadata or {}) else None


class ReadEmbeddings:
    """Read shards of a table: rows of shard_to_row -> schema.VECTORS."""

    def __init__(self, table: EmbeddingTable, batch_rows: int = BATCH_ROWS):
        self.table, self.batch_rows = replace(table, files=()), batch_rows

    def __call__(self, shards: pa.Table) -> Iterator[pa.Table]:
        for row in shards.to_pylist():
            yield from read_finished(shard_from_row(row), self._read, VECTORS)

    def _read(self, uris: list[str]) -> Iterator[pa.Table]:
        for uri in uris:
            part = FileInfo(uri=uri, size_bytes=0, version="")
            for vectors in read_vectors(self.table, part, batch_rows=self.batch_rows):
                yield _with_vectors(vectors)


def _with_vectors(vectors: Vectors) -> pa.Table:
    """schema.VECTORS of some rows of the table."""
    count = len(vectors.ids)
    known = {name: vectors.ids[name] for name in vectors.ids.schema.names}
    known["vector"] = pa.array([row.tobytes() for row in vectors.matrix], pa.large_binary())
    empty = empty_record(VECTORS)
    columns = [
        known[f.name] if f.name in known else pa.repeat(pa.scalar(empty[f.name], f.type), count)
        for f in VECTORS
    ]
    return pa.table(columns, schema=VECTORS)
