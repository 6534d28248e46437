"""A driver without Ray: what a job does to its output, from rows that tests make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.read.shard import Shard
from pipeline.run.manifest import name_run, read_run
from pipeline.write.commit import finish_shard
from pipeline.write.fragments import pack_fragment
from pipeline.write.layout import Ledger, shard_id

TABLES = {
    "images": schema.Table(schema.IMAGES, 1),
    "masks": schema.Table(schema.MASKS, 2, per_prompt=True),
}
SHARD = Shard(name="a/b.tar", uri="/in/a/b.tar", format="tar", size_bytes=1, version="v1")
SHARDS = [replace(SHARD, name=f"{name}.tar", uri=f"/in/{name}.tar") for name in "ab"]


def rows_of(table: str, *rows: dict[str, Any]) -> pa.Table:
    """Rows of a table; what is not given is 0, "" or empty."""
    empty: dict[str, Any] = {
        "rle": {"size": [1, 1], "counts": ""},
        "bbox": [0, 0, 0, 0],
        "retryable": False,
    }
    columns = {**{n: t.schema for n, t in TABLES.items()}, "errors": schema.ERRORS}[table]
    filled = [
        {f.name: empty.get(f.name, "" if pa.types.is_string(f.type) else 0) for f in columns}
        | {"shard": SHARD.name}
        | row
        for row in rows
    ]
    return pa.Table.from_pylist(filled, schema=columns)


def images(*rows: int) -> pa.Table:
    return rows_of("images", *({"row": row} for row in rows))


def masks(*rows: int, prompts: int = 2, threshold: float = 0.5) -> pa.Table:
    every = [
        {"row": row, "prompt_id": p, "threshold": threshold} for row in rows for p in range(prompts)
    ]
    return rows_of("masks", *every)


def errors(*rows: int | None) -> pa.Table:
    return rows_of("errors", *({"row": row, "reason": "no_image"} for row in rows))


def ledger_of(output: Path | str, first_prompt: int = 0) -> Ledger:
    """A ledger of the run that is there, or of none."""
    record = read_run(str(output))
    run = name_run(record) if record else ""
    return Ledger(output=str(output), run=run, first_prompt=first_prompt)


def write(ledger: Ledger, shard: Shard, *fragments: dict[str, pa.Table]) -> list[str]:
    """Write fragments of a shard into the staging folder; returns their names."""
    names = []
    for tables in fragments:
        named = {n: _of_shard(table, shard) for n, table in tables.items()}
        fragment, data = pack_fragment(named, ledger.version(shard.version))
        uri = storage.join(ledger.staging, shard_id(shard.name), fragment.name)
        storage.write_bytes(uri, data)
        names.append(fragment.name)
    return names


def finish(
    ledger: Ledger,
    shard: Shard,
    *fragments: dict[str, pa.Table],
    total: int | None = None,
    tables: dict[str, schema.Table] = TABLES,
) -> dict[str, Any]:
    """Write fragments of a shard, and finish it; by default with as many rows as there are."""
    if total is None:
        rows = [
            table["row"].drop_null().to_pylist()
            for f in fragments
            for name, table in f.items()
            if name in ("images", "errors")
        ]
        total = sum(map(len, rows))
    return finish_shard(ledger, shard, write(ledger, shard, *fragments), (total, 0), tables)


def part(output: Path, table: str, shard: Shard = SHARD) -> Path:
    return output / table / f"{shard_id(shard.name)}.parquet"


def rows(output: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The rows that a reader sees: every part must be whole, and no row there twice."""
    found = {}
    for name in ("images", "masks", "errors"):
        keys: list[tuple[Any, ...]] = []
        for path in sorted((output / name).glob("*.parquet")):
            keys += [
                (row["shard"], row["row"], row.get("prompt_id"))
                for row in pq.read_table(path).to_pylist()
            ]
        assert len(keys) == len(set(keys))
        found[name] = sorted(keys, key=str)
    return found


def names(shards: Sequence[Shard]) -> list[str]:
    return [shard.name for shard in shards]


def _of_shard(table: pa.Table, shard: Shard) -> pa.Table:
    column = pa.array([shard.name] * len(table), pa.string())
    return table.set_column(0, table.schema.field(0), column)
