"""What the README shows works as written."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_memory import BYTES_PER_PIXEL, COPIES, MORE_BYTES

from jobs import embed, search, segment
from pipeline.config.options import ImageOptions
from pipeline.errors import REASONS
from pipeline.read import divide
from pipeline.run.guard import MAX_CRASHES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """The output of what `make demo` runs."""
    output = tmp_path_factory.mktemp("demo") / "demo-output"
    makefile = (ROOT / "Makefile").read_text()
    prompts = re.findall(r'--prompt (?:"([^"]+)"|(\w+))', makefile.replace("\\\n", " "))
    assert len(prompts) == 3
    arguments = [a for p in prompts for a in ("--prompt", p[0] or p[1])]
    shards, model = ROOT / "pipeline/demo/shards", ROOT / "pipeline/demo/model"
    sheet = output / "contact-sheet.png"
    options = ["--model", str(model), "--contact-sheet", str(sheet), "--quiet"]
    assert segment.main([str(shards), str(output), *arguments, *options]) == 0
    return output


def test_the_demo_finds_what_was_drawn(demo: Path) -> None:
    """Captions name every object of a scene, so they tell where a star must be found."""
    rows = duckdb.sql(
        f"""SELECT i.shard, i."row", m.area > 0.01 * m.height * m.width
            FROM '{demo}/masks/*.parquet' m JOIN '{demo}/images/*.parquet' i USING (shard, "row")
            WHERE m.prompt = 'star'"""
    ).fetchall()
    captions = duckdb.sql(f"SELECT caption FROM '{ROOT}/pipeline/demo/shards/*.parquet'").fetchall()
    of_parquet = sorted((row, found) for shard, row, found in rows if shard.endswith(".parquet"))
    right = [("star" in captions[row][0]) == found for row, found in of_parquet]
    assert len(right) == len(captions) > 20
    assert np.mean(right) > 0.85


def test_the_contact_sheet_shows_images_and_masks(demo: Path) -> None:
    sheet = np.asarray(Image.open(demo / "contact-sheet.png").convert("RGB"))
    assert min(sheet.shape[:2]) > 500
    assert len(set(map(tuple, sheet[::5, ::5].reshape(-1, 3)))) > 1000


def test_the_duckdb_query_runs_as_written(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.parent)
    (query,) = [block for block in blocks("sql") if "demo-output/masks" in block]
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == 5
    shares = [row[2] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share < 1 for share in shares)


def test_masks_join_their_parquet_files_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    """A file that is split by row groups, and one that is not."""
    (shard,) = (ROOT / "pipeline/demo/shards").glob("*.parquet")
    scenes = pq.read_table(shard).slice(0, 12)
    (tmp_path / "photos").mkdir()
    pq.write_table(scenes, tmp_path / "photos" / "large.parquet", row_group_size=5)
    pq.write_table(scenes.slice(0, 2), tmp_path / "photos" / "small.parquet")
    large = (tmp_path / "photos" / "large.parquet").stat().st_size
    monkeypatch.setattr(divide, "SPLIT_BYTES", large // 3 + 1)
    monkeypatch.chdir(tmp_path)
    options = ["--prompt", "star", "--model", str(ROOT / "pipeline/demo/model"), "--quiet"]
    for _ in range(2):  # the second finds everything done
        assert segment.main(["photos", "found", *options]) == 0
    (query,) = [block for block in blocks("sql") if "file_row_number" in block]
    rows = duckdb.sql(query).fetchall()
    captions = scenes["caption"].to_pylist()
    assert sorted(row[:3] for row in rows) == [
        *(("photos/large.parquet", row, caption) for row, caption in enumerate(captions)),
        *(("photos/small.parquet", row, caption) for row, caption in enumerate(captions[:2])),
    ]
    members = f"SELECT shard, \"row\", member FROM '{tmp_path}/found/images/*.parquet'"
    paths = {(shard, row): member for shard, row, member in duckdb.sql(members).fetchall()}
    assert {shard for shard, _ in paths} == {
        "large.parquet#rows=00-04",
        "large.parquet#rows=05-09",
        "large.parquet#rows=10-11",
        "small.parquet",
    }
    of_row = [cell["path"] for cell in scenes["image"].to_pylist()]
    assert len(set(of_row)) == 12
    assert all(paths[shard, row] == of_row[at] for _, at, _, shard, row, *_ in rows)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Embeddings of the bundled shards by the bundled model."""
    output = tmp_path_factory.mktemp("demo") / "vectors"
    shards, model = ROOT / "pipeline/demo/shards", ROOT / "pipeline/demo/model"
    assert embed.main([str(shards), str(output), "--model", str(model), "--quiet"]) == 0
    return output


def test_search_finds_red_shapes_for_red(vectors: Path, tmp_path: Path) -> None:
    found, page = tmp_path / "found.parquet", tmp_path / "found.html"
    options = ["--text", "red", "--top", "10", "--output", str(found), "--gallery", str(page)]
    assert search.main([str(vectors), *options, "--quiet"]) == 0
    shards = ROOT / "pipeline" / "demo" / "shards"
    captions = {}
    for file in shards.glob("*.parquet"):
        found_there = duckdb.sql(f"SELECT caption FROM '{file}'").fetchall()
        captions |= {(file.name, row): text for row, (text,) in enumerate(found_there)}
    for file in shards.glob("*.tar"):
        with tarfile.open(file) as tar:
            texts = [tar.extractfile(m).read() for m in tar if m.name.endswith(".txt")]  # type: ignore[union-attr]
        captions |= {(file.name, row): text.decode() for row, text in enumerate(texts)}
    rows = duckdb.sql(f"""SELECT shard, "row" FROM '{found}' ORDER BY rank""").fetchall()
    assert len(rows) == 10
    assert np.mean(["red" in captions[row].split() for row in rows]) >= 0.9
    assert page.read_text().count("data:image/") == 10


def test_the_embedding_queries_run_as_written(
    vectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lancedb")
    monkeypatch.chdir(vectors.parent)
    (query,) = [block for block in blocks("sql") if "vectors/embeddings" in block]
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == 5
    assert rows[0][1] == pytest.approx(1, abs=1e-5)
    (code,) = blocks("python")
    *lines, last = code.strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    hits = eval(last, names)
    assert [hit["key"] for hit in hits] == [key for key, _ in rows]


def test_the_file_tree_names_what_is_there() -> None:
    tree = README.split("## How the pieces fit")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py", tree))
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("jobs", "pipeline", "pipeline/model")
        for path in (ROOT / folder).glob("*.py")
        if not path.name.startswith("__")
    }
    assert {Path(name).name for name in named} == {Path(name).name for name in found}


def test_the_reasons_are_those_of_the_code() -> None:
    table = README.split("| reason | meaning |")[1].split("\n\n")[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table.splitlines()[2:]]
    assert rows == list(REASONS.items())


def test_the_stated_bounds_are_those_of_the_code() -> None:
    text = " ".join(README.split())
    bound = f"{BYTES_PER_PIXEL} bytes x `--max-pixels` + {COPIES} x the encoded image + "
    assert f"below {bound}{MORE_BYTES >> 20} MiB" in text
    default = BYTES_PER_PIXEL * ImageOptions().max_pixels + COPIES * 2**20 + MORE_BYTES
    assert f"images of 1 MiB that is {-(-default // 2**20):,} MiB for each" in text
    assert f"dies {MAX_CRASHES} times" in text
