"""Rows of the tables -> fragments in the staging folder: the last stage of every stream.

A batch mixes rows of several shards, so a worker writes its rows of each shard as a fragment and
hands on an account row. A fragment's name tells its rows and hashes its bytes: listings alone tell
what of a shard is there, and the same rows give the same file however often a task runs.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema, storage
from pipeline.errors import STORAGE_REASONS, NotFoundError
from pipeline.read.ranges import format_rows, iter_rows
from pipeline.write.layout import ERRORS, Ledger, shard_id

_UNCOUNTED = ("images", ERRORS)  # counted otherwise
MAX_RANGES_CHARACTERS = 120  # of a file name, which has 255
_NAME = re.compile(
    r"(?P<version>[0-9a-f]{8})\.(?P<rows>[\d_-]*)\.(?P<run>\d+)"
    r"\.(?P<images>\d+)-(?P<outputs>\d+)-(?P<errors>\d+)\.(?P<hash>[0-9a-f]{16})\.arrows"
)

MakeRows = Callable[[pa.Table], dict[str, pa.Table]]


class Fragment(NamedTuple):
    """Contents of a fragment, as its name tells."""

    version: str
    """As Ledger.version gives it."""
    rows: str
    """Its rows of the shard (read.ranges)."""
    run: int
    """Number of the first prompt in it; above 0 where the prompts of an image came in runs."""
    images: int
    """Rows that came out well, counted in run 0."""
    outputs: int
    """Rows of the tables that have more than one row an image, and of embeddings."""
    errors: int
    hash: str
    """Of the bytes: blake2b, 8 bytes."""

    @property
    def name(self) -> str:
        """The file name."""
        counts = f"{self.images}-{self.outputs}-{self.errors}"
        return f"{self.version}.{self.rows}.{self.run}.{counts}.{self.hash}.arrows"


def parse_fragment(name: str) -> Fragment | None:
    """The fragment with this file name; None for what is none."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    numbers = {key: int(match[key]) for key in ("run", "images", "outputs", "errors")}
    return Fragment(version=match["version"], rows=match["rows"], hash=match["hash"], **numbers)


class WriteFragments:
    """Write the results of each shard in a batch: records -> schema.ACCOUNTS.

    `make_rows` makes the tables of a job from the records of one shard. Failed records become rows
    of `errors` here. Those not given by the storage are told in the account row and written
    nowhere: the shard stays open. `uncounted`: tables of any number of rows an image.
    """

    def __init__(self, ledger: Ledger, make_rows: MakeRows, uncounted: Collection[str] = ()):
        self.ledger, self.make_rows, self.uncounted = ledger, make_rows, uncounted

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [row for records in _split(batch) for row in self._write(records)]
        return pa.Table.from_pylist(rows, schema=schema.ACCOUNTS)

    def _write(self, given: pa.Table) -> Iterator[dict[str, Any]]:
        first = given.slice(0, 1).to_pylist()[0]
        lost = pc.is_in(given["reason"], pa.array(sorted(STORAGE_REASONS)))
        fault = next(map(_describe, given.filter(lost).to_pylist()), "")
        records = given.filter(pc.invert(lost))
        failed = records.filter(pc.not_equal(records["reason"], ""))
        tables = {**self.make_rows(records), ERRORS: error_rows(failed)}
        run = first.get("first_prompt", 0)
        version = self.ledger.version(first["version"])
        fragment, data = pack_fragment(tables, version, run, self.uncounted)
        if len(fragment.rows) > MAX_RANGES_CHARACTERS:
            half = len(given) // 2
            yield from self._write(given.slice(0, half))
            yield from self._write(given.slice(half))
            return
        if data:
            folder = storage.join(self.ledger.staging, shard_id(first["shard"]))
            storage.write_bytes(storage.join(folder, fragment.name), data)
        yield {
            "shard": first["shard"],
            "images": fragment.images,
            "size_bytes": _encoded_bytes(records) if run == 0 else 0,
            "outputs": fragment.outputs,
            "errors": fragment.errors,
            "reason": _most_frequent(failed["reason"]),
            "total": first["total"] if not fault else -1,
            "skipped": first.get("skipped", 0),
            "fragment": fragment.name if data else "",
            "fault": fault,
        }


def pack_fragment(
    tables: dict[str, pa.Table], version: str, run: int = 0, uncounted: Collection[str] = ()
) -> tuple[Fragment, bytes]:
    """The fragment of some rows of a shard, and its bytes; none for no rows.

    `version` as Ledger.version gives it; `run`: number of the first prompt; `uncounted` as
    WriteFragments has it.
    """
    chunks = [chunk for table in tables.values() for chunk in table["row"].chunks]
    rows = pa.chunked_array(chunks, pa.int64()).drop_null().unique()
    failed = len(tables[ERRORS]["row"].drop_null()) if ERRORS in tables else 0
    data = pack_tables(tables)
    fragment = Fragment(
        version=version,
        rows=format_rows(rows.to_pylist()),
        run=run,
        images=len(rows) - failed if run == 0 else 0,
        outputs=sum(len(t) for n, t in tables.items() if n not in (*_UNCOUNTED, *uncounted)),
        errors=failed,
        hash=hash_bytes(data),
    )
    return fragment, data


def _split(batch: pa.Table) -> Iterator[pa.Table]:
    """The records of each shard and run of prompts; the end record of a shard stands alone."""
    for shard in pc.unique(batch["shard"]).to_pylist():
        of_shard = batch.filter(pc.equal(batch["shard"], shard))
        is_end = pc.equal(of_shard["row"], -1)
        records, end = of_shard.filter(pc.invert(is_end)), of_shard.filter(is_end)
        if "first_prompt" in batch.column_names:
            yield from _split_runs(records)
        elif len(records):
            yield records
        if len(end):
            yield end


def _split_runs(records: pa.Table) -> Iterator[pa.Table]:
    """The records of each run of prompts, apart by the runs at hand of the same row.

    So fragments of one row hold the same rows, also if a block ends between two of its runs.
    """
    runs_of: dict[int, list[int]] = defaultdict(list)
    pairs = zip(records["row"].to_pylist(), records["first_prompt"].to_pylist(), strict=True)
    for row, run in pairs:
        runs_of[row].append(run)
    for runs in dict.fromkeys(map(tuple, runs_of.values())):
        rows = pa.array([row for row, some in runs_of.items() if tuple(some) == runs], pa.int64())
        some = records.filter(pc.is_in(records["row"], rows))
        for run in runs:
            yield some.filter(pc.equal(some["first_prompt"], run))


def _describe(record: dict[str, Any]) -> str:
    """Why the storage did not give a record, in one line."""
    where = f"{record['member']}: " if record["member"] else ""
    return f"{where}{record['reason']}: {record['detail']}"


def _encoded_bytes(records: pa.Table) -> int:
    known = "size_bytes" in records.column_names
    return (pc.sum(records["size_bytes"]).as_py() or 0) if known else 0


def _most_frequent(values: pa.ChunkedArray) -> str:
    """The most frequent value; "" for no values."""
    return max(Counter(values.to_pylist()).items(), key=lambda item: item[1], default=("", 0))[0]


def error_rows(failed: pa.Table) -> pa.Table:
    """Rows of the errors table; a shard's own failure has neither row nor key."""
    of_shard = pc.equal(failed["row"], -1)
    for name in ("row", "key"):
        null = pa.scalar(None, failed.schema.field(name).type)
        index = failed.schema.get_field_index(name)
        failed = failed.set_column(index, name, pc.if_else(of_shard, null, failed[name]))
    return failed.select(schema.ERRORS.names).cast(schema.ERRORS)


def hash_bytes(data: bytes) -> str:
    """The hash in a fragment's name."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


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


def choose_fragments(found: list[Fragment], outputs_per_image: int) -> list[Fragment]:
    """Fragments of whole images, none of them twice: their rows need not be made again.

    The prompts of an image may have come in several runs; an incomplete set is left out. So are
    fragments without rows, of a shard's own failure.
    """
    sets: dict[str, list[Fragment]] = defaultdict(list)
    for fragment in dict.fromkeys(found):
        sets[fragment.rows].append(fragment)
    chosen: list[Fragment] = []
    taken: set[int] = set()
    for rows, fragments in sorted(sets.items(), key=lambda item: -len(list(iter_rows(item[0])))):
        numbers = set(iter_rows(rows))
        runs = [fragment.run for fragment in fragments]
        images = sum(fragment.images for fragment in fragments)
        failed = sum(fragment.errors for fragment in fragments)
        outputs = sum(fragment.outputs for fragment in fragments)
        whole = images + failed == len(numbers) and outputs == images * outputs_per_image
        if numbers and whole and len(set(runs)) == len(runs) and taken.isdisjoint(numbers):
            taken |= numbers
            chosen += fragments
    return chosen


def read_fragment(ledger: Ledger, id_: str, fragment: Fragment) -> dict[str, pa.Table]:
    """The tables of a fragment.

    Raises NotFoundError for a missing one. A damaged one is deleted and counts as gone.
    """
    uri = storage.join(ledger.staging, id_, fragment.name)
    data = storage.read_bytes(uri)
    if hash_bytes(data) != fragment.hash:
        storage.delete_file(uri)
        raise NotFoundError(f"{uri}: was damaged")
    return unpack_tables(data)
