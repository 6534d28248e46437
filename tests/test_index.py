"""The index: what a search by it finds, what it refuses, and that a build cut short is none."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import numpy as np
import pyarrow.parquet as pq
import pytest
from embeddings import embedding_part, random_vectors, write_part, write_table

from jobs import duplicates, index, search
from pipeline import storage
from pipeline.embeddings.index import (
    FACTS,
    INDEX_FROM_ROWS,
    build_index,
    count_partitions,
    open_index,
    search_index,
)
from pipeline.embeddings.recall import draw_rows, measure_recall, share_found
from pipeline.embeddings.search import Hit, search_files
from pipeline.embeddings.vectors import open_table
from pipeline.errors import JobError, UsageError
from pipeline.model.weights import hash_weights
from pipeline.run.manifest import name_run
from tests.runs import write_run, write_tar

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP in the hub's file layout."""
    folder = tmp_path_factory.mktemp("clip")
    checkpoints.save(checkpoints.small_clip(), folder)
    checkpoints.write_vocabulary(folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A clustered table of 150,000 rows, more than a query looks at, and the index of it."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((400, 16))
    rows = centres[random.integers(0, 400, 150_000)] + random.normal(0, 0.3, (150_000, 16))
    folder = tmp_path_factory.mktemp("large")
    table = write_table(str(folder / "t"), rows.astype(np.float32))
    assert index.main([table, str(folder / "i")]) == 0
    return table, str(folder / "i")


def of_model(clip: Path, folder: Path, rows: int = 200) -> str:
    """The output folder of a run of that model."""
    vectors = random_vectors(rows, checkpoints.PROJECTION)
    return write_table(str(folder), vectors, model=str(clip), weights_hash=hash_weights(clip))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_small_table_is_searched_as_exactly_as_ever(dtype: type, folder: str) -> None:
    """Hit for hit, cosines to the last bit, on local disk and on S3."""
    vectors = random_vectors(300) * np.random.default_rng(1).uniform(0.1, 9, (300, 1))
    table = open_table(write_table(f"{folder}/t", vectors.astype(dtype)))
    built = build_index(table, f"{folder}/i")
    assert (built.rows, built.partitions) == (300, 0)
    assert built == open_index(f"{folder}/i")
    queries = random_vectors(4, seed=2)
    for top in (1, 20, 1000, 10**18):
        wanted = search_files(table, table.files, queries, top)
        assert search_index(built, queries, top) == wanted


def test_a_large_table_is_searched_by_its_index(large: tuple[str, str]) -> None:
    table, built = open_table(large[0]), open_index(large[1])
    assert (built.rows, built.partitions) == (150_000, 146)
    measured = measure_recall(built, table, 50)
    assert measured is not None
    assert measured.queries == 50
    assert measured.recall > 0.99
    ids, queries = draw_rows(table, built.rows, 5)
    exact = search_files(table, table.files, queries, 3)
    assert search_index(built, queries, 3) == exact
    assert [(hits[0].shard, hits[0].row) for hits in exact] == ids


def test_rows_without_a_cosine_are_kept_and_never_found(tmp_path: Path) -> None:
    vectors = random_vectors(INDEX_FROM_ROWS, 8)
    vectors[3], vectors[4, 0], vectors[40, 1] = 0, np.nan, np.inf
    table = open_table(write_table(str(tmp_path / "t"), vectors, parts=1))
    built = build_index(table, str(tmp_path / "i"))
    assert (built.rows, built.partitions) == (INDEX_FROM_ROWS, 9)
    (hits,) = search_index(built, random_vectors(1, 8, seed=2), INDEX_FROM_ROWS)
    assert {hit.row for hit in hits} == set(range(INDEX_FROM_ROWS)) - {3, 4, 40}


def test_partitions_suit_the_rows() -> None:
    assert [count_partitions(n, 512) for n in (9, INDEX_FROM_ROWS - 1)] == [0, 0]
    assert [count_partitions(n, 512) for n in (INDEX_FROM_ROWS, 10**6, 4 * 10**6)] == [9, 976, 2000]
    for rows in (10**8, 10**10):
        assert count_partitions(rows, 768) * 256 * 768 * 4 <= 2**31


def test_what_another_row_of_the_same_cosine_is_worth() -> None:
    wanted = [Hit(0.9, "a", 1, ""), Hit(0.8, "a", 2, ""), Hit(0.8, "a", 3, "")]
    found = [Hit(0.9, "a", 1, ""), Hit(0.8, "a", 9, ""), Hit(0.7, "a", 5, "")]
    assert share_found(found, wanted) == pytest.approx(2 / 3)
    assert share_found(wanted, wanted) == 1


# --------------------------------------------------------------------------- the commands


def test_the_same_queries_give_the_same_results(clip: Path, tmp_path: Path) -> None:
    table = of_model(clip, tmp_path / "t")
    (tmp_path / "q.txt").write_text("red cat\nblue dog\n")
    found = [str(tmp_path / "table.parquet"), str(tmp_path / "index.parquet")]
    assert index.main([table, str(tmp_path / "i"), "--recall", "20"]) == 0
    for source, output in zip([table, str(tmp_path / "i")], found, strict=True):
        query = ["--text", "star", "--minus", "blue", "--queries", str(tmp_path / "q.txt")]
        assert search.main([source, *query, "--top", "7", "--output", output, "--quiet"]) == 0
    assert pq.read_table(found[0]).num_rows == 21
    assert pq.read_table(found[0]).equals(pq.read_table(found[1]))


def test_the_command_says_what_it_built_and_how_good_it_is(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = of_model(clip, tmp_path / "t")
    assert index.main([table, str(tmp_path / "i"), "--recall", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("200 rows, too few for an index")
    assert lines[2] == "recall@10 1.000, 20 rows of the table as queries"
    write_table(str(tmp_path / "one"), random_vectors(1), parts=1)
    assert index.main([str(tmp_path / "one"), str(tmp_path / "j"), "--recall", "5"]) == 0
    assert "cannot be measured" in capsys.readouterr().out


def test_a_model_with_other_weights_is_refused_with_both_named(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index.main([of_model(clip, tmp_path / "t"), str(tmp_path / "i")]) == 0
    other = checkpoints.copy_with(clip, tmp_path / "other")
    checkpoints.save(checkpoints.small_clip(seed=1), other)
    assert search.main([str(tmp_path / "i"), "--text", "cat", "--model", str(other)]) == 2
    said = capsys.readouterr().err
    for model in (clip, other):
        assert str(model) in said
        assert hash_weights(model)[:16] in said


def test_hostile_keys_do_not_reach_the_terminal(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["\x1b]0;owned\x07", "[red]x[/red]", "a\nb"]
    part = embedding_part(random_vectors(3, checkpoints.PROJECTION), "h", keys=keys)
    write_part(str(tmp_path / "t"), part, model=str(clip), weights_hash=hash_weights(clip))
    assert index.main([str(tmp_path / "t"), str(tmp_path / "i")]) == 0
    assert search.main([str(tmp_path / "i"), "--text", "cat"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[red]x[/red]" in shown


def test_a_gallery_is_drawn_from_an_index(clip: Path, tmp_path: Path) -> None:
    output, page = str(tmp_path / "t"), tmp_path / "found.html"
    write_run(output, write_tar(str(tmp_path / "in")))
    part = embedding_part(random_vectors(5, checkpoints.PROJECTION), "a.tar")
    write_part(output, part, model=str(clip), weights_hash=hash_weights(clip))
    assert index.main([output, str(tmp_path / "i")]) == 0
    options = ["--text", "cat", "--top", "4", "--gallery", str(page), "--quiet"]
    assert search.main([str(tmp_path / "i"), *options]) == 0
    assert page.read_text().count("data:image/") == 4


def test_rows_missing_from_an_unfinished_run_are_told_once(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, built = of_model(clip, tmp_path / "t"), str(tmp_path / "i")
    commands = [
        lambda: index.main([output, built, "--overwrite"]),
        lambda: search.main([output, "--text", "cat"]),
        lambda: search.main([built, "--text", "cat"]),
        lambda: duplicates.main([output]),
    ]
    for record, warned in [(None, 0), ("_run.json", 1), ("_SUCCESS", 0)]:
        if record:
            content = b"{}" if record == "_run.json" else name_run({}).encode()
            storage.write_bytes(f"{output}/{record}", content)
        for command in commands:
            assert command() == 0
            said = capsys.readouterr().err
            assert said.count("rows are missing") == said.count("\n") == warned


# ---------------------------------------------------------------------- what is no index


def test_wrong_usage_is_one_line(
    tmp_path: Path, large: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(str(tmp_path / "t"), random_vectors(9))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("mine")
    new = str(tmp_path / "new")
    for job, arguments, says in [
        (index, [table, str(tmp_path / "full"), "--overwrite"], "not from an index"),
        (index, [table, table, "--overwrite"], "not from an index"),
        (index, [table, f"{table}/embeddings/i"], "lies inside the table"),
        (index, [table, large[1]], "holds an index already; --overwrite"),
        (index, [table, new, "--recall", "-1"], "--recall -1"),
        (index, [table, new, "--column", "text_vector"], "embedded no texts"),
        (index, [str(tmp_path / "gone"), new], "no such folder"),
        (search, [large[1], "--text", "x", "--column", "text_vector"], "say --column vector"),
        (search, [large[1], "--text", "x", "--gallery", "x.html"], "_run.json is gone"),
    ]:
        assert job.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert (tmp_path / "full" / "photo.jpg").read_text() == "mine"
    assert not Path(new).exists()


def test_overwriting_replaces_only_the_index(tmp_path: Path) -> None:
    built = tmp_path / "i"
    for rows in (9, 20):
        table = open_table(write_table(str(tmp_path / str(rows)), random_vectors(rows)))
        assert build_index(table, str(built), overwrite=True).rows == rows
        (built / "notes.txt").write_text("mine")
    assert (built / "notes.txt").read_text() == "mine"
    assert len(search_index(open_index(str(built)), random_vectors(1), 50)[0]) == 20


def test_a_failed_build_is_no_index_and_is_begun_anew(folder: str) -> None:
    source, dest = f"{folder}/t", f"{folder}/i"
    table = open_table(write_table(source, random_vectors(90)))
    bad = f"{source}/embeddings/01.tar.parquet"
    whole = storage.read_bytes(bad)
    storage.write_bytes(bad, whole[:-9])
    with pytest.raises(JobError, match=r"01\.tar\.parquet: damaged"):
        build_index(open_table(source), dest)
    write_part(source, embedding_part(random_vectors(3), "01.tar"), weights_hash="cd" * 32)
    with pytest.raises(UsageError, match="parts of different models"):
        build_index(open_table(source), dest)
    with pytest.raises(UsageError, match="not finished"):
        open_index(dest)
    storage.write_bytes(bad, whole)
    table = open_table(source)
    assert build_index(table, dest).rows == 90


KILLED = """
import sys, time
import pipeline.embeddings.index as i
from pipeline.embeddings.vectors import open_table
table = open_table(sys.argv[1])
def stop(share):
    print("copying", flush=True)
    time.sleep(600)
i.build_index(table, sys.argv[2], on_progress=stop)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_is_no_index(how: signal.Signals, clip: Path, tmp_path: Path) -> None:
    table, dest = of_model(clip, tmp_path / "t"), str(tmp_path / "i")
    command = [sys.executable, "-c", KILLED, table, dest]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as build:
        assert build.stdout is not None
        assert build.stdout.readline() == "copying\n"
        started = time.monotonic()
        while build.poll() is None and time.monotonic() - started < 20:
            build.send_signal(how)  # Python loses an interrupt that comes just before it waits
            with contextlib.suppress(subprocess.TimeoutExpired):
                build.wait(2)
        build.kill()
    assert time.monotonic() - started < 20
    assert build.returncode != 0
    assert search.main([dest, "--text", "cat"]) == 2
    assert index.main([table, dest]) == 0
    assert search.main([dest, "--text", "cat"]) == 0


def test_an_index_whose_rows_are_gone_is_one_line(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = str(tmp_path / "i")
    assert index.main([of_model(clip, tmp_path / "t"), dest]) == 0
    storage.delete_folder(f"{dest}/embeddings.lance")
    assert search.main([dest, "--text", "cat"]) == 1
    said = capsys.readouterr().err
    assert "LanceDB" in said
    assert said.count("\n") == 1
    facts = json.loads(storage.read_bytes(f"{dest}/{FACTS}"))
    del facts["table"]["dimension"]
    storage.write_bytes(f"{dest}/{FACTS}", json.dumps(facts).encode())
    assert search.main([dest, "--text", "cat"]) == 2
    assert "build it again" in capsys.readouterr().err


def test_without_lancedb_one_line_says_what_to_install(clip: Path, tmp_path: Path) -> None:
    table, dest = of_model(clip, tmp_path / "t"), str(tmp_path / "i")
    assert index.main([table, dest]) == 0
    code = "import sys; sys.modules['lancedb'] = None; from jobs.__main__ import main; "
    code += "sys.exit(main())"
    for arguments in (["index", table, f"{dest}2"], ["search", dest, "--text", "cat"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ)
        )
        assert done.returncode == 2
        assert "pip install 'clipseg-ray[lance]'" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not Path(f"{dest}2").exists()
