"""From fragments to parts and receipts, without Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.errors import JobError
from pipeline.read.shard import Shard
from pipeline.write.commit import finish_shard
from pipeline.write.fragments import WriteFragments, pack_tables, unpack_tables
from pipeline.write.receipts import receipts_of, stem, version_hash

TABLES = {
    "images": schema.Table(schema.IMAGES, 1),
    "masks": schema.Table(schema.MASKS, 2, per_prompt=True),
}
SHARD = Shard(name="a/b.tar", uri="/in/a/b.tar", format="tar", size_bytes=1, version="v1")


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


def masks(*rows: int, prompts: int = 2) -> pa.Table:
    every = [{"row": row, "prompt_id": p} for row in rows for p in range(prompts)]
    return rows_of("masks", *every)


def errors(*rows: int | None) -> pa.Table:
    return rows_of("errors", *({"row": row, "reason": "no_image"} for row in rows))


def write(output: Path, *fragments: dict[str, pa.Table]) -> list[str]:
    """What WriteFragments leaves in the staging folder; returns the fragments' names."""
    zeros = {"images": 0, "outputs": 0, "errors": 0, "reason": "", "total": -1}
    batch = [{"shard": SHARD.name, **zeros, "tables": pack_tables(f)} for f in fragments]
    table = pa.Table.from_pylist(batch, schema=schema.FRAGMENTS)
    accounts = WriteFragments(str(output))(table)
    assert accounts.schema.equals(schema.ACCOUNTS)
    return accounts["fragment"].to_pylist()


def part(output: Path, table: str) -> Path:
    return output / table / f"{stem(SHARD.name)}.parquet"


def test_packing_is_undone_by_unpacking() -> None:
    tables = {"images": images(0, 1), "errors": errors(2, None), "masks": masks()}
    assert unpack_tables(pack_tables(tables)) == {n: t for n, t in tables.items() if len(t)}
    assert unpack_tables(pack_tables({})) == {}


def test_a_part_holds_every_row_once_and_in_order(tmp_path: Path) -> None:
    names = write(
        tmp_path,
        {"images": images(3, 1), "masks": masks(3, 1)},
        {"errors": errors(2, None)},
        {"images": images(0), "masks": masks(0)},
    )
    receipt = finish_shard(str(tmp_path), SHARD, names, 4, TABLES)
    assert pq.read_table(part(tmp_path, "images"))["row"].to_pylist() == [0, 1, 3]
    found = pq.read_table(part(tmp_path, "masks"))
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (3, 0), (3, 1)]
    assert list(zip(*(found[c].to_pylist() for c in ("row", "prompt_id")), strict=True)) == pairs
    assert sorted(map(str, pq.read_table(part(tmp_path, "errors"))["row"].to_pylist())) == [
        "2",
        "None",
    ]
    counts = {"rows_in": 4, "rows_ok": 3, "rows_error": 1, "shard_error": "no_image"}
    assert {k: receipt[k] for k in counts} == counts
    size_bytes = sum(part["bytes"] for part in receipt["parts"])
    name = f"{version_hash(SHARD)}.3-1-{size_bytes}.cut.json"
    written = json.loads((tmp_path / "_receipts" / stem("a/b.tar") / name).read_text())
    assert written == receipt
    assert [r.name for r in receipts_of(str(tmp_path), SHARD)] == [name]
    assert not list((tmp_path / "_staging").iterdir())


def test_the_receipt_tells_size_and_hash_of_each_part(tmp_path: Path) -> None:
    import hashlib

    names = write(tmp_path, {"images": images(0), "masks": masks(0)})
    for found in finish_shard(str(tmp_path), SHARD, names, 1, TABLES)["parts"]:
        data = (tmp_path / found["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (found["bytes"], found["sha256"])
        assert pq.read_metadata(tmp_path / found["path"]).num_rows == found["rows"]


@pytest.mark.parametrize(
    ("fragments", "total"),
    [
        ([{"images": images(0, 1), "masks": masks(0, 1)}], 3),  # a row is missing
        ([{"images": images(0, 0), "masks": masks(0, 0)}], 2),  # a row came twice
        ([{"images": images(0), "masks": masks(0), "errors": errors(0)}], 1),  # in both tables
        ([{"images": images(0, 1), "masks": masks(0)}], 2),  # a mask is missing
        ([{"images": images(0, 2), "masks": masks(0, 2)}], 2),  # a row that was never read
    ],
)
def test_a_shard_that_does_not_add_up_leaves_nothing(
    tmp_path: Path, fragments: list[dict[str, pa.Table]], total: int
) -> None:
    names = write(tmp_path, *fragments)
    with pytest.raises(JobError, match=r"a/b\.tar"):
        finish_shard(str(tmp_path), SHARD, names, total, TABLES)
    assert [p.name for p in tmp_path.iterdir()] == ["_staging"]


def test_an_empty_shard_gets_a_receipt_and_no_parts(tmp_path: Path) -> None:
    receipt = finish_shard(str(tmp_path), SHARD, write(tmp_path, {}), 0, TABLES)
    assert (receipt["rows_in"], receipt["parts"]) == (0, [])


def test_file_names_never_come_from_the_input_as_they_are() -> None:
    names = ["../../etc/x.tar", "a/b.tar", "a-b.tar", "é\n<img>.tar", "x" * 5000, "", "."]
    stems = [stem(name) for name in names]
    assert len(set(stems)) == len(names)
    assert all(len(s) < 80 and "/" not in s and "." not in s and s.isascii() for s in stems)
    assert version_hash(SHARD) != version_hash(replace(SHARD, version="v2"))
