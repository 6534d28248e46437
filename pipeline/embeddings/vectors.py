"""A finished table of embeddings: found, checked, and read as a stream of matrices.

    OUTPUT/embeddings/*.parquet    shard, row, key, vector: fixed_size_list<float32 | float16>[D],
                                   and where texts were embedded too, text and text_vector

The model and D are in the key-value metadata of every part. Search and duplicates read batches of
rows from here and never the whole table.

Shapes: B rows of a batch, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import log
from pipeline.errors import JobError, UsageError
from pipeline.run.lifecycle import is_unfinished
from pipeline.storage import FileInfo
from pipeline.write.layout import EMPTY_PART
from pipeline.write.parts import open_part

TABLE = "embeddings"
ID_COLUMNS = ("shard", "row", "key")
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
    ids: pa.RecordBatch
    """Shard, row and key of each, or no columns at all."""


def open_table(source: str, column: str = "vector") -> EmbeddingTable:
    """The table in a run's output folder, or in the folder of the parts itself.

    Lists the parts and reads the footer of one. Raises UsageError where there is no table, none
    with this column, or none with rows; StorageError.
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
    """The parts of the table in `uri`, or in embeddings/ there, and the folder that holds them."""
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
    ids: bool = True,
    skip_rows: int = 0,
) -> Iterator[Vectors]:
    """The vectors of one part in order, at most `batch_rows` at a time, without its first rows.

    In memory is one batch, whatever the size of the part. Raises UsageError when the part is of
    another model than the table's first, JobError when it is damaged, StorageError.
    """
    with open_part(file.uri, file.version) as parquet:
        found = _read_metadata(parquet.schema_arrow, file.uri, table.column)
        if found["weights_hash"] != table.weights_hash:
            raise UsageError(
                f"{table.uri}: parts of different models: {_named(table.model, table.weights_hash)}"
                f", but {file.uri} is of {_named(found['model'], found['weights_hash'])}"
            )
        groups = list(range(parquet.num_row_groups))
        while groups and skip_rows >= (rows := parquet.metadata.row_group(groups[0]).num_rows):
            skip_rows -= rows
            del groups[0]
        columns = [*(ID_COLUMNS if ids else ()), table.column]
        for batch in parquet.iter_batches(batch_rows, row_groups=groups, columns=columns):
            skipped = min(skip_rows, len(batch))
            skip_rows -= skipped
            rest = batch.slice(skipped)
            if len(rest):
                matrix = _matrix(rest.column(table.column), table.dimension, file.uri)
                yield Vectors(matrix=matrix, ids=rest.select(list(ID_COLUMNS) if ids else []))


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosine of each row (B, D) with its other, (B, D) or (1, D): float32 (B,).

    Computed in float64 by itself, so that it depends on these two vectors alone, and not on what
    else is in the batch as in a product of matrices. NaN where a vector is zero or not finite.
    """
    x, y = rows.astype(np.float64), others.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lengths = np.sqrt((x * x).sum(axis=1)) * np.sqrt((y * y).sum(axis=1))
        return np.asarray((x * y).sum(axis=1) / lengths, np.float32)


def normalize(rows: np.ndarray) -> np.ndarray:
    """The rows (B, D) at length 1, float32; NaN where one is zero or not finite."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _named(model: str, weights_hash: str) -> str:
    return f"{model} (weights {weights_hash[:12]})"


def _read_metadata(schema: pa.Schema, uri: str, column: str) -> dict[str, str]:
    """The needed entries of a part's metadata. Raises UsageError where they or the column lack."""
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


def _matrix(column: pa.Array, dimension: int, uri: str) -> np.ndarray:
    values = column.flatten()  # of the rows that are not null
    if len(values) != len(column) * dimension or values.null_count:
        raise JobError(f"{uri}: has null vectors")
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(-1, dimension)
