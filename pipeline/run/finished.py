"""A finished table of a run as the input of a job: its shards, and their records.

The counterpart of read.inputs and read.records. A shard is one of the run: its parts of the table
and its part of `errors/` together account for every row. A job on the table therefore has the same
rows and errors as a job on the images.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import CredentialsError, JobError, RowError, StorageError, UsageError
from pipeline.read.ranges import iter_rows
from pipeline.read.records import shard_failure
from pipeline.read.shard import Shard, printable
from pipeline.storage import FileInfo
from pipeline.write.layout import EMPTY_PART, ERRORS, Ledger
from pipeline.write.parts import open_part, read_part
from pipeline.write.receipts import list_receipts

_AT_ONCE = 32  # parts whose shard is looked up
_WHY = ("stage", "reason", "detail", "retryable")

ReadParts = Callable[[list[str]], Iterator[pa.Table]]


def list_finished(output: str, table: str) -> list[Shard]:
    """List the shards of a table in the output of a run, sorted by name.

    A shard's `files` are its parts, of all passes, and its part of the errors, relative to
    `output`. Reads the first row of one part of each. Raises UsageError if two are of one shard,
    JobError for a damaged part and for a missing one with a receipt, StorageError.
    """
    parts: dict[str, list[FileInfo]] = {}
    for name in (table, ERRORS):
        for file in storage.list_files(storage.join(output, name), recursive=False):
            base = file.uri.rpartition("/")[2]
            # An added pass has errors of its own, of images that did come out well before.
            if base.endswith(".parquet") and base != EMPTY_PART:
                if name == ERRORS and ".from-" in base:
                    continue
                parts.setdefault(base.removesuffix(".parquet").partition(".from-")[0], []).append(
                    file
                )
    _refuse_lost_parts(output, table, parts)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        names = pool.map(_read_name, [files[0] for files in parts.values()])
        shards = [_shard(output, *pair) for pair in zip(names, parts.values(), strict=True)]
    shards.sort(key=lambda shard: shard.name)
    for one, other in itertools.pairwise(shards):
        if one.name == other.name:
            files = f"{one.files[0]} and {other.files[0]}"
            raise UsageError(f"{output}: {files} are both of the shard {one.name}")
    return shards


def _refuse_lost_parts(output: str, table: str, parts: dict[str, list[FileInfo]]) -> None:
    """Raise JobError if a finished shard of the run's first pass lacks a part with rows."""
    for id_, receipts in list_receipts(Ledger(output=output)).items():
        there = {storage.relative(output, file.uri) for file in parts.get(id_, [])}
        wanted = {
            f"{table}/{id_}.parquet": any(receipt.ok for receipt in receipts),
            f"{ERRORS}/{id_}.parquet": any(receipt.error or receipt.cut for receipt in receipts),
        }
        for file, has_rows in wanted.items():
            if has_rows and file not in there:
                raise JobError(
                    f"{storage.join(output, file)}: gone, of a shard that was finished: restore "
                    "it, or run the command that made it again, which makes the shard anew"
                )


def _read_name(file: FileInfo) -> str:
    """The name of a part's shard, from its first row."""
    with open_part(file.uri, file.version) as parquet:
        first = next(parquet.iter_batches(1, columns=["shard"]), None)
        if first is None:
            raise JobError(f"{file.uri}: a part without rows")
        return str(first["shard"][0])


def _shard(output: str, name: str, files: list[FileInfo]) -> Shard:
    seen = "".join(f"{file.uri}\0{file.size_bytes}\0{file.version}\n" for file in files)
    return Shard(
        name=name,
        uri=output,
        format="table",
        size_bytes=sum(file.size_bytes for file in files),
        version=hashlib.sha256(seen.encode("utf-8", "surrogateescape")).hexdigest(),
        files=tuple(storage.relative(output, file.uri) for file in files),
    )


def read_finished(
    shard: Shard, read: ReadParts, columns: pa.Schema, *, lost: str = "no_vector"
) -> Iterator[pa.Table]:
    """Records of a shard of a finished table: those of `read`, failed ones, the end record.

    `read` makes tables of schema `columns`, with a record's columns (schema.RECORDS without
    `image`) among them, from the URIs of the shard's parts. A row with neither fails with the
    reason `lost`; rows of Shard.skip are left out. Damage and faults of storage become a reason of
    the shard. Raises CredentialsError, and UsageError as `read` does.
    """
    done = set(iter_rows(shard.skip))
    seen = set(done)
    failed: dict[int | None, dict[str, Any]] = {}
    try:
        for path in shard.files:
            if path.startswith(f"{ERRORS}/"):
                failed = _read_errors(storage.join(shard.uri, path))
        parts = [p for p in shard.files if not p.startswith(f"{ERRORS}/")]
        for records in read([storage.join(shard.uri, path) for path in parts]):
            if set(records["shard"].to_pylist()) - {shard.name}:
                raise UsageError(f"{shard.uri}: {parts[0]} holds rows of several shards")
            numbers = records["row"].to_pylist()
            seen.update(numbers)
            left = [number not in done for number in numbers]
            records = records.filter(pa.array(left, pa.bool_()))
            version = pa.array([shard.version] * len(records), pa.string())
            index = records.schema.get_field_index("version")
            yield records.set_column(index, "version", version)
    except CredentialsError:
        raise
    except StorageError as error:
        failed[None] = _why(shard_failure(error))
    except JobError as error:
        failed[None] = _why(RowError("read", "shard_corrupt", printable(str(error))))
    end = {"row": -1} | failed.pop(None, {})
    total = max([-1, *seen, *(row for row in failed if row is not None)]) + 1
    missing = {row: {"row": row, **_why(RowError("read", lost))} for row in range(total)}
    rows = {row: record for row, record in (missing | failed).items() if row not in seen}
    rest = [*rows.values(), end | {"total": total}]
    same = {**empty_record(columns), "shard": shard.name, "version": shard.version}
    yield pa.Table.from_pylist([{**same, **record} for record in rest], schema=columns)


def empty_record(columns: pa.Schema) -> dict[str, Any]:
    """An empty record: 0, "", b"" or [] in every column."""
    empty: dict[str, Any] = {}
    for field in columns:
        if pa.types.is_string(field.type):
            empty[field.name] = ""
        elif pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            empty[field.name] = b""
        elif pa.types.is_list(field.type):
            empty[field.name] = []
        else:
            empty[field.name] = 0
    return empty | {"total": -1, "retryable": False}


def _read_errors(uri: str) -> dict[int | None, dict[str, Any]]:
    """Fields of failed records by row, from a part of the errors; None is the shard's own."""
    found = read_part(uri, ["row", "key", *_WHY]).to_pylist()
    return {
        record["row"]: record
        if record["row"] is not None
        else {name: record[name] for name in _WHY}
        for record in found
    }


def _why(error: RowError) -> dict[str, Any]:
    return {name: getattr(error, name) for name in _WHY}
