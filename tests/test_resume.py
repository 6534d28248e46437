"""Rows that an earlier command has done are neither read, decoded nor segmented again.

Whole jobs run in this process (--local), and a stop is an exception out of a stage.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import segment, status
from pipeline import storage
from pipeline.infer.segment import SegmentImages
from pipeline.prepare.images import PrepareImages
from pipeline.read.ranges import iter_rows
from pipeline.read.records import read_shard
from pipeline.schema import LOGITS
from pipeline.write.fragments import (
    Fragment,
    WriteFragments,
    choose_fragments,
    parse_fragment,
)
from pipeline.write.layout import shard_id
from tests.outputs import SHARDS, images, ledger_of, masks
from tests.shards import make_parquet, make_tar, shards_of

MODEL = str(Path(__file__).parent.parent / "pipeline/demo/model")
IMAGES = 7
BROKEN = 5


class KilledError(BaseException):
    """Stands for kill -9 of a job in one process: nothing in the code may catch it."""


def picture(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()[: 50 if number % IMAGES == BROKEN else None]


def write_inputs(folder: Path) -> str:
    """A tar, a Parquet file and a folder of loose images, with a broken image in each."""
    pictures = [picture(number) for number in range(3 * IMAGES)]
    (folder / "loose").mkdir(parents=True)
    members = [(f"{i:02}.png", pictures[i]) for i in range(IMAGES)]
    (folder / "a.tar").write_bytes(make_tar(members))
    table = {"image": pictures[IMAGES : 2 * IMAGES]}
    (folder / "b.parquet").write_bytes(
        make_parquet(table, row_group_size=2, compression="none", write_page_checksum=True)
    )
    for i in range(IMAGES):
        (folder / "loose" / f"{i:02}.png").write_bytes(pictures[2 * IMAGES + i])
    return str(folder)


def command(source: str, output: Path, *options: str, prompts: tuple[str, ...]) -> list[str]:
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    local = ["--local", "--quiet", "--batch-size", "3", "--model", MODEL]
    return [source, str(output), *words, *local, *options]


def tables_of(output: Path) -> dict[str, bytes]:
    """The bytes of every part, by path."""
    return {str(p.relative_to(output)): p.read_bytes() for p in output.glob("*/*.parquet")}


def staged_rows(output: Path, outputs_per_image: int) -> set[str]:
    """Rows in fragments of whole images, as `made` counts them."""
    found: dict[Path, list[Fragment]] = defaultdict(list)
    for path in output.glob("**/_staging/*/*.arrows"):
        if fragment := parse_fragment(path.name):
            found[path.parent].append(fragment)
    return {
        f"{folder.name} {row}"
        for folder, some in found.items()
        for f in choose_fragments(some, outputs_per_image)
        for row in iter_rows(f.rows)
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many images were decoded and segmented, and a limit at which the job is killed."""
    counts: Counter[str] = Counter(limit=10**9)
    prepare, infer = PrepareImages._prepare, SegmentImages._decode

    def counted_prepare(self: PrepareImages, record: dict[str, Any]) -> dict[str, Any]:
        counts[f"{shard_id(record['shard'])} {record['row']}"] += 1
        return prepare(self, record)

    def counted_decode(self: SegmentImages, rows: Any, *args: Any) -> Iterator[Any]:
        counts["batches"] += 1
        for table in infer(self, rows, *args):
            counts["tables"] += 1
            if counts["tables"] > counts["limit"]:
                raise KilledError
            yield table

    monkeypatch.setattr(PrepareImages, "_prepare", counted_prepare)
    monkeypatch.setattr(SegmentImages, "_decode", counted_decode)
    return counts


@pytest.mark.parametrize("what", ["runs of prompts", "embed", "added"])
def test_a_job_killed_at_any_table_makes_no_row_of_a_fragment_again(
    tmp_path: Path, made: Counter[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The parts are those of an undisturbed run to the byte."""
    source = write_inputs(tmp_path / "in")
    prompts = ("blue", "star", "red")
    options = ["--embed"] if what == "embed" else []
    per_image = {"runs of prompts": 3, "embed": 4, "added": 2}[what]
    if what == "runs of prompts":  # two in one, one in the other
        bounds = SegmentImages.__init__.__kwdefaults__
        monkeypatch.setitem(bounds, "block_bytes", 2 * 4 * 96 * 96)
    calm, first = tmp_path / "calm", tmp_path / "first"
    if what == "added":
        assert segment.main(command(source, calm, prompts=prompts[:1])) == 0
        shutil.copytree(calm, first)
    made.clear()
    made["limit"] = 10**9
    assert segment.main(command(source, calm, *options, prompts=prompts)) == 0
    tables, wanted = made["tables"], tables_of(calm)
    most = 0
    for limit in (2, tables // 2 + 1, tables - 1):
        output = tmp_path / str(limit)
        if what == "added":
            shutil.copytree(first, output)
        made.clear()
        made["limit"] = limit
        with pytest.raises(KilledError):
            segment.main(command(source, output, *options, prompts=prompts))
        staged = staged_rows(output, per_image)
        most = max(most, len(staged))
        made.clear()
        made["limit"] = 10**9
        assert segment.main(command(source, output, *options, prompts=prompts)) == 0
        assert tables_of(output) == wanted
        assert not staged & made.keys()
    assert most >= 3


@pytest.mark.parametrize("added", [False, True])
def test_shards_that_are_away_for_a_while_cost_no_row_that_is_done(
    tmp_path: Path, made: Counter[str], capfd: pytest.CaptureFixture[str], added: bool
) -> None:
    """Named by braces; one is missing at first, one is finished by then, one not."""
    write_inputs(tmp_path / "in")
    for name in "acd":
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "in/a.tar", tmp_path / name / "x.tar")
    source, calm, output = str(tmp_path / "{a,c,d}/x.tar"), tmp_path / "calm", tmp_path / "out"
    away = tmp_path / "away"
    prompts = ("blue", "star") if added else ("blue",)
    for folder in (calm, output):
        if added:
            assert segment.main(command(source, folder, prompts=("blue",))) == 0
    assert segment.main(command(source, calm, prompts=prompts)) == 0
    for folder in ("a", "c"):
        gone = f"{folder}/x.tar"
        (tmp_path / folder).rename(away)  # the files stay as they are, as on a mount that is away
        capfd.readouterr()
        assert segment.main(command(source, output, prompts=prompts)) == 1
        [line] = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert f"1 of 3 shards are not complete: {gone} shard_missing: " in line
        assert line.endswith("the same command takes them up again")
        assert not (output / "_SUCCESS").exists()
        assert status.main([str(output)]) == 0
        assert f"missing: {gone} shard_missing" in capfd.readouterr().out
        away.rename(tmp_path / folder)
        made.clear()
        made["limit"] = 10**9
    assert segment.main(command(source, output, prompts=prompts)) == 0
    assert tables_of(output) == tables_of(calm)
    assert not [name for name in made if name.startswith(("c-x-tar", "d-x-tar"))]


def test_a_loose_image_that_goes_after_the_listing_leaves_its_group_open(
    tmp_path: Path, made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is away for a while, after the listing; with it back only that image is made."""
    source = write_inputs(tmp_path / "in")
    output, calm, away = tmp_path / "out", tmp_path / "calm", tmp_path / "away"
    for name in ("x", "y"):
        (tmp_path / "in" / name).mkdir()
        (tmp_path / "in" / name / "1.png").write_bytes(picture(100))
    assert segment.main(command(source, calm, prompts=("blue",))) == 0
    listed = segment.list_shards

    def list_and_lose(*args: Any, **options: Any) -> Any:
        found = listed(*args, **options)
        (tmp_path / "in/x").rename(away)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(segment, "list_shards", list_and_lose)
        assert segment.main(command(source, output, prompts=("blue",))) == 1
    [why] = json.loads((output / "_run.json").read_text())["missing"].values()
    assert why.startswith("x/1.png: file_missing: ")
    away.rename(tmp_path / "in/x")
    made.clear()
    made["limit"] = 10**9
    assert segment.main(command(source, output, prompts=("blue",))) == 0
    assert tables_of(output) == tables_of(calm)
    assert len([name for name in made if " " in name and not name.endswith("-1")]) == 1


def test_rows_that_are_done_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loose files are not opened, members of a tar not kept, row groups not fetched."""
    shards = {shard.format: shard for shard in shards_of(write_inputs(tmp_path / "in"))}
    skip = "0-3_5"
    for name, shard in shards.items():
        left = [r for r in read_shard(shard) if r["row"] not in set(iter_rows(skip))]
        assert [r["row"] for r in left] == [4, 6, -1]
        assert list(read_shard(replace(shard, skip=skip))) == left, name
    for number in iter_rows(skip):
        (tmp_path / "in/loose" / f"{number:02}.png").unlink()
    assert [r["reason"] for r in read_shard(replace(shards["images"], skip=skip))] == [""] * 3
    path = tmp_path / "in/b.parquet"
    data = bytearray(path.read_bytes())
    at = data.index(picture(IMAGES + 2))  # in the second group of two rows
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    damaged = replace(shards["parquet"], version=storage.stat_file(str(path)).version)
    assert [r["reason"] for r in read_shard(damaged)][-1] == "shard_corrupt"
    assert [r["row"] for r in read_shard(replace(damaged, skip=skip))] == [4, 6, -1]


def test_texts_and_lists_keep_their_rows_where_some_are_skipped(tmp_path: Path) -> None:
    members = [
        (f"{i}.{part}", data)
        for i in range(3)
        for part, data in (("left.png", b"l"), ("right.png", b"r"), ("txt", b"said %d" % i))
    ]
    lists = {"image": [[b"a", b"b"], [b"c"], [], [b"d", b"e"]], "text": [*"wxyz"]}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(make_tar(members))
    (tmp_path / "in/b.parquet").write_bytes(make_parquet(lists, row_group_size=1))
    for shard in shards_of(str(tmp_path / "in")):
        shard = replace(shard, text="text" if shard.format == "parquet" else "txt")
        every = list(read_shard(shard))
        assert len(every) == 7
        for skip in ("0", "1-2", "0-1_3", "4-5", "0-5"):
            left = [r for r in every if r["row"] not in set(iter_rows(skip))]
            assert list(read_shard(replace(shard, skip=skip))) == left


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_an_image_whose_runs_of_prompts_lie_in_two_blocks_takes_no_other_with_it(
    tmp_path: Path, size: int
) -> None:
    """Blocks of so many tables, each of one run of one image."""
    runs = [(row, run) for row in range(6) for run in (0, 4, 8)]
    failed = (6, 0)
    ledger = ledger_of(tmp_path)
    stage = WriteFragments(ledger, lambda records: tables_of_runs(records, prompts=4))
    blocks = [[failed, *runs[:size]], *(runs[i : i + size] for i in range(size, 18, size))]
    fragments = []
    for block in blocks:
        records = [record_of(*pair, reason="no_image" * (pair == failed)) for pair in block]
        for account in stage(pa.Table.from_pylist(records, schema=LOGITS)).to_pylist():
            fragments.append(parse_fragment(account["fragment"]))
    kept = choose_fragments([f for f in fragments if f], 12)
    rows = sorted(row for f in kept if f.run == 0 for row in iter_rows(f.rows))
    assert len(rows) >= 5  # all but the images beside the failed one


def test_a_fault_is_told_where_a_fragment_is_cut_for_its_name(tmp_path: Path) -> None:
    records = [
        record_of(2 * i, 0, reason="file_missing" if i == 90 else "no_image") for i in range(100)
    ]
    stage = WriteFragments(ledger_of(tmp_path), lambda records: {})
    accounts = stage(pa.Table.from_pylist(records, schema=LOGITS)).to_pylist()
    assert len(accounts) > 1
    assert [bool(a["fault"]) for a in accounts].count(True) == 1
    assert sum(a["errors"] for a in accounts) == 99


def record_of(row: int, run: int, reason: str = "") -> dict[str, Any]:
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in LOGITS}
    known = {"shard": SHARDS[0].name, "version": "v1", "row": row, "first_prompt": run}
    failed = {"reason": reason, "stage": "read" if reason else "", "retryable": False}
    return empty | {"total": -1, "logits": b"", "vector": b""} | known | failed


def tables_of_runs(records: pa.Table, prompts: int) -> dict[str, pa.Table]:
    good = [r for r in records.to_pylist() if not r["reason"]]
    return {
        "images": images(*(r["row"] for r in good if r["first_prompt"] == 0)),
        "masks": masks(*(r["row"] for r in good), prompts=prompts),
    }
