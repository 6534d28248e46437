"""Near-duplicates: equal to the components of the whole matrix, whatever the blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embeddings import embedding_part, ids_of, random_vectors, write_part, write_table

from jobs import duplicates
from pipeline.embeddings.duplicates import Forest, find_duplicates
from pipeline.embeddings.duplicates_page import MEMBERS
from pipeline.embeddings.vectors import open_table, read_vectors


def clustered(count: int = 400, dimension: int = 24) -> np.ndarray:
    """Rows near some of 60 centres, shuffled: groups of many sizes, some of them chains."""
    random = np.random.default_rng(3)
    centres = random_vectors(60, dimension)
    noise = random.standard_normal((count, dimension)) * random.uniform(0, 0.09, (count, 1))
    rows = centres[random.integers(0, 60, count)] + noise
    return (rows * random.uniform(0.5, 2, (count, 1))).astype(np.float32)


def components(vectors: np.ndarray, cosine: float) -> list[int]:
    """The first row of each row's component, by the whole matrix and a plain walk over it."""
    rows = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    near = rows @ rows.T >= cosine
    first = [-1] * len(rows)
    for start in range(len(rows)):
        todo = [start] if first[start] < 0 else []
        while todo:
            row = todo.pop()
            if first[row] < 0:
                first[row] = start
                todo += np.flatnonzero(near[row]).tolist()
    return first


def expected(vectors: np.ndarray, cosine: float, parts: int = 3) -> list[dict[str, Any]]:
    """The table that must come out."""
    first, ids = components(vectors, cosine), ids_of(len(vectors), parts)
    rows = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    firsts = [f for f in sorted(set(first)) if first.count(f) > 1]
    return [
        {
            "group": group,
            "shard": ids[row][0],
            "row": ids[row][1],
            "key": f"key-{ids[row][1]}",
            "cosine": pytest.approx(float(rows[row] @ rows[f]), abs=1e-6),
        }
        for group, f in enumerate(firsts)
        for row in range(len(vectors))
        if first[row] == f
    ]


@pytest.mark.parametrize(("block_rows", "tile_rows"), [(60, 7), (64, 100), (399, 1), (10_000, 512)])
def test_groups_are_the_components_of_the_whole_matrix(
    block_rows: int, tile_rows: int, tmp_path: Path
) -> None:
    vectors = clustered()
    table = open_table(write_table(str(tmp_path), vectors))
    found = find_duplicates(table, 0.97, block_rows=block_rows, tile_rows=tile_rows)
    rows = pa.concat_tables(found.read()).to_pylist()
    assert rows == expected(vectors, 0.97)
    assert len({row["group"] for row in rows}) > 10
    assert found.rows == len(rows)
    assert found.kept == len(set(components(vectors, 0.97)))


@pytest.mark.parametrize("held_rows", [1, 37, 133, 134, 399, 400, 10_000])
def test_the_table_is_read_once_for_each_time_the_memory_is_full(
    held_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = clustered()
    table = open_table(write_table(str(tmp_path), vectors))
    read: list[str] = []

    def counted(table: Any, file: Any, **options: Any) -> Any:
        read.append(file.uri)
        return read_vectors(table, file, **options)

    monkeypatch.setattr("pipeline.embeddings.duplicates.read_vectors", counted)
    found = find_duplicates(table, 0.97, held_bytes=held_rows * 24 * 4, block_rows=90, tile_rows=50)

    assert read.count(table.files[-1].uri) == -(-400 // held_rows)
    assert pa.concat_tables(found.read()).to_pylist() == expected(vectors, 0.97)


def test_progress_grows_to_the_whole(tmp_path: Path) -> None:
    table = open_table(write_table(str(tmp_path), clustered()))
    shares: list[float] = []
    find_duplicates(table, 0.97, held_bytes=100 * 24 * 4, on_progress=shares.append)
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] <= 1


def test_groups_are_gathered_in_several_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(write_table(str(tmp_path), clustered()))
    found = find_duplicates(table, 0.97)
    whole = pa.concat_tables(found.read())
    for name, most in (("GROUPS_AT_ONCE", 3), ("MEMBERS_AT_ONCE", 20)):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.embeddings.duplicates.{name}", most)
            pieces = list(found.read())
        assert len(pieces) > 3
        assert pa.concat_tables(pieces).equals(whole)


def test_exact_copies_are_found_at_cosine_1(folder: str) -> None:
    some = random_vectors(50, 512)
    vectors = np.concatenate([some, some[:20], some[:5]])
    table = open_table(write_table(folder, vectors, parts=4))
    found = find_duplicates(table, 1.0, block_rows=40, tile_rows=9)
    assert pa.concat_tables(found.read()).to_pylist() == expected(vectors, 1 - 1e-9, parts=4)
    assert (found.rows, len(found.sizes), found.kept) == (45, 20, 50)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_many_copies_of_one_image_are_one_group(dtype: type, tmp_path: Path) -> None:
    vectors = np.repeat(random_vectors(1), 2000, axis=0).astype(dtype)
    found = find_duplicates(open_table(write_table(str(tmp_path), vectors)), 0.97)
    assert (found.rows, found.kept) == (2000, 1)


def test_vectors_without_a_cosine_are_in_no_group(tmp_path: Path) -> None:
    vectors = np.repeat(random_vectors(1), 9, axis=0)
    vectors[2:4], vectors[5, 0], vectors[6, 0] = 0, np.nan, np.inf
    found = find_duplicates(open_table(write_table(str(tmp_path), vectors)), 0.0)
    (table,) = found.read()
    assert len(table) == 5
    assert found.kept == 5


def test_a_table_without_duplicates_has_no_groups(tmp_path: Path, capsys: Any) -> None:
    output = write_table(str(tmp_path / "t"), np.eye(9, dtype=np.float32))
    file = tmp_path / "out.parquet"
    assert duplicates.main([output, "--output", str(file)]) == 0
    assert pq.read_table(file).num_rows == 0
    assert "0 of 9 rows are in 0 groups" in capsys.readouterr().out


def test_forest_joins_like_a_plain_walk() -> None:
    random = np.random.default_rng(0)
    for count in (2, 10, 300):
        edges = random.integers(0, count, (2, count * 2 // 3))
        forest = Forest(count)
        for half in np.array_split(edges, 2, axis=1):
            forest.join(half[0], half[1])
        labels = list(range(count))
        for a, b in edges.T:  # label by label: slow and plain
            low, high = sorted((labels[a], labels[b]))
            labels = [low if label == high else label for label in labels]
        assert forest.roots(np.arange(count)).tolist() == labels


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = clustered()
    output, file = write_table(str(tmp_path / "t"), vectors), tmp_path / "d.parquet"
    assert duplicates.main([output, "--cosine", "0.98", "--output", str(file)]) == 0
    assert pq.read_table(file).to_pylist() == expected(vectors, 0.98)
    shown = capsys.readouterr().out
    assert "rows more; --output writes them all" in shown
    assert "near-duplicates" in shown.splitlines()[-1]


def test_the_gallery_shows_the_least_alike_groups_first_and_what_would_be_kept(
    tmp_path: Path,
) -> None:
    """Of a large group the members that are least like the first."""
    noise = 0.02 * random_vectors(20, seed=5)
    vectors = np.concatenate([clustered(), random_vectors(1, seed=6) + noise])
    hostile = "<script>x</script>\x1b"
    table = tmp_path / "t"
    keys = [f"{hostile}{i}" for i in range(420)]
    write_part(str(table), embedding_part(vectors, "a.tar", keys=keys))
    record = {"config": {"input": str(tmp_path / "gone"), "images": {}}}
    (table / "_run.json").write_text(json.dumps(record))
    page, file = tmp_path / "page.html", tmp_path / "d.parquet"
    argv = [str(table), "--cosine", "0.97", "--gallery", str(page), "--output", str(file)]
    assert duplicates.main([*argv, "--quiet"]) == 0
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(file).to_pylist():
        groups.setdefault(row["group"], []).append(row)
    order = sorted(groups.values(), key=lambda some: min(row["cosine"] for row in some))
    text = page.read_text()
    assert len(order) > 20 and max(map(len, order)) > MEMBERS and "<script" not in text
    sections = text.split("<h2>")[1:]
    assert len(sections) == len(order)
    for section, members in zip(sections, order, strict=True):
        first, *others = members
        shown = re.findall(r"<bdi>.*?(\d+)</bdi></span>\s*<span[^>]*>(.*?)</span>", section)
        shown = [pair for pair in shown if pair[1] and "row" not in pair[1]]
        near = sorted(others, key=lambda row: row["cosine"])[: MEMBERS - 1]
        assert shown[0] == (str(first["row"]), "kept")
        assert [c for _, c in shown[1:]] == [f"{row['cosine']:.4f}" for row in near]
        assert f"<p>{len(members)} images" in section
    assert text.count("the input is not there any more") >= 2 * len(order)
    (table / "_run.json").unlink()
    assert duplicates.main(argv) == 2


def test_wrong_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(str(tmp_path / "t"), random_vectors(9))
    mixed = str(tmp_path / "m")
    write_table(mixed, random_vectors(9))
    write_part(mixed, embedding_part(random_vectors(3), "zz"), weights_hash="cd" * 32)
    for arguments, says in [
        ([table, "--cosine", "1.5"], "--cosine 1.5"),
        ([table, "--cosine", "-1"], "--cosine"),
        ([table, "--cosine", "nan"], "--cosine nan"),
        ([str(tmp_path / "gone")], "no such folder"),
        ([mixed], "parts of different models"),
    ]:
        assert duplicates.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
