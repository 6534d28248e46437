"""Criteria of kept maps against their definitions, ranks, and the command from labels to a tool."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata

from jobs import evaluate, review
from pipeline.annotations.cut import ask
from pipeline.annotations.kept_maps import open_kept_maps
from pipeline.annotations.review import REVIEW, choose, rank, review_labels
from pipeline.annotations.worth import CRITERIA, asked_of, measure_image, weigh
from pipeline.config.label import describe_ontology
from pipeline.config.ontology import Ontology, OntologyClass
from pipeline.demo import MODEL, SHARDS
from pipeline.demo.make_shards import PARQUET_NAME
from pipeline.errors import UsageError
from tests.embeddings import embedding_part, random_vectors, write_part
from tests.kept_maps import SIZE, smooth, write_run
from tests.label_tables import image_row, write_labels

ROOT = Path(__file__).parent.parent
ONTOLOGY = Ontology(
    classes=(
        OntologyClass(name="a", phrases=("p", "q", "r"), threshold=0.4),
        OntologyClass(name="b", phrases=("q",), negatives=("s",), threshold=0.65, presence=0.9),
    )
)
PROMPTS = ["p", "q", "r", "s"]


def odds(p: np.ndarray | float) -> np.ndarray:
    """Of probabilities, 0 and 255 half a step from the end."""
    p = np.clip(p, 0.5 / 255, 254.5 / 255)
    return p / (1 - p)


def by_definition(maps: np.ndarray) -> dict[str, float]:
    """As docs/review.md has them, for ONTOLOGY and one image, (4, h, w) uint8."""
    p = maps.astype(np.float64) / 255
    near, gates, disagree = [], [], []
    for each in ONTOLOGY.classes:
        of = [p[PROMPTS.index(name)] for name in each.phrases]
        top = np.max(of, axis=0)
        ratio = odds(top.max()) / odds(max(each.presence, each.threshold))
        gates.append(min(ratio, 1 / ratio))
        if top.max() < each.presence:
            continue
        ratio = odds(top) / odds(each.threshold)
        beaten = [top <= p[PROMPTS.index(name)] for name in each.negatives]
        near.append(((ratio <= 2) & (ratio >= 0.5) & ~np.any(beaten, axis=0)).mean())
        masks = [one > each.threshold for one in of]
        ious = [(m & n).sum() / (m | n).sum() for m, n in combinations(masks, 2) if (m | n).any()]
        disagree.append(1 - np.mean(ious) if ious else 0)
    return {
        "near_share": max(near, default=0),
        "disagreement": max(disagree, default=0),
        "gate": max(gates),
    }


@pytest.mark.parametrize("seed", range(4))
def test_criteria_are_as_they_are_defined(seed: int) -> None:
    random = np.random.default_rng(seed)
    classes = [weigh(each) for each in ask(ONTOLOGY, {n: i for i, n in enumerate(PROMPTS)})]
    for maps in smooth(random, 6, 4, 12, 16):
        maps = (maps * random.uniform(0.2, 1)).astype(np.uint8)
        found = measure_image(dict(enumerate(maps)), classes)
        wanted = by_definition(maps)
        assert {n: found[n] for n in CRITERIA} == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_the_class_with_most_of_it_is_named() -> None:
    classes = [weigh(each) for each in ask(ONTOLOGY, {n: i for i, n in enumerate(PROMPTS)})]
    maps = np.zeros((4, 8, 8), np.uint8)
    maps[1, :2] = 240  # of q: both classes, b passes its gate just so
    found = measure_image(dict(enumerate(maps)), classes)
    assert (found["gate_class"], found["disagreement_class"]) == ("b", "a")
    assert found["near_share"] == 0 and found["near_share_class"] == ""
    assert found["disagreement"] == 1  # of p or r and q; p and r have no mask
    nothing = measure_image(dict(enumerate(np.zeros_like(maps))), classes)
    assert nothing["gate"] < 0.01 and nothing["disagreement"] == nothing["near_share"] == 0


def test_classes_are_those_of_the_fingerprint() -> None:
    ontology = Ontology(
        classes=(
            *ONTOLOGY.classes,
            OntologyClass(name="c", phrases=("p", "q"), templates=("a {}",), combine="mean"),
            OntologyClass(name="d", phrases=("s",), combine="mean"),
        )
    )
    ids = {name: i for i, name in enumerate([*PROMPTS, "c (mean)"])}
    written = json.loads(json.dumps({"ontology": describe_ontology(ontology)}))
    for one, other in zip(asked_of(written, ids, "L"), ask(ontology, ids), strict=True):
        assert (one.prompt_ids, one.negative_ids) == (other.prompt_ids, other.negative_ids)
        assert (one.of.threshold, one.of.presence) == (other.of.threshold, other.of.presence)
    with pytest.raises(UsageError, match="L: cut from prompts that its run does not have"):
        asked_of(written, {"p": 0}, "L")
    with pytest.raises(UsageError, match=r"L: _run\.json does not tell the classes"):
        asked_of({"ontology": {"classes": [3]}}, ids, "L")


def test_ranks_are_of_the_mean_place() -> None:
    random = np.random.default_rng(3)
    criteria = random.integers(0, 4, (50, 3)).astype(np.float32) / 3
    ranks = rank(criteria)
    assert sorted(ranks) == list(range(1, 51))
    places = [np.where(c > 0, rankdata(c, method="max"), 0) for c in criteria.T]
    in_order = np.sum(places, axis=0)[np.argsort(ranks)]
    assert (np.diff(in_order) <= 0).all()
    chosen = choose(np.array([2, 1, 3, 4, 5]), np.array([7, 7, -1, -1, 8]), 3)
    assert chosen.tolist() == [False, True, True, True, False]


# ---- the command


def make(folder: Path, maps: np.ndarray) -> tuple[str, str]:
    """Labels without a mask, and the run with the maps that they were cut from."""
    run = write_run(folder / "run", maps, PROMPTS)
    rows = [(image_row("s.tar", i, f"k{i}", SIZE), []) for i in range(len(maps))]
    made = {"ontology": describe_ontology(ONTOLOGY)}
    return write_labels(f"{folder}/labels", rows, config={"input": run}, fingerprint=made), run


def test_the_table_has_every_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = smooth(np.random.default_rng(0), 20, 4, 12, 16)
    labels, run = make(tmp_path, maps)
    groups = pa.table({"shard": ["s.tar"] * 6, "row": [*range(6)], "group": [0, 0, 0, 1, 1, 1]})
    pq.write_table(groups, tmp_path / "same.parquet")
    found = review_labels(labels, open_kept_maps(run), 5, f"{tmp_path}/out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert pq.read_schema(tmp_path / "out.parquet").equals(REVIEW)
    assert [row["row"] for row in rows] == list(range(20))
    for row, image in zip(rows, maps, strict=True):
        assert {n: row[n] for n in CRITERIA} == pytest.approx(by_definition(image), rel=1e-5)
        assert row["chosen"] == (row["rank"] <= 5) and row["group"] is None
    assert [row["rank"] for row in found.rows] == [1, 2, 3, 4, 5] and found.images == 20
    out = str(tmp_path / "grouped")
    options = ["--format", "cvat", "--images", "none", "--output", out]
    options += ["--duplicates", f"{tmp_path}/same.parquet"]
    assert review.main([labels, "--top", "16", *options]) == 0
    assert "16 of 20 images chosen" in capsys.readouterr().out  # 14 alone, one of each group
    rows = pq.read_table(f"{out}/review.parquet").to_pylist()
    for group in (0, 1):
        members = [row for row in rows if row["group"] == group]
        (best,) = [row for row in members if row["chosen"]]
        assert best["rank"] == min(row["rank"] for row in members)


def test_near_duplicates_are_found_by_the_embeddings_of_the_run(tmp_path: Path) -> None:
    labels, run = make(tmp_path, smooth(np.random.default_rng(0), 6, 4, 12, 16))
    record = json.loads((tmp_path / "run" / "_run.json").read_text())
    record["fingerprint"]["embed"] = True
    (tmp_path / "run" / "_run.json").write_text(json.dumps(record))
    vectors = random_vectors(6)
    vectors[4] = vectors[1]
    write_part(run, embedding_part(vectors, "s.tar"))
    options = ["--format", "cvat", "--images", "none", "--output", f"{tmp_path}/out", "--quiet"]
    assert review.main([labels, *options]) == 0
    rows = pq.read_table(tmp_path / "out" / "review.parquet").to_pylist()
    assert [row["group"] for row in rows] == [None, 0, None, None, 0, None]
    assert sum(row["chosen"] for row in rows) == 5


def test_images_whose_maps_are_gone_are_told(tmp_path: Path) -> None:
    maps = smooth(np.random.default_rng(0), 4, 4, 12, 16)
    labels, run = make(tmp_path, maps)
    part = tmp_path / "run" / "probabilities" / "s.parquet"
    pq.write_table(pq.read_table(part).slice(0, 12), part)
    found = review_labels(labels, open_kept_maps(run), 5, f"{tmp_path}/out.parquet")
    assert found.images == 3
    (line,) = found.lines
    assert line.startswith("1 images of the labels have no maps in")


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    def peak(number: int) -> int:
        maps = np.zeros((number, 4, 4, 4), np.uint8)
        labels, run = make(tmp_path / str(number), maps)
        kept = open_kept_maps(run)
        tracemalloc.start()
        review_labels(labels, kept, 5, f"{tmp_path}/out.parquet")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    # A batch is bounded by its maps' bytes: these small ones are all in one.
    assert peak(600) - peak(200) < 400 * 20_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of docs/review.md leave in a folder, of one of the two bundled shards."""
    folder = tmp_path_factory.mktemp("review")
    text = (ROOT / "docs" / "review.md").read_text(encoding="utf-8")
    (ontology,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (folder / "doubtful.yaml").write_text(ontology)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in commands.strip().splitlines():
            command = line.replace("pipeline/demo/shards", str(SHARDS / PARQUET_NAME))
            words = command.replace("pipeline/demo/model", str(MODEL)).split()
            options = ["--local", "--quiet"] if words[1] == "label" else ["--quiet"]
            job = importlib.import_module(f"jobs.{words[1]}")
            assert job.main([*words[2:], *options]) == 0, command
    return folder


def chosen_of(world: Path) -> list[str]:
    """Keys of the chosen images, best first."""
    rows = pq.read_table(world / "doubtful" / "review.parquet").to_pylist()
    return [r["key"] for r in sorted(rows, key=lambda r: r["rank"]) if r["chosen"]]


def test_the_page_shows_the_chosen_images_and_why(world: Path) -> None:
    page = (world / "doubtful" / "review.html").read_text()
    keys = chosen_of(world)
    assert re.findall("<h2>(.*?)</h2>", page) == keys and len(keys) == 8
    assert page.count("data:image/jpeg") >= 2 * 8
    assert page.count("are near the threshold of") + page.count("to its gate") >= 8
    assert "default-src 'none'; " in page and "style-src 'sha256-" in page
    assert "unsafe" not in page
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*"?(?!data:)[^"\s]', page)


def test_exports_have_the_chosen_images_alone(world: Path) -> None:
    keys = chosen_of(world)
    tree = ElementTree.parse(world / "doubtful/cvat/annotations_train.xml")
    names = [image.get("name") for image in tree.iter("image")]
    tasks = json.loads((world / "doubtful/labelstudio/tasks/train-00000.json").read_text())
    by_rank = sorted(tasks, key=lambda task: task["data"]["review_rank"])
    assert [task["data"]["key"] for task in by_rank] == keys
    assert all(0 <= task["data"][n] <= 1 for task in tasks for n in CRITERIA)
    for form in ("cvat", "labelstudio"):
        files = sorted((world / "doubtful" / form / "images/train").iterdir())
        assert [file.name for file in files] == sorted(names)
    assert len(names) == 8


def test_what_is_accepted_is_ground_truth(world: Path, tmp_path: Path) -> None:
    tasks = json.loads((world / "doubtful/labelstudio/tasks/train-00000.json").read_text())
    for task in tasks:
        task["annotations"] = task.pop("predictions")
    (tmp_path / "accepted.json").write_text(json.dumps(tasks))
    for file in (tmp_path / "accepted.json", world / "doubtful/cvat/annotations_train.xml"):
        asked = [str(world / "labels"), "--ground-truth", str(file), "--output", str(tmp_path)]
        assert evaluate.main(asked) == 0
        rows = pq.read_table(tmp_path / "evaluation.parquet").to_pylist()
        assert [r["images"] for r in rows if r["class"]] == [8, 8]
        assert rows[-1]["presence_precision"] == rows[-1]["presence_recall"] == 1
        assert all(r["iou"] > 0.99 for r in rows if r["class"])


def test_wrong_calls_are_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = str(world / "labels")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("x")
    pq.write_table(pa.table({"shard": ["a"]}), tmp_path / "none.parquet")
    bare, _ = make(tmp_path / "bare", np.zeros((2, 4, 4, 4), np.uint8))
    shutil.rmtree(tmp_path / "bare" / "run")
    for arguments, says in (
        ([labels, "--top", "0"], "--top 0: must be at least 1"),
        ([labels, "--top", "5000"], "at most 1,000 images on a page"),
        ([labels, "--images", "none"], "a page always has its images"),
        ([labels, "--output", f"{tmp_path}/other"], "holds files that are not from a review"),
        ([labels, "--duplicates", f"{tmp_path}/none.parquet"], "no column 'row' in it; give the"),
        ([labels, "--duplicates", f"{tmp_path}/no.parquet"], "no such file"),
        ([str(tmp_path)], "it has no _run.json"),
        ([bare], "not the OUTPUT of `segment`"),
    ):
        where = [] if "--output" in arguments else ["--output", f"{tmp_path}/new"]
        assert review.main([*arguments, *where]) == 2, arguments
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said


def test_reviewing_needs_no_torch_and_no_ray() -> None:
    code = "import sys, jobs.review; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
