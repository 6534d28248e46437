"""README.md and docs/ work as written: every command, query and example runs, every figure of the
code is the code's.

Commands run with --local, the bundled model, and a few small images in the place of buckets.
docs/exports.md has a test of its own (test_export.py).
"""

from __future__ import annotations

import importlib
import re
import shlex
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import documents
import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import tyro
from PIL import Image

from jobs.__main__ import COMMANDS
from pipeline.config.options import ImageOptions, RunOptions
from pipeline.demo import MODEL, SHARDS
from pipeline.read import divide
from pipeline.run.follow import ERROR_RATE_ROWS, SILENT_SHARDS
from pipeline.run.guard import MAX_CRASHES
from pipeline.schema import ERRORS, IMAGES, MASKS, labels
from tests.pictures import BYTES_PER_PIXEL, COPIES, MORE_BYTES

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language in a page; "" for those of none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return [body for name, body in found if name == language]


def commands(page: str, program: str) -> list[str]:
    """The lines that call a program, those that go on after a backslash in one."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0] for line in lines if line.split()[:1] == [program]]


def run(line: str) -> Any:
    """Run a command in this process, with the bundled model. Returns its configuration."""
    _, name, *arguments = shlex.split(line)
    name = name.replace("-", "_")
    job: Callable[..., None] = getattr(importlib.import_module(f"jobs.{name}"), name)
    config = tyro.cli(get_type_hints(job)["config"], args=arguments)
    if hasattr(config, "model") and (config.model or name != "label"):
        config = replace(config, model=str(MODEL))
    if hasattr(config, "workers"):
        config = replace(config, workers=replace(config.workers, local=True, quiet=True))
    job(config)
    return config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: bucket/laion, bucket/photos, photos and text files."""
    folder = tmp_path_factory.mktemp("world")
    laion, photos = folder / "bucket" / "laion", folder / "bucket" / "photos"
    laion.mkdir(parents=True)
    photos.mkdir()
    (tar,) = SHARDS.glob("*.tar")
    with tarfile.open(tar) as scenes:
        members = scenes.getmembers()
        for number in range(2):
            with tarfile.open(laion / f"{number:05}.tar", "w") as shard:
                for member in members[12 * number : 12 * number + 12]:
                    shard.addfile(member, scenes.extractfile(member))
        images = [m for m in members if m.name.endswith((".jpg", ".png", ".webp"))]
        for member in images[:4]:
            scenes.extract(member, photos, filter="data")
    (folder / "photos").mkdir()
    pq.write_table(
        pq.read_table(*SHARDS.glob("*.parquet")).slice(0, 4), folder / "photos/a.parquet"
    )
    texts = {"more.txt": "star\n", "queries.txt": "a red star\nblue\n", "labels.txt": "red\nblue\n"}
    texts["ontology.yaml"] = "classes: [star, blue]\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("page", [name for name in PAGES if name != "exports.md"])
def test_commands_run_as_written(page: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    lines = commands(page, "clipseg-ray")
    if any(line.split()[1] == "index" for line in lines):
        pytest.importorskip("lancedb")
    for line in lines:
        here = line.replace("s3://bucket/", "bucket/").replace("{00000..00999}", "{00000..00001}")
        config = run(here)
        if isinstance(getattr(config, "run", None), RunOptions):
            assert Path(config.output, "_SUCCESS").exists(), line
        for file in ("contact_sheet", "gallery"):
            if name := getattr(config, file, None):
                assert Path(name).stat().st_size > 1000, line


def test_other_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page, text in PAGES.items():
        for line in commands(page, "make"):
            assert f"\n{line.split()[1]}:" in makefile, line
        for module in re.findall(r"python -m ((?:benchmarks|tests|jobs|pipeline)[\w.]*)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), (page, module)


def test_options_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"--compile-bytecode", "--help"}  # uv's, everybody's
    for name in (name.replace("-", "_") for name in COMMANDS):
        hints = get_type_hints(getattr(importlib.import_module(f"jobs.{name}"), name))
        with pytest.raises(SystemExit):
            tyro.cli(hints["config"], args=["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for page in set(PAGES) - {"speed.md", "CONTRIBUTING.md"}:
        for code in re.findall(r"`(--[^`]+|clipseg-ray [^`]+)`", PAGES[page]):
            assert set(re.findall(r"--[a-z][a-z-]+", code)) <= known, (page, code)


def test_links_lead_somewhere() -> None:
    for file in FILES:
        for target in re.findall(r"\]\(([^)#]*(?:#[^)]*)?)\)", PAGES[file.name]):
            path, _, anchor = target.partition("#")
            if path.startswith("https://"):
                continue
            found = (file.parent / path) if path else file
            assert found.exists(), (file.name, target)
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert not anchor or anchor in slugs, (file.name, target)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1300
    assert len(PAGES["CONTRIBUTING.md"].split()) <= 800


# ------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of what `make demo` runs."""
    output = tmp_path_factory.mktemp("demo") / "demo-output"
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"\$\(BIN\)/(clipseg-ray segment .*)", makefile)
    line = line.replace("$(OUT)", str(output)).replace("pipeline/demo/shards", str(SHARDS))
    assert len(run(line).prompt) == 3
    return output


def test_the_demo_finds_what_was_drawn(demo: Path) -> None:
    """Captions name every object of a scene, so they tell where a star must be found."""
    rows = duckdb.sql(
        f"""SELECT i.shard, i."row", m.area > 0.01 * m.height * m.width
            FROM '{demo}/masks/*.parquet' m JOIN '{demo}/images/*.parquet' i USING (shard, "row")
            WHERE m.prompt = 'star'"""
    ).fetchall()
    captions = duckdb.sql(f"SELECT caption FROM '{SHARDS}/*.parquet'").fetchall()
    of_parquet = sorted((row, found) for shard, row, found in rows if shard.endswith(".parquet"))
    right = [("star" in captions[row][0]) == found for row, found in of_parquet]
    assert len(right) == len(captions) > 20
    assert np.mean(right) > 0.85


def test_the_picture_is_what_the_demo_draws(demo: Path) -> None:
    sheet = np.asarray(Image.open(demo / "contact-sheet.png").convert("RGB"), np.float32)
    file = ROOT / "docs" / "contact-sheet.png"
    shown = np.asarray(Image.open(file).convert("RGB"), np.float32)  # its upper rows, 256 colours
    assert min(shown.shape[:2]) > 500
    assert file.stat().st_size <= 300_000
    assert np.abs(sheet[: len(shown)] - shown).mean() < 4


def test_queries_of_the_demo_run_as_written(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.parent)
    queries = {
        page: [block for block in blocks(page, "sql") if "demo-output/" in block]
        for page in ("README.md", "tables.md", "errors.md")
    }
    (query,) = queries["README.md"]
    rows = duckdb.sql(query).fetchall()
    shares = [row[2] for row in rows]
    assert len(rows) == 5
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share < 1 for share in shares)
    (query,) = queries["tables.md"]
    without = duckdb.sql(query).fetchall()
    stars = f"FROM '{demo}/masks/*.parquet' WHERE prompt = 'star' AND area = 0"
    assert [(len(without),)] == duckdb.sql(f"SELECT count(*) {stars}").fetchall()
    (query,) = queries["errors.md"]
    assert duckdb.sql(query).columns == ["stage", "reason", "retryable", "rows"]


def test_masks_decode_as_written(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.parent)
    (code,) = [code for code in blocks("README.md", "python") if "pycocotools" in code]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["mask"].shape == (names["row"]["height"], names["row"]["width"])
    assert names["mask"].sum() == names["row"]["area"]


# ---------------------------------------------------------------------------------- joins


def test_masks_join_their_parquet_files_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is split by row groups, and one that is not."""
    (shard,) = SHARDS.glob("*.parquet")
    scenes = pq.read_table(shard).slice(0, 12)
    (tmp_path / "photos").mkdir()
    pq.write_table(scenes, tmp_path / "photos" / "large.parquet", row_group_size=5)
    pq.write_table(scenes.slice(0, 2), tmp_path / "photos" / "small.parquet")
    large = (tmp_path / "photos" / "large.parquet").stat().st_size
    monkeypatch.setattr(divide, "SPLIT_BYTES", large // 3 + 1)
    monkeypatch.chdir(tmp_path)
    (line,) = commands("tables.md", "clipseg-ray")
    for _ in range(2):  # the second finds everything done
        run(line)
    (query,) = [block for block in blocks("tables.md", "sql") if "file_row_number" in block]
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


# --------------------------------------------------------------------------------- search


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the bundled shards by the bundled model."""
    output = tmp_path_factory.mktemp("demo") / "vectors"
    run(f"clipseg-ray embed {SHARDS} {output}")
    return output


def test_search_finds_red_shapes_for_red(vectors: Path, tmp_path: Path) -> None:
    found, page = tmp_path / "found.parquet", tmp_path / "found.html"
    options = f"--text red --top 10 --output {found} --gallery {page} --quiet"
    run(f"clipseg-ray search {vectors} {options}")
    captions = {}
    for file in SHARDS.glob("*.parquet"):
        found_there = duckdb.sql(f"SELECT caption FROM '{file}'").fetchall()
        captions |= {(file.name, row): text for row, (text,) in enumerate(found_there)}
    for file in SHARDS.glob("*.tar"):
        with tarfile.open(file) as tar:
            texts = [tar.extractfile(m).read() for m in tar if m.name.endswith(".txt")]  # type: ignore[union-attr]
        captions |= {(file.name, row): text.decode() for row, text in enumerate(texts)}
    rows = duckdb.sql(f"""SELECT shard, "row" FROM '{found}' ORDER BY rank""").fetchall()
    assert len(rows) == 10
    assert np.mean(["red" in captions[row].split() for row in rows]) >= 0.9
    assert page.read_text().count("data:image/") == 10


def test_other_readers_search_as_written(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lancedb")
    monkeypatch.chdir(vectors.parent)
    (query,) = blocks("search.md", "sql")
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == 5
    assert rows[0][1] == pytest.approx(1, abs=1e-5)
    (code,) = blocks("search.md", "python")
    *lines, last = code.strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    hits = eval(last, names)
    assert [hit["key"] for hit in hits] == [key for key, _ in rows]


# --------------------------------------------------------------------------------- Python


def example(wanted: str) -> str:
    (code,) = [code for code in blocks("README.md", "python") if wanted in code]
    return re.sub(r'"CIDAS/[^"]*"', repr(str(MODEL)), code)


def test_a_dataset_is_segmented_as_written(world: Path, tmp_path: Path, local_ray: None) -> None:
    code = example("import segment").replace("photos/", str(world / "bucket" / "photos"))
    exec(code.replace("masks/", str(tmp_path)), {})
    rows = duckdb.sql(f"SELECT prompt, reason FROM '{tmp_path}/*.parquet'").fetchall()
    assert rows == [("a cat", None)] * 4


def test_one_picture_is_segmented_as_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = min((world / "bucket" / "photos").iterdir())
    Image.open(picture).save(tmp_path / "photo.jpg")
    names: dict[str, Any] = {}
    exec(example("import CLIPSeg"), names)
    assert names["masks"].shape == (1, *Image.open(picture).size[::-1])


# ---------------------------------------------------------------------------- code's facts


def test_the_files_and_the_reasons_are_those_of_the_code() -> None:
    for page, text in documents.pages().items():
        assert page.read_text(encoding="utf-8") == text, "run python -m tests.documents"


def test_the_tables_have_the_stated_columns() -> None:
    made = {"masks": MASKS, "images": IMAGES, "errors": ERRORS, "labels": labels({})}
    for name, schema in made.items():
        section = PAGES["tables.md"].split(f"\n## {name}\n")[1].split("\n## ")[0]
        cells = re.findall(r"^\| ([a-z_, ]+) \|", section, re.MULTILINE)[1:]
        assert ", ".join(cells).split(", ") == schema.names, name


def test_the_stated_bounds_are_those_of_the_code() -> None:
    pages = {name: " ".join(text.split()) for name, text in PAGES.items()}
    bound = f"{BYTES_PER_PIXEL} bytes x `--max-pixels` + {COPIES} x the encoded image + "
    for name in ("errors.md", "reliability.md"):
        assert f"{bound}{MORE_BYTES >> 20} MiB" in pages[name]
    default = BYTES_PER_PIXEL * ImageOptions().max_pixels + COPIES * 2**20 + MORE_BYTES
    assert f"images of 1 MiB that is {-(-default // 2**20):,} MiB for each" in pages["errors.md"]
    reliability = pages["reliability.md"]
    assert f"dies {MAX_CRASHES} times" in reliability
    assert f"no answer for {SILENT_SHARDS} shards" in reliability
    assert f"after the first {ERROR_RATE_ROWS:,} rows" in reliability
    assert f"`--max-error-rate` ({RunOptions().max_error_rate})" in reliability
    assert f"`--storage-timeout` seconds ({RunOptions().storage_timeout:g})" in reliability
    assert f"more than {divide.SPLIT_BYTES >> 20} MiB" in pages["tables.md"]
    assert f"up to {divide.GROUP_FILES} files" in pages["inputs.md"]
