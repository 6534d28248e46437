"""From fragments to parts and receipts, without Ray."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.errors import JobError
from pipeline.read.ranges import RowSet, format_rows, iter_rows
from pipeline.write.fragments import (
    choose_fragments,
    pack_fragment,
    pack_tables,
    parse_fragment,
    unpack_tables,
)
from pipeline.write.layout import Ledger, shard_id
from pipeline.write.parts import PartWriter
from pipeline.write.receipts import receipts_of
from tests.outputs import SHARD, errors, finish, images, masks, part


def test_packing_is_undone_by_unpacking() -> None:
    tables = {"images": images(0, 1), "errors": errors(2, None), "masks": masks()}
    assert unpack_tables(pack_tables(tables)) == {n: t for n, t in tables.items() if len(t)}
    assert unpack_tables(pack_tables({})) == {}


def test_a_part_holds_every_row_once_and_in_order(tmp_path: Path) -> None:
    ledger = Ledger(output=str(tmp_path))
    receipt = finish(
        ledger,
        SHARD,
        {"images": images(3, 1), "masks": masks(3, 1)},
        {"errors": errors(2, None)},
        {"images": images(0), "masks": masks(0)},
    )
    assert pq.read_table(part(tmp_path, "images"))["row"].to_pylist() == [0, 1, 3]
    found = pq.read_table(part(tmp_path, "masks"))
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (3, 0), (3, 1)]
    assert list(zip(*(found[c].to_pylist() for c in ("row", "prompt_id")), strict=True)) == pairs
    assert pq.read_table(part(tmp_path, "errors"))["row"].to_pylist() == [2, None]
    counts = {"rows_in": 4, "rows_ok": 3, "rows_error": 1, "shard_error": "no_image"}
    assert {k: receipt[k] for k in counts} == counts
    size_bytes = sum(part["bytes"] for part in receipt["parts"])
    name = f"{ledger.version('v1')}.3-1-0-{size_bytes}.cut.json"
    written = json.loads((tmp_path / "_receipts" / shard_id("a/b.tar") / name).read_text())
    assert written == receipt
    assert [r.name for r in receipts_of(ledger, SHARD)] == [name]
    assert not list((tmp_path / "_staging").iterdir())


def test_the_receipt_tells_size_and_hash_of_each_part(tmp_path: Path) -> None:
    receipt = finish(Ledger(output=str(tmp_path)), SHARD, {"images": images(0), "masks": masks(0)})
    for found in receipt["parts"]:
        data = (tmp_path / found["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (found["bytes"], found["sha256"])
        assert pq.read_metadata(tmp_path / found["path"]).num_rows == found["rows"]


def test_parts_are_the_same_bytes_however_their_rows_came(tmp_path: Path) -> None:
    rows = range(40)
    cuts = {"one": [rows], "two": [rows[:7], rows[7:]], "mixed": [rows[1::2], rows[::2]]}
    found = set()
    for name, pieces in cuts.items():
        fragments = [{"images": images(*some), "masks": masks(*some)} for some in pieces]
        receipt = finish(Ledger(output=str(tmp_path / name)), SHARD, *fragments)
        found.add(tuple(part["sha256"] for part in receipt["parts"]))
    assert len(found) == 1


def test_row_groups_are_bounded_in_bytes_and_depend_on_the_rows_alone(tmp_path: Path) -> None:
    """A map of 352 cells has 124 KB, so 10,000 rows would be 1.2 GB in memory."""
    columns = schema.PROBABILITIES
    noise = np.random.default_rng(0).bytes(3000)
    rows = [
        {"shard": "s", "row": i, "key": "k", "prompt_id": 0, "prompt": "p", "size": [1, 1]}
        | {"map": noise[: 50 * (i % 60)]}
        for i in range(1000)
    ]
    table = pa.Table.from_pylist(rows, schema=columns)
    files = []
    for number, sizes in enumerate(([1000], [1] * 1000, [333, 1, 666])):
        writer = PartWriter(tmp_path / f"{number}.parquet", columns, group_bytes=20_000)
        start = 0
        for size in sizes:
            writer.add(table.slice(start, size))
            start += size
        writer.close()
        files.append((tmp_path / f"{number}.parquet").read_bytes())
    assert len(set(files)) == 1
    metadata = pq.read_metadata(tmp_path / "0.parquet")
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert len(groups) > 50
    assert max(groups) < 60
    assert pq.read_table(tmp_path / "0.parquet").equals(table)


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
    with pytest.raises(JobError, match=r"a/b\.tar"):
        finish(Ledger(output=str(tmp_path)), SHARD, *fragments, total=total)
    assert [p.name for p in tmp_path.iterdir()] == ["_staging"]


def test_an_empty_shard_gets_a_receipt_and_no_parts(tmp_path: Path) -> None:
    receipt = finish(Ledger(output=str(tmp_path)), SHARD)
    assert (receipt["rows_in"], receipt["parts"]) == (0, [])


def test_file_names_never_come_from_the_input_as_they_are() -> None:
    names = ["../../etc/x.tar", "a/b.tar", "a-b.tar", "é\n<img>.tar", "x" * 5000, "", "."]
    stems = [shard_id(name) for name in names]
    assert len(set(stems)) == len(names)
    assert all(len(s) < 80 and "/" not in s and "." not in s and s.isascii() for s in stems)
    ledger = Ledger(output="out")
    assert ledger.version("v1") != ledger.version("v2")


def test_the_name_of_a_fragment_tells_its_contents() -> None:
    tables = {"images": images(0, 1, 3), "masks": masks(0, 1, 3), "errors": errors(2, None)}
    fragment, data = pack_fragment(tables, "0123abcd")
    assert parse_fragment(fragment.name) == fragment
    counts = (fragment.rows, fragment.images, fragment.outputs, fragment.errors)
    assert counts == ("0-3", 3, 6, 1)
    assert pack_fragment(tables, "0123abcd") == (fragment, data)
    assert parse_fragment(f".{fragment.name}.tmp") is None


def test_fragments_of_whole_images_are_kept_and_no_row_twice() -> None:
    def fragment(*rows: int, run: int = 0, outputs: int | None = None):
        made = {"images": images(*rows), "masks": masks(*rows)}
        found = pack_fragment(made, "0" * 8, run)[0]
        return found if outputs is None else found._replace(outputs=outputs)

    wide, inside, after = fragment(0, 1, 2), fragment(1), fragment(3)
    assert set(choose_fragments([inside, after, wide], 2)) == {wide, after}
    runs = [fragment(5), fragment(5, run=2), fragment(6)]  # of 6, the second run is missing
    assert set(choose_fragments(runs, 4)) == set(runs[:2])
    of_shard = pack_fragment({"errors": errors(None)}, "0" * 8)[0]
    assert choose_fragments([of_shard], 2) == []


def test_row_numbers_as_text() -> None:
    rows = [0, 1, 2, 7, 9, 10]
    assert format_rows(rows[::-1]) == "0-2_7_9-10"
    assert list(iter_rows("0-2_7_9-10")) == rows
    assert (format_rows([]), list(iter_rows(""))) == ("", [])
    known = RowSet("0-2_7_9-10")
    assert [row for row in range(12) if row in known] == rows
