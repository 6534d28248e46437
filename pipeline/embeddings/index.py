"""A vector index over a table of embeddings: a LanceDB table, and a file with its source.

    DEST/embeddings.lance/  shard, row, key, and the vectors as float32, with the index on them
    DEST/_index.json        "building" first; the facts of the table last, as "complete"

So an interrupted build is recognised and never searched. The index finds candidates: their cosines
are computed anew from the vectors, as in the exact search, and decide their order. LanceDB is
imported here alone, and only when it is used.

Shapes: B rows of a batch, M queries, D dimension.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.embeddings.search import ExactSearch, Hit
from pipeline.embeddings.vectors import (
    ID_COLUMNS,
    EmbeddingTable,
    Vectors,
    count_rows,
    read_vectors,
)
from pipeline.errors import JobError, NotFoundError, PipelineError, UsageError
from pipeline.run.manifest import now

FACTS, FORMAT = "_index.json", "clipseg-ray index"
LANCE_TABLE = "embeddings"
BATCH_ROWS = 8192
# Below, every row is compared: there the scan is as fast as the index.
INDEX_FROM_ROWS = 10_000
# A byte for each number of a vector: trained in a second where product quantisation takes a
# minute (50,000 x 128), and what is lost, the exact cosines of the candidates bring back.
KIND = "IVF_SQ"
PARTITION_ROWS = 1024  # at least; a large table has as many partitions as a partition has rows
TRAINING_ROWS = 256  # of a partition, for its centre: LanceDB's own default
TRAINING_BYTES = 2**31  # of all of them, held at once
# Partitions that a query looks into: all of them up to 131,072 rows. With 390 partitions (400,000
# rows of noise, 128 wide) 64 gave a recall of 0.52 in 21.0 ms, 128 one of 0.75 in 21.3 ms,
# on 2 CPU cores.
PROBES = 128
CANDIDATES = 10  # for each row that is asked for


@dataclass(frozen=True, kw_only=True)
class VectorIndex:
    """A finished index."""

    uri: str
    table: EmbeddingTable
    """The table that it was made from, as it was then; without its parts."""
    rows: int
    partitions: int
    """0 if every row is compared."""


def build_index(
    table: EmbeddingTable,
    dest: str,
    *,
    overwrite: bool = False,
    on_progress: Callable[[float], None] = lambda share: None,
) -> VectorIndex:
    """Index all rows of a table in the folder `dest`, local or s3://.

    In memory are batches of rows and the rows to train with, whatever the size of the table. An
    interrupted build is begun anew, a finished index only to `overwrite` it. `on_progress` is
    called with the share of the rows copied. Raises UsageError if `dest` holds something else or
    LanceDB is not installed; JobError, StorageError.
    """
    lancedb = import_lancedb()
    uri = storage.check_uri(dest)
    _begin(uri, table, overwrite)
    rows = sum(count_rows(file) for file in table.files)
    partitions = count_partitions(rows, table.dimension)
    with _lance_errors(uri):
        lance = _copy_rows(_connect(uri), table, lambda count: on_progress(count / rows))
        if partitions:
            config = lancedb.index.IvfSq(
                distance_type="cosine", num_partitions=partitions, sample_rate=TRAINING_ROWS
            )
            lance.create_index("vector", config=config)
        indexed = lance.index_stats("vector_idx").num_indexed_rows if partitions else rows
        if not rows == lance.count_rows() == indexed:
            raise JobError(
                f"{uri}: {rows:,} rows in the table, {lance.count_rows():,} in the copy of it, "
                f"{indexed:,} in the index"
            )
    facts = {name: value for name, value in asdict(table).items() if name != "files"}
    record = {"table": facts, "rows": rows, "partitions": partitions, "finished_at": now()}
    _write_facts(uri, {"status": "complete", "kind": KIND if partitions else None, **record})
    return open_index(uri, table.column)


def is_index(source: str) -> bool:
    """Whether a folder holds an index, finished or not. Raises UsageError, StorageError."""
    return _read_facts(storage.check_uri(source)) is not None


def open_index(source: str, column: str = "vector") -> VectorIndex:
    """The index in a folder.

    Raises UsageError if it is not finished, or made of another column; StorageError.
    """
    uri = storage.check_uri(source)
    facts = _read_facts(uri) or {}
    if facts.get("status") != "complete":
        raise UsageError(f"{uri}: an index that is not finished: run its clipseg-ray index again")
    try:
        table = EmbeddingTable(**facts["table"], files=())
        found = VectorIndex(
            uri=uri, table=table, rows=facts["rows"], partitions=facts["partitions"]
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"{uri}: an index of another version; build it again") from error
    if table.column != column:
        raise UsageError(
            f"{uri}: an index of the column {table.column}, not of {column}; "
            f"say --column {table.column}, or index the other one too"
        )
    return found


def search_index(index: VectorIndex, queries: np.ndarray, top: int) -> list[list[Hit]]:
    """The best hits of each query (M, D) found by the index, best first.

    As search_files, but rows may be missed; their cosines are exact. Raises UsageError without
    LanceDB, and JobError.
    """
    import_lancedb()
    hits = []
    with _lance_errors(index.uri):
        lance = _connect(index.uri).open_table(LANCE_TABLE)
        for query in queries:
            near = lance.search(query, vector_column_name="vector").distance_type("cosine")
            near = near.nprobes(PROBES).limit(min(top, index.rows) * CANDIDATES)
            found = near.select(["shard", "row", "key", "vector", "_distance"]).to_arrow()
            search = ExactSearch(query[None], top)
            search.add(_vectors(found))
            hits += search.hits
    return hits


def read_key(index: VectorIndex, key: str, limit: int) -> Vectors:
    """Rows with this key, `limit` of them at most; raises as search_index."""
    import_lancedb()
    with _lance_errors(index.uri):
        lance = _connect(index.uri).open_table(LANCE_TABLE)
        quoted = key.replace("'", "''")
        found = lance.search().where(f"key = '{quoted}'").limit(limit)
        return _vectors(found.select(["shard", "row", "key", "vector"]).to_arrow())


def count_partitions(rows: int, dimension: int) -> int:
    """Into how many partitions rows of D numbers are sorted; 0 when they are too few for it."""
    if rows < INDEX_FROM_ROWS:
        return 0
    most = TRAINING_BYTES // (TRAINING_ROWS * dimension * 4)
    return max(1, min(rows // PARTITION_ROWS, math.isqrt(rows), most))


def import_lancedb() -> Any:
    """Import LanceDB; UsageError with the way to install it if it is missing."""
    for name in ("LANCE_LOG", "LANCEDB_LOG"):  # it would warn that a new table is a new one
        os.environ.setdefault(name, "error")
    try:
        import lancedb.index
    except ImportError as error:
        raise UsageError(
            "an index needs LanceDB, which is not installed: pip install 'clipseg-ray[lance]'"
        ) from error
    return lancedb


def _connect(uri: str) -> Any:
    """The folder as a LanceDB database, with the AWS environment that `storage` uses."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    options = {"aws_endpoint": endpoint} if endpoint else {}
    if endpoint.startswith("http://"):
        options["allow_http"] = "true"
    return import_lancedb().connect(uri, storage_options=options if storage.is_s3(uri) else None)


def _vectors(rows: pa.Table) -> Vectors:
    """Rows of the LanceDB table."""
    ids = pa.record_batch([rows[name].combine_chunks() for name in ID_COLUMNS], names=ID_COLUMNS)
    vectors = rows["vector"].combine_chunks()
    matrix = vectors.flatten().to_numpy().reshape(-1, vectors.type.list_size)
    return Vectors(matrix=matrix, read_ids=lambda: ids)


def _begin(uri: str, table: EmbeddingTable, overwrite: bool) -> None:
    """Make the folder ready: only what an index of ours has left there is deleted."""
    if f"{uri}/".startswith(f"{table.uri}/"):
        raise UsageError(f"{uri}: lies inside the table; choose another folder")
    facts = _read_facts(uri)
    if facts is None and not storage.is_empty(uri):
        raise UsageError(f"{uri}: holds files that are not from an index; choose another folder")
    if facts and facts.get("status") == "complete" and not overwrite:
        raise UsageError(f"{uri}: holds an index already; --overwrite replaces it")
    _write_facts(uri, {"status": "building", "started_at": now()})
    storage.delete_folder(storage.join(uri, f"{LANCE_TABLE}.lance"))


def _copy_rows(database: Any, table: EmbeddingTable, on_rows: Callable[[int], None]) -> Any:
    """The table's rows as a LanceDB table."""
    size = pa.list_(pa.field("item", pa.float32()), table.dimension)
    ids = [("shard", pa.string()), ("row", pa.int64()), ("key", pa.string())]
    schema = pa.schema([pa.field(*field) for field in [*ids, ("vector", size)]])
    failed: list[PipelineError] = []  # LanceDB passes on only the text of an error

    def read() -> Iterator[pa.RecordBatch]:
        count = 0
        try:
            for file in table.files:
                for vectors in read_vectors(table, file, batch_rows=BATCH_ROWS):
                    matrix = _without_faults(vectors.matrix).reshape(-1)
                    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix), type=size)
                    columns = [*vectors.ids.columns, column]
                    yield pa.RecordBatch.from_arrays(columns, schema=schema)
                    count += len(vectors.matrix)
                    on_rows(count)
        except PipelineError as error:
            failed.append(error)
            raise

    try:
        rows = pa.RecordBatchReader.from_batches(schema, read())
        return database.create_table(LANCE_TABLE, rows)
    except RuntimeError as error:
        raise failed[0] if failed else error from error


def _without_faults(matrix: np.ndarray) -> np.ndarray:
    """Rows (B, D), non-finite ones as zeros: without a cosine too, but LanceDB takes them."""
    finite = np.isfinite(matrix).all(axis=1)
    return matrix if finite.all() else np.where(finite[:, None], matrix, np.float32(0))


def _read_facts(uri: str) -> dict[str, Any] | None:
    """Contents of the file of facts; None if there is none of ours."""
    try:
        facts = json.loads(storage.read_bytes(storage.join(uri, FACTS)))
    except (NotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("format") == FORMAT else None


def _write_facts(uri: str, facts: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **facts}, indent=2, ensure_ascii=False)
    storage.write_bytes(storage.join(uri, FACTS), f"{text}\n".encode())


@contextlib.contextmanager
def _lance_errors(uri: str) -> Iterator[None]:
    """Errors of LanceDB as a JobError naming the folder, in one line."""
    try:
        yield
    except PipelineError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise JobError(f"{uri}: LanceDB: {reason}") from error
