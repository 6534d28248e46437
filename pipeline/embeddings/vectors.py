"""A finished table of embeddings: found, checked, and read as a stream of matrices.

    OUTPUT/embeddings/*.parquet    shard, row, key, vector: fixed_size_list<float32 | float16>[D],
                                   and where texts were embedded too, text and text_vector

The model and D are in the key-value metadata of every part. Search and duplicates read batches of
rows from here and never the whole table.

Shapes: B rows of a batch, D dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import log
from pipeline.errors import JobError, UsageError
from pipeline.run.lifecycle import is_unfinished
from pipeline.storage import FileInfo
from pipeline.write.layout import EMPTY_PART
from pipeline.write.parts import WHOLE_BYTES, damage_named, open_listed, open_part

TABLE = "embeddings"
ID_COLUMNS = ("shard", "row", "key")
ROWS_AT_ONCE = 8192  # 16 MB of vectors at 512 dimensions
_NEEDED = ("model", "weights_hash", "dimension")


@dataclass(frozen=True, kw_only=True)
class EmbeddingTable:
    """The parts of a table, and their metadata."""

    uri: str
    """The folder of the parts."""
    output: str
    """The folder of its run, with _run.json and the receipts."""
    column: str
    """The column with the vectors to be read: "vector" or "text_vector"."""
    files: tuple[FileInfo, ...]
    """Its parts, sorted by name: with the rows in each part, the order of the table."""
    model: str
    """Name of the model, as given to the run."""
    weights_hash: str
    dimension: int
    normalized: bool
    """Whether the vectors were written with length 1."""
    unfinished: bool
    """Whether its run had not closed when the table was opened: rows may be missing."""


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Some consecutive rows of a table."""

    matrix: np.ndarray
    """(B, D) float32, as stored: not necessarily normalised, not necessarily writable."""
    read_ids: Callable[[], pa.RecordBatch]

    @cached_property
    def ids(self) -> pa.RecordBatch:
        """Shard, row and key of each: read when they are first asked for, since most searches need
        those of few batches, and before the next batch is. Raises as read_vectors."""
        return self.read_ids()


def open_table(source: str, column: str = "vector") -> EmbeddingTable:
    """The table in a run's output folder, or in the folder of the parts itself.

    Lists the parts and reads the footer of one. Raises UsageError if there is no table, none with
    this column, or none with rows; StorageError.
    """
    uri = storage.check_uri(source)
    folder, parts = find_parts(uri)
    if not parts:
        there = storage.exists(uri) or bool(storage.list_files(uri))
        what = f"no {TABLE}/*.parquet in it" if there else "no such folder"
        raise UsageError(f"{source}: {what}: name the output of clipseg-ray embed")
    files = [file for file in parts if not file.uri.endswith(f"/{EMPTY_PART}")]
    if not files:
        raise UsageError(f"{source}: the table of embeddings has no rows (yet)")
    with open_part(files[0].uri, files[0].version) as parquet:
        found = _read_metadata(parquet.schema_arrow, files[0].uri, column)
    output = storage.parent(folder)
    return EmbeddingTable(
        uri=folder,
        output=output,
        column=column,
        files=tuple(files),
        model=found["model"],
        weights_hash=found["weights_hash"],
        dimension=int(found["dimension"]),
        normalized=found["normalized"] == "true",
        unfinished=is_unfinished(output),
    )


def find_parts(uri: str) -> tuple[str, list[FileInfo]]:
    """The parts of the table in `uri`, or in embeddings/ there, and the folder holding them."""
    for folder in (storage.join(uri, TABLE), uri):
        files = storage.list_files(folder, recursive=False)
        parts = [file for file in files if file.uri.endswith(".parquet")]
        if parts:
            return folder, parts
    return uri, []


def check_weights(table: EmbeddingTable, model: str, weights_hash: str) -> None:
    """Raise UsageError, naming both, if a model has other weights than the one of the table."""
    if weights_hash != table.weights_hash:
        raise UsageError(
            f"the table is of the model {table.model} with the weights {table.weights_hash[:16]}, "
            f"but {model} has the weights {weights_hash[:16]}: "
            "vectors of different models cannot be compared"
        )


def warn_of_missing_rows(table: EmbeddingTable) -> None:
    """Print one line on stderr if the run of the table is not finished."""
    if table.unfinished:
        log.say(
            "note",
            f"clipseg-ray: warning: the run in {table.output} was not finished, so rows are "
            "missing; the command that made it completes it",
        )


def count_rows(file: FileInfo) -> int:
    """The rows of a part, by its footer."""
    with open_part(file.uri, file.version) as parquet:
        return int(parquet.metadata.num_rows)


def read_vectors(
    table: EmbeddingTable,
    file: FileInfo,
    *,
    batch_rows: int,
    skip_rows: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Vectors]:
    """The vectors of one part in order, at most `batch_rows` at a time, without its first rows.

    `share` (i, n): of n about equal shares of its row groups the i-th, from 0. In memory are one
    batch and a part of WHOLE_BYTES at most, whatever the size of this one. Raises UsageError when
    the part is of another model than the table's first, JobError when it is damaged, StorageError.
    """
    with open_checked(table, file, whole=True) as parquet:
        groups = [parquet.num_row_groups * end // share[1] for end in (share[0], share[0] + 1)]
        for group in range(*groups):
            rows = parquet.metadata.row_group(group).num_rows
            if skip_rows >= rows:
                skip_rows -= rows
                continue
            # Ids of a group larger than a batch would be read for each of its batches.
            late = rows <= batch_rows
            columns = [*(() if late else ID_COLUMNS), table.column]
            for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=columns):
                skipped = min(skip_rows, len(batch))
                skip_rows -= skipped
                if skipped < len(batch):
                    known = None if late else batch
                    read_ids = partial(_read_ids, parquet, file.uri, group, skipped, known)
                    matrix = _matrix(table, file, batch.slice(skipped))
                    yield Vectors(matrix=matrix, read_ids=read_ids)


def _read_ids(
    parquet: pq.ParquetFile, uri: str, group: int, skipped: int, known: pa.RecordBatch | None
) -> pa.RecordBatch:
    """Shard, row and key of the rows of a group, or of a batch if known there."""
    if known is None:
        with damage_named(uri):
            rows = parquet.read_row_group(group, columns=list(ID_COLUMNS), use_threads=False)
        (known,) = rows.combine_chunks().to_batches()
    return known.select(list(ID_COLUMNS)).slice(skipped)


def read_rows(table: EmbeddingTable, file: FileInfo, numbers: np.ndarray) -> Vectors:
    """The rows of a part with these `numbers`, at least one, increasing; raises as read_vectors.

    Reads their row groups alone.
    """
    found = []
    with open_checked(table, file) as parquet:
        rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        ends = np.cumsum(rows)
        for group in np.unique(np.searchsorted(ends, numbers, side="right")).tolist():
            offset = ends[group] - rows[group]
            columns = [*ID_COLUMNS, table.column]
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                inside = (numbers >= offset) & (numbers < offset + len(batch))
                found.append(batch.take(pa.array(numbers[inside] - offset)))
                offset += len(batch)
    rows = pa.concat_batches(found)
    ids = rows.select(list(ID_COLUMNS))
    return Vectors(matrix=_matrix(table, file, rows), read_ids=lambda: ids)


@contextlib.contextmanager
def open_checked(
    table: EmbeddingTable, file: FileInfo, *, whole: bool = False
) -> Iterator[pq.ParquetFile]:
    """A part of a table, to be read `whole` or in places; raises as read_vectors."""
    with open_listed(file) if whole else open_part(file.uri, file.version) as parquet:
        found = _read_metadata(parquet.schema_arrow, file.uri, table.column)
        if found["weights_hash"] != table.weights_hash:
            raise UsageError(
                f"{table.uri}: parts of different models: {_named(table.model, table.weights_hash)}"
                f", but {file.uri} is of {_named(found['model'], found['weights_hash'])}"
            )
        yield parquet


def shares_of(file: FileInfo) -> list[tuple[int, int]]:
    """The shares of a part to be read beside each other: of about WHOLE_BYTES each."""
    count = -(-max(file.size_bytes, 1) // WHOLE_BYTES)
    return [(i, count) for i in range(count)]


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosine of each row (B, D) with its other, (B, D) or (1, D): float32 (B,).

    Computed in float64 by itself: it depends on these two vectors alone and, unlike in a product of
    matrices, not on the rest of the batch. NaN for a zero or non-finite vector.
    """
    x, y = rows.astype(np.float64), others.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lengths = np.sqrt((x * x).sum(axis=1)) * np.sqrt((y * y).sum(axis=1))
        return np.asarray((x * y).sum(axis=1) / lengths, np.float32)


def normalize(rows: np.ndarray) -> np.ndarray:
    """The rows (B, D) at length 1, float32; NaN for a zero or non-finite one."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _named(model: str, weights_hash: str) -> str:
    return f"{model} (weights {weights_hash[:12]})"


def _read_metadata(schema: pa.Schema, uri: str, column: str) -> dict[str, str]:
    """Needed entries of a part's metadata. Raises UsageError without them or the column."""
    metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    found = {name: metadata.get(f"clipseg_ray.{name}", "") for name in _NEEDED}
    index = schema.get_field_index(column)
    if index < 0 and column == "text_vector" and schema.get_field_index("vector") >= 0:
        raise UsageError(f"{uri}: has no text_vector: the run embedded no texts")
    if not all(found.values()) or not found["dimension"].isdigit() or index < 0:
        raise UsageError(f"{uri}: not a table of embeddings; name the output of clipseg-ray embed")
    kind, size = schema.field(index).type, int(found["dimension"])
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != size or not _is_float(kind):
        raise UsageError(f"{uri}: {column} is {kind}, not a list of {size} float32 or float16")
    return found | {"normalized": metadata.get("clipseg_ray.normalized", "")}


def _is_float(kind: pa.FixedSizeListType) -> bool:
    return pa.types.is_float32(kind.value_type) or pa.types.is_float16(kind.value_type)


def _matrix(table: EmbeddingTable, file: FileInfo, rows: pa.RecordBatch) -> np.ndarray:
    """Vectors (B, D) float32 of rows of a part."""
    values = rows.column(table.column).flatten()  # of the rows that are not null
    if len(values) != len(rows) * table.dimension or values.null_count:
        raise JobError(f"{file.uri}: has null vectors")
    matrix = np.asarray(values.to_numpy(zero_copy_only=False), np.float32)
    return matrix.reshape(-1, table.dimension)
