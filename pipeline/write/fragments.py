"""Finished rows -> fragments -> one Parquet part per shard and table.

A batch mixes rows of several shards, so a worker writes what it has of each shard as a fragment
under `_staging/` and hands on an account row. When the accounts of a shard add up to its total,
its fragments are put together (`commit` says when), each row exactly once and in order, and the
parts are written whole under names that only the shard decides: a reader of
`OUTPUT/masks/*.parquet` only ever sees complete parts.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import JobError
from pipeline.write.receipts import stem

STAGING = "_staging"
# The file of each table that exists from the start and holds no rows, so that a reader's glob
# always matches something, even where no row ever failed.
EMPTY_PART = "_schema.parquet"
# Rows of a row group: small enough for range reads, large enough to compress.
ROW_GROUP_ROWS = 10_000


def pack_tables(tables: dict[str, pa.Table]) -> bytes:
    """Tables by name as one run of Arrow IPC streams, compressed; empty ones are left out."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for name, table in tables.items():
        if not len(table):
            continue
        named = table.replace_schema_metadata({"table": name})
        with pa.ipc.new_stream(sink, named.schema, options=options) as writer:
            writer.write_table(named)
    return sink.getvalue()


def unpack_tables(data: bytes) -> dict[str, pa.Table]:
    """The inverse of pack_tables."""
    source = pa.BufferReader(data)
    tables = {}
    while source.tell() < source.size():
        table = pa.ipc.open_stream(source).read_all()
        name = table.schema.metadata[b"table"].decode()
        tables[name] = table.replace_schema_metadata(None)
    return tables


class WriteFragments:
    """Write the tables of each shard in a batch: schema.FRAGMENTS -> schema.ACCOUNTS.

    Every attempt writes under fresh names; what counts is only what an account row names, so a
    task that is run twice leaves an orphan in the staging folder and never a row twice.
    `first_prompt`: of the pass, see Shard.
    """

    def __init__(self, output: str, first_prompt: int = 0):
        self.output, self.first_prompt = output, first_prompt

    def __call__(self, batch: pa.Table) -> pa.Table:
        stems = [stem(shard, self.first_prompt) for shard in batch["shard"].to_pylist()]
        names = [f"{stem}/{uuid.uuid4().hex}.arrows" for stem in stems]
        for name, tables in zip(names, batch["tables"], strict=True):
            storage.write_bytes(
                storage.join(self.output, STAGING, name), tables.as_buffer().to_pybytes()
            )
        return batch.drop_columns(["tables"]).append_column("fragment", pa.array(names))


def write_empty_parts(output: str, tables: dict[str, schema.Table]) -> None:
    """Give every table of a run its part without rows."""
    for name, columns in schemas_of(tables).items():
        sink = io.BytesIO()
        # No row group either: Hugging Face datasets stumbles over one that is empty.
        pq.ParquetWriter(sink, columns.with_metadata(_metadata(columns))).close()
        storage.write_bytes(storage.join(output, name, EMPTY_PART), sink.getvalue())


def schemas_of(tables: dict[str, schema.Table]) -> dict[str, pa.Schema]:
    """The schema of every table of a run, the errors' too."""
    return {**{name: table.schema for name, table in tables.items()}, "errors": schema.ERRORS}


def assemble(
    output: str, fragments: list[str], schemas: dict[str, pa.Schema]
) -> dict[str, pa.Table]:
    """All tables of a shard, sorted by row, and by prompt or rank."""
    pieces = {name: [columns.empty_table()] for name, columns in schemas.items()}
    for fragment in fragments:
        data = storage.read_bytes(storage.join(output, STAGING, fragment))
        for name, table in unpack_tables(data).items():
            pieces[name].append(table.replace_schema_metadata(schemas[name].metadata))
    order = {
        name: [(key, "ascending") for key in ("row", "prompt_id", "rank") if key in columns.names]
        for name, columns in schemas.items()
    }
    return {name: pa.concat_tables(some).sort_by(order[name]) for name, some in pieces.items()}


def write_part(output: str, name: str, stem: str, table: pa.Table) -> dict[str, Any]:
    """Write one part, whole; returns what the receipt says of it."""
    data = _parquet(table)
    path = f"{name}/{stem}.parquet"
    storage.write_bytes(storage.join(output, path), data)
    return {
        "table": name,
        "path": path,
        "rows": len(table),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _parquet(table: pa.Table) -> bytes:
    """A Parquet file, read back and counted before anybody sees it."""
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    floats = [n for n in vectors if pa.types.is_float32(table.schema.field(n).type.value_type)]
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(_metadata(table.schema)),
        sink,
        compression="zstd",
        compression_level=1,
        row_group_size=ROW_GROUP_ROWS,
        # Floats of vectors hardly repeat, but their bytes of one significance look alike.
        use_dictionary=[n for n in table.column_names if n not in vectors],
        use_byte_stream_split=[f"{name}.list.element" for name in floats],
    )
    data = sink.getvalue()
    if pq.read_metadata(io.BytesIO(data)).num_rows != len(table):
        raise JobError("a Parquet part came out with another number of rows than went in")
    return data


def _metadata(columns: pa.Schema) -> dict[bytes, bytes]:
    """What a file says of itself: the schema's own facts, and the version of the columns."""
    version = str(schema.SCHEMA_VERSION).encode()
    return {**(columns.metadata or {}), b"clipseg_ray.schema_version": version}
