"""Wanted rows of a shard, whatever its form: in order, and no more read than needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shards import make_parquet, make_tar, shards_of

from pipeline import storage
from pipeline.read.shard import Shard
from pipeline.read.wanted import read_rows

BYTES = [b"zero", b"one", b"two", b"three", b"four"]


def write_tar(folder: str) -> None:
    storage.write_bytes(f"{folder}/a.tar", make_tar([(f"{i}.jpg", d) for i, d in enumerate(BYTES)]))


def write_parquet(folder: str) -> None:
    storage.write_bytes(f"{folder}/a.parquet", make_parquet({"image": BYTES}))


def write_files(folder: str) -> None:
    for i, data in enumerate(BYTES):
        storage.write_bytes(f"{folder}/{i}.jpg", data)


def only_shard(folder: str) -> Shard:
    (shard,) = shards_of(folder)
    return shard


@pytest.mark.parametrize("write", [write_tar, write_parquet, write_files])
def test_the_wanted_rows_come_in_order(write: Callable[[str], None], folder: str) -> None:
    write(folder)
    shard = only_shard(folder)
    for rows in ([], [0], [4, 1], {3, 0, 2}, [1, 9], [9], [0, 1, 2, 3, 4]):
        found = list(read_rows(shard, rows))
        assert [row for row, _ in found] == sorted(row for row in rows if row < len(BYTES))
        assert all(sample.image == BYTES[row] for row, sample in found)


def test_nothing_behind_the_last_wanted_row_is_read(tmp_path) -> None:
    folder = str(tmp_path)
    write_files(folder)
    storage.write_bytes(f"{folder}/t/a.tar", make_tar([("0.jpg", b"x")])[:1024] + b"damage" * 99)
    tar = next(shard for shard in shards_of(folder) if shard.format == "tar")
    assert [row for row, _ in read_rows(tar, [0])] == [0]
    loose = next(shard for shard in shards_of(folder) if shard.format == "images")
    storage.delete_file(f"{folder}/3.jpg")
    (found,) = read_rows(loose, [2])
    assert found[1].image == b"two"
    ((_, gone),) = read_rows(loose, [3])
    assert gone.reason == "file_missing"
