"""Hits of a search, or groups of duplicates -> the terminal, and Parquet.

Names and keys are hostile: on the terminal only printable text appears.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.embeddings.search import Hit
from pipeline.errors import JobError, one_line
from pipeline.schema import SCHEMA_VERSION

GROUP_ROWS_SHOWN = 50
_PIPE_WIDTH = 160  # columns of text where the output is no terminal

RESULTS = pa.schema(
    [
        pa.field("query_id", pa.int32(), nullable=False),  # index among the search's queries
        pa.field("query", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # from 1
        pa.field("cosine", pa.float32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
    ]
)


def results_table(queries: Sequence[str], hits: Sequence[Sequence[Hit]]) -> pa.Table:
    """Hits of each query, best first: a table of RESULTS."""
    rows = [
        {"query_id": i, "query": query, "rank": rank, **hit._asdict()}
        for i, (query, found) in enumerate(zip(queries, hits, strict=True))
        for rank, hit in enumerate(found, 1)
    ]
    return pa.Table.from_pylist(rows, schema=RESULTS)


def show_results(results: pa.Table) -> None:
    """Print a table of RESULTS, each query under its name once."""
    rows = results.to_pylist()
    for row in rows:
        row["query"] = row["query"] if row["rank"] == 1 else ""
    _show(rows, ["query", "rank", "cosine", "shard", "row", "key"])


def show_groups(groups: Iterable[pa.Table], total: int) -> None:
    """Print the first rows of tables of duplicates.DUPLICATES, and how many of `total` are left."""
    first = islice((row for table in groups for row in table.to_pylist()), GROUP_ROWS_SHOWN)
    _show(list(first), ["group", "cosine", "shard", "row", "key"])
    if total > GROUP_ROWS_SHOWN:
        print(f"... and {total - GROUP_ROWS_SHOWN:,} rows more; --output writes them all")


def write_parquet(uri: str, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables of a schema as one Parquet file, whole, and return its rows. StorageError."""
    metadata = {"clipseg_ray.schema_version": str(SCHEMA_VERSION)}
    rows = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.parquet")
        with pq.ParquetWriter(path, schema.with_metadata(metadata), compression="zstd") as writer:
            for table in tables:
                writer.write_table(table.replace_schema_metadata(metadata))
                rows += len(table)
        if pq.read_metadata(path).num_rows != rows:
            raise JobError(f"{uri}: came out with another number of rows than went in")
        storage.put_file(path, storage.check_uri(uri))
    return rows


def _show(rows: list[dict[str, Any]], columns: list[str]) -> None:
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        numeric = name in ("rank", "cosine", "row", "group")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        values = [row[name] for name in columns]
        table.add_row(
            *(Text(f"{v:.4f}" if isinstance(v, float) else one_line(str(v))) for v in values)
        )
    Console(width=width).print(table)
