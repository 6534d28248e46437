"""A finished table of embeddings as an input: its shards, and their records.

What `plan` and `read` are for images. A shard is one that the table was made of: its part of
`embeddings/` and its part of `errors/` beside it, which together account for every row, so that
what is made of the vectors has the rows, and the errors, that it would have of the images.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.embeddings.vectors import (
    EmbeddingTable,
    Vectors,
    find_parts,
    open_table,
    read_vectors,
)
from pipeline.errors import (
    CredentialsError,
    JobError,
    RowError,
    StorageError,
    UsageError,
)
from pipeline.read.parquet import read_schema
from pipeline.read.records import shard_failure
from pipeline.read.shard import Shard, printable, shard_from_row
from pipeline.schema import VECTORS
from pipeline.storage import Stored
from pipeline.write.layout import EMPTY_PART, ERRORS
from pipeline.write.parts import open_part, read_part

BATCH_ROWS = 1024  # 2 MB of vectors at 512 dimensions
_AT_ONCE = 32  # parts whose shard is looked up
_WHY = ("stage", "reason", "detail", "retryable")
# What a record holds where nothing is known.
_EMPTY: dict[str, Any] = {
    f.name: "" if pa.types.is_string(f.type) else b"" if pa.types.is_large_binary(f.type) else 0
    for f in VECTORS
} | {"total": -1, "retryable": False}


def open_embeddings(source: str) -> EmbeddingTable | None:
    """The table of embeddings that an input is, or None where it is none but, say, images.

    Raises UsageError for a table without rows, and as open_table.
    """
    _, parts = find_parts(storage.check_uri(source))
    try:
        metadata = read_schema(parts[0].uri).metadata if parts else None
    except RowError:
        return None  # damaged, so who reads it as images says what is wrong with it
    return open_table(source) if b"clipseg_ray.dimension" in (metadata or {}) else None


def plan_embeddings(table: EmbeddingTable) -> list[Shard]:
    """The shards of a table, sorted by name, each with its parts of the table and of the errors.

    Reads the first row of one part of each. Raises UsageError where two are of one shard, JobError
    for a damaged part.
    """
    errors = storage.list_files(storage.join(table.output, ERRORS), recursive=False)
    # Prompts that were added have errors of their own, of images that do have vectors.
    errors = [file for file in errors if ".from-" not in file.uri.rpartition("/")[2]]
    parts: dict[str, list[Stored]] = {}
    for file in [*table.files, *errors]:
        name = file.uri.rpartition("/")[2]
        if name.endswith(".parquet") and name != EMPTY_PART:
            parts.setdefault(name, []).append(file)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        names = pool.map(_read_name, [files[0] for files in parts.values()])
        shards = [_shard(table, *pair) for pair in zip(names, parts.values(), strict=True)]
    shards.sort(key=lambda shard: shard.name)
    for one, other in itertools.pairwise(shards):
        if one.name == other.name:
            files = f"{one.files[0]} and {other.files[0]}"
            raise UsageError(f"{table.output}: {files} are both of the shard {one.name}")
    return shards


def _read_name(file: Stored) -> str:
    """The shard that a part is of, as its first row says."""
    with open_part(file.uri, file.version) as parquet:
        first = next(parquet.iter_batches(1, columns=["shard"]), None)
        if first is None:
            raise JobError(f"{file.uri}: a part without rows")
        return str(first["shard"][0])


def _shard(table: EmbeddingTable, name: str, files: list[Stored]) -> Shard:
    seen = "".join(f"{file.uri}\0{file.size_bytes}\0{file.version}\n" for file in files)
    start = len(table.output.rstrip("/")) + 1
    return Shard(
        name=name,
        uri=table.output,
        format="embeddings",
        size_bytes=sum(file.size_bytes for file in files),
        version=hashlib.sha256(seen.encode("utf-8", "surrogateescape")).hexdigest(),
        files=tuple(file.uri[start:] for file in files),
    )


class ReadEmbeddings:
    """The read stage: rows of shard_to_row -> schema.VECTORS, as `read.read_batches` for images."""

    def __init__(self, table: EmbeddingTable):
        self.table = replace(table, files=())

    def __call__(self, shards: pa.Table) -> Iterator[pa.Table]:
        for row in shards.to_pylist():
            yield from read_embeddings(self.table, shard_from_row(row))


def read_embeddings(
    table: EmbeddingTable, shard: Shard, *, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.Table]:
    """The rows of a shard with their vectors, then those that failed, then the end record.

    A row that has neither is one that failed here. Damage and failures of storage become a reason
    of the shard. Raises CredentialsError, and UsageError for a part of another model or of several
    shards.
    """
    seen: set[int] = set()
    failed: dict[int | None, dict[str, Any]] = {}
    try:
        for path in shard.files:
            uri = storage.join(shard.uri, path)
            if path.startswith(f"{ERRORS}/"):
                failed = _read_errors(uri)
                continue
            part = Stored(uri=uri, size_bytes=0, version="")
            for vectors in read_vectors(table, part, batch_rows=batch_rows):
                if set(vectors.ids["shard"].to_pylist()) != {shard.name}:
                    raise UsageError(f"{uri}: holds rows of several shards")
                seen.update(vectors.ids["row"].to_pylist())
                yield _with_vectors(vectors)
    except CredentialsError:
        raise
    except StorageError as error:
        failed[None] = _why(shard_failure(error))
    except JobError as error:
        failed[None] = _why(RowError("read", "shard_corrupt", printable(str(error))))
    end = {"row": -1} | failed.pop(None, {})
    total = max([-1, *seen, *(row for row in failed if row is not None)]) + 1
    lost = _why(RowError("read", "no_vector"))
    rows = {row: {"row": row, **lost} for row in range(total) if row not in seen}
    rest = [*(rows | failed).values(), end | {"total": total}]
    whole = [{**_EMPTY, "shard": shard.name, "version": shard.version, **record} for record in rest]
    yield pa.Table.from_pylist(whole, schema=VECTORS)


def _read_errors(uri: str) -> dict[int | None, dict[str, Any]]:
    """By row, what of a record of schema.VECTORS a part of the errors says; None: of the shard."""
    found = read_part(uri, ["row", "key", *_WHY]).to_pylist()
    records = {record["row"]: record for record in found}
    return {
        row: record if row is not None else {name: record[name] for name in _WHY}
        for row, record in records.items()
    }


def _why(error: RowError) -> dict[str, Any]:
    return {name: getattr(error, name) for name in _WHY}


def _with_vectors(vectors: Vectors) -> pa.Table:
    """schema.VECTORS of some rows of the table."""
    count = len(vectors.ids)
    known = {name: vectors.ids[name] for name in vectors.ids.schema.names}
    known["vector"] = pa.array([row.tobytes() for row in vectors.matrix], pa.large_binary())
    columns = [
        known[f.name] if f.name in known else pa.repeat(pa.scalar(_EMPTY[f.name], f.type), count)
        for f in VECTORS
    ]
    return pa.table(columns, schema=VECTORS)
