"""Finished rows -> fragments -> one part per shard and table -> a receipt.

A batch mixes rows of several shards, so a worker writes what it has of each shard as a fragment
under `_staging/` and hands on an account row. When the accounts of a shard add up to its total,
`finish_shard` puts its fragments together, each row exactly once and in order, writes the final
parts whole under names that only the shard decides, and last of all the shard's receipt. A reader
of `OUTPUT/masks/*.parquet` therefore only ever sees complete parts.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import JobError
from pipeline.shard import Shard

STAGING = "_staging"
RECEIPTS = "_receipts"
# The file of each table that exists from the start and holds no rows, so that a reader's glob
# always matches something, even where no row ever failed.
EMPTY_PART = "_schema.parquet"
# Rows of a row group: small enough for range reads, large enough to compress.
ROW_GROUP_ROWS = 10_000


def stem(shard: str) -> str:
    """The file name, without ending, of everything this shard leaves behind.

    The readable part is cut and cleaned, since shard names are whatever the storage holds; the
    hash makes it unique.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "-", shard).strip("-")[-60:]
    return f"{readable}-{hashlib.sha256(shard.encode()).hexdigest()[:16]}"


def receipt_name(shard: str, version: str) -> str:
    """The receipt's file name: it changes when the shard's content does."""
    return f"{stem(shard)}.{hashlib.sha256(version.encode()).hexdigest()[:8]}.json"


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
    """

    def __init__(self, output: str):
        self.output = output

    def __call__(self, batch: pa.Table) -> pa.Table:
        names = [f"{stem(s)}/{uuid.uuid4().hex}.arrows" for s in batch["shard"].to_pylist()]
        for name, tables in zip(names, batch["tables"], strict=True):
            storage.write_bytes(
                storage.join(self.output, STAGING, name), tables.as_buffer().to_pybytes()
            )
        return batch.drop_columns(["tables"]).append_column("fragment", pa.array(names))


def write_empty_parts(output: str, tables: dict[str, schema.Table]) -> None:
    """Give every table of a run its part without rows."""
    for name, columns in _schemas(tables).items():
        sink = io.BytesIO()
        # No row group either: Hugging Face datasets stumbles over one that is empty.
        pq.ParquetWriter(sink, columns.with_metadata(_metadata(columns))).close()
        storage.write_bytes(storage.join(output, name, EMPTY_PART), sink.getvalue())


def finish_shard(
    output: str,
    shard: Shard,
    fragments: list[str],
    total: int,
    tables: dict[str, schema.Table],
) -> dict[str, Any]:
    """Assemble a shard's fragments into its parts and write its receipt, which is returned.

    Raises JobError if the fragments do not hold records 0..total-1 exactly once each, as images or
    as errors, and every image's rows of the other tables; then nothing is written.
    """
    found = _assemble(output, fragments, _schemas(tables))
    # Every table has rows of every image that came out well; `images`, where it is, has one.
    images, failed = pc.unique(found[next(iter(tables))]["row"]), found["errors"]
    shard_errors = failed.filter(pc.is_null(failed["row"]))
    rows = sorted([*images.to_pylist(), *failed["row"].drop_null().to_pylist()])
    wanted = {name: len(images) * table.rows_per_image for name, table in tables.items()}
    if rows != list(range(total)) or any(len(found[name]) != n for name, n in wanted.items()):
        counts = {name: len(table) for name, table in found.items()}
        raise JobError(f"shard {shard.name}: {total} records read, but {counts} came out")
    receipt = {
        "shard": shard.name,
        "uri": shard.uri,
        "version": shard.version,
        "rows_in": total,
        "rows_ok": len(images),
        "rows_error": len(failed) - len(shard_errors),
        "shard_error": next(iter(shard_errors["reason"].to_pylist()), None),
        "parts": [_write_part(output, name, shard.name, t) for name, t in found.items() if len(t)],
    }
    name = receipt_name(shard.name, shard.version)
    text = json.dumps(receipt, indent=1).encode()
    storage.write_bytes(storage.join(output, RECEIPTS, name), text)
    storage.delete_folder(storage.join(output, STAGING, stem(shard.name)))
    return receipt


def _schemas(tables: dict[str, schema.Table]) -> dict[str, pa.Schema]:
    """The schema of every table of a run, the errors' too."""
    return {**{name: table.schema for name, table in tables.items()}, "errors": schema.ERRORS}


def _assemble(
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


def _write_part(output: str, name: str, shard: str, table: pa.Table) -> dict[str, Any]:
    """Write one part, whole; returns what the receipt says of it."""
    data = _parquet(table)
    path = f"{name}/{stem(shard)}.parquet"
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
