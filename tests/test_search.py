"""Exact search: equal to a full sort and to DuckDB, whatever the batches; what is no table."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embeddings import (
    FACTS,
    embedding_part,
    fixed_size,
    full_sort,
    ids_of,
    random_vectors,
    write_part,
    write_table,
)

from jobs import search
from pipeline.embeddings.search import ExactSearch, Hit, search_files
from pipeline.embeddings.vectors import open_table
from pipeline.errors import JobError, UsageError


def short(hits: list[list[Hit]]) -> list[list[tuple[str, int]]]:
    return [[(hit.shard, hit.row) for hit in found] for found in hits]


def assert_found(hits: list[list[Hit]], wanted: list[list[tuple[str, int, np.float32]]]) -> None:
    assert short(hits) == [[(shard, row) for shard, row, _ in found] for found in wanted]
    for found, expected in zip(hits, wanted, strict=True):
        cosines = [float(cosine) for *_, cosine in expected]
        assert [hit.cosine for hit in found] == pytest.approx(cosines, abs=2e-7)
        assert all(hit.key == f"key-{hit.row}" for hit in found)


@pytest.mark.parametrize("top", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["normalized", "unnormalized", "float16"])
def test_search_equals_a_full_sort(kind: str, top: int, folder: str) -> None:
    vectors = random_vectors(500)
    if kind == "unnormalized":
        vectors *= np.random.default_rng(1).uniform(0.01, 100, (500, 1)).astype(np.float32)
    if kind == "float16":
        vectors = vectors.astype(np.float16)
    table = open_table(write_table(folder, vectors))
    assert (table.model, table.weights_hash) == (FACTS["model"], FACTS["weights_hash"])
    queries = random_vectors(5, seed=2)
    hits = search_files(table, table.files, queries, top, batch_rows=64)
    assert_found(hits, full_sort(vectors, queries, top))
    assert len(hits[0]) == min(top, 500)


def test_search_equals_duckdb(tmp_path: Path) -> None:
    output = write_table(str(tmp_path), random_vectors(300, 512) * np.float32(3))
    (query,) = random_vectors(1, 512, seed=2)
    rows = duckdb.execute(
        f"""SELECT shard, "row", list_cosine_similarity(vector::FLOAT[], $query::FLOAT[]) AS c
            FROM '{output}/embeddings/*.parquet' ORDER BY c DESC LIMIT 10""",
        {"query": query.tolist()},
    ).fetchall()
    table = open_table(output)
    (hits,) = search_files(table, table.files, query[None], 10)
    assert [(hit.shard, hit.row) for hit in hits] == [row[:2] for row in rows]
    assert [hit.cosine for hit in hits] == pytest.approx([row[2] for row in rows], abs=1e-5)


@pytest.mark.parametrize("batch_rows", [7, 100, 4096])
def test_results_do_not_depend_on_the_batches(batch_rows: int, tmp_path: Path) -> None:
    """Bit for bit, with many rows that are equal or differ in the last bits."""
    some = random_vectors(40, 512)
    vectors = some[np.random.default_rng(1).integers(0, 40, 700)]
    vectors[::2] *= np.float32(1.7)
    table = open_table(write_table(str(tmp_path), vectors))
    queries = np.concatenate([random_vectors(3, 512, seed=2), some[:2]])
    hits = search_files(table, table.files, queries, 30, batch_rows=batch_rows)
    assert hits == search_files(table, table.files[::-1], queries, 30, batch_rows=333)
    for found in hits:
        assert found == sorted(found, key=lambda hit: hit.order)
    assert [hit.cosine for hit in hits[3][:5]] == [1] * 5


def test_ties_are_broken_by_shard_and_row(tmp_path: Path) -> None:
    vectors = np.repeat(random_vectors(1), 90, axis=0)
    table = open_table(write_table(str(tmp_path), vectors))
    for files in (table.files, table.files[::-1]):
        (hits,) = search_files(table, files, vectors[:1], 35, batch_rows=8)
        assert [(hit.shard, hit.row) for hit in hits] == ids_of(90)[:35]


def test_vectors_without_a_cosine_are_never_found(tmp_path: Path) -> None:
    vectors = random_vectors(60)
    vectors[3], vectors[4, 0], vectors[40, 1] = 0, np.nan, np.inf
    table = open_table(write_table(str(tmp_path), vectors))
    (hits,) = search_files(table, table.files, random_vectors(1, seed=2), 100, batch_rows=10)
    missing = [ids_of(60)[i] for i in (3, 4, 40)]
    assert sorted(set(ids_of(60)) - {(hit.shard, hit.row) for hit in hits}) == missing
    assert len(hits) == 57


def test_searches_of_parts_merge_into_that_of_the_whole(tmp_path: Path) -> None:
    table = open_table(write_table(str(tmp_path), random_vectors(400), parts=7))
    queries = random_vectors(3, seed=2)
    merged = ExactSearch(queries, 20)
    for group in search.group_files(table.files, table.files[0].size_bytes + 1):
        merged.merge(search_files(table, group, queries, 20))
    assert merged.hits == search_files(table, table.files, queries, 20)


def test_ray_tasks_find_the_same(local_ray: None, folder: str) -> None:
    table = open_table(write_table(folder, random_vectors(400), parts=7))
    queries = random_vectors(3, seed=2)
    hits = search.search_on_ray(table, queries, 20, group_bytes=2 * table.files[0].size_bytes)
    assert hits == search_files(table, table.files, queries, 20)


def test_groups_hold_every_file_once(tmp_path: Path) -> None:
    files = open_table(write_table(str(tmp_path), random_vectors(90), parts=9)).files
    for size_bytes in (1, 2 * files[0].size_bytes, 10**9):
        groups = search.group_files(files, size_bytes)
        assert [file for group in groups for file in group] == list(files)
        assert all(groups)


# ------------------------------------------------------------------------------ the table


def test_text_vectors_are_searched_by_request(tmp_path: Path) -> None:
    images, texts = random_vectors(50), random_vectors(50, seed=1)
    part = embedding_part(images, "a.tar", text=["x"] * 50, text_vector=fixed_size(texts))
    write_part(str(tmp_path), part)
    table = open_table(str(tmp_path), "text_vector")
    (hits,) = search_files(table, table.files, texts[7:8], 1)
    assert (hits[0].row, hits[0].cosine) == (7, 1)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_part(str(tmp_path / "unstarted"), embedding_part(random_vectors(0), ""))
    write_table(str(tmp_path / "good"), random_vectors(9))
    pq.write_table(pa.table({"shard": ["a"], "row": [0]}), tmp_path / "other.parquet")
    wrong = tmp_path / "wrong" / "embeddings"
    wrong.mkdir(parents=True)
    metadata = {f"clipseg_ray.{k}": v for k, v in {**FACTS, "dimension": "3"}.items()}
    lists = pa.table({"vector": [[1.0, 2.0]]}).replace_schema_metadata(metadata)
    pq.write_table(lists, wrong / "a.parquet")
    for name, column, says in [
        ("gone", "vector", "no such folder"),
        ("empty", "vector", r"no embeddings/\*.parquet in it"),
        (".", "vector", "not a table of embeddings"),
        ("unstarted", "vector", "has no rows"),
        ("good", "text_vector", "embedded no texts"),
        ("wrong", "vector", "list<.*>, not a list of 3"),
    ]:
        with pytest.raises(UsageError, match=says):
            open_table(str(tmp_path / name), column)
    assert open_table(str(tmp_path / "good" / "embeddings")) == open_table(str(tmp_path / "good"))


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    write_table(str(tmp_path), random_vectors(9))
    write_part(
        str(tmp_path), embedding_part(random_vectors(3), "zz"), model="b", weights_hash="cd" * 32
    )
    table = open_table(str(tmp_path))
    with pytest.raises(UsageError, match=r"some/model \(weights abab.*is of b \(weights cdcd"):
        search_files(table, table.files, random_vectors(1), 1)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    write_table(str(tmp_path), random_vectors(3000, 64))
    path = tmp_path / "embeddings" / "01.tar.parquet"
    data = bytearray(path.read_bytes())
    data[1000:100_000] = bytes(99_000)
    path.write_bytes(data)
    table = open_table(str(tmp_path))
    with pytest.raises(JobError, match=r"01\.tar\.parquet: damaged"):
        search_files(table, table.files, random_vectors(1, 64), 1)
