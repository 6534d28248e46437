"""Annotations from the kept maps of a run: rows, what is refused, and the whole job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.label import label
from jobs.segment import segment
from pipeline import schema
from pipeline.annotations.kept_maps import open_kept_maps, read_kept_maps
from pipeline.annotations.label import CutAnnotations, describe_classes, refuse_missing_prompts
from pipeline.config.label import LabelConfig
from pipeline.config.ontology import Ontology, OntologyClass
from pipeline.config.ontology_from import to_yaml
from pipeline.config.options import RunOptions, WorkerOptions
from pipeline.config.prompt import Example, recipes
from pipeline.config.segment import SegmentConfig
from pipeline.demo import MODEL, SHARDS
from pipeline.demo.scenes import Scene, draw_scene
from pipeline.errors import UsageError
from pipeline.read.ranges import iter_rows
from pipeline.read.shard import Shard
from pipeline.run.finished import list_finished
from pipeline.run.rerun import with_all_phrases

EMPTY = {
    f.name: "" if pa.types.is_string(f.type) else b"" if pa.types.is_large_binary(f.type) else 0
    for f in schema.KEPT_MAPS
}


def record(row: int, maps: np.ndarray | None, reason: str = "") -> dict[str, Any]:
    height, width = (0, 0) if maps is None else maps.shape[1:]
    return EMPTY | {
        "shard": "s",
        "row": row,
        "key": f"k{row}",
        "height": 20,
        "width": 30,
        "reason": reason,
        "retryable": False,
        "map_height": height,
        "map_width": width,
        "maps": b"" if maps is None else maps.tobytes(),
    }


def test_every_image_is_a_row_of_images_whatever_is_in_it() -> None:
    ontology = Ontology(classes=(OntologyClass(name="x", phrases=("b",), negatives=("a",)),))
    cut = CutAnnotations(ontology, {"c": 0, "a": 1, "b": 2})
    assert cut.wanted == [1, 2]
    maps = np.zeros((2, 4, 4), np.uint8)
    maps[1, 1:3, 1:3] = 255  # of "b"
    batch = [record(0, maps), record(1, np.zeros_like(maps)), record(2, None, "no_image")]
    tables = cut(pa.Table.from_pylist([*batch, record(-1, None)], schema=schema.KEPT_MAPS))
    assert tables["images"]["row"].to_pylist() == [0, 1]
    assert tables["images"].schema == schema.IMAGES
    (row,) = tables["annotations"].to_pylist()
    assert tables["annotations"].schema == schema.ANNOTATIONS
    ids = ("row", "key", "instance", "class_id", "class", "prompt_id", "presence")
    assert [row[name] for name in ids] == [0, "k0", 0, 0, "x", 2, 1.0]
    assert row["rle"]["size"] == [20, 30]


def refusal(each: OntologyClass, names: list[str], made: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        refuse_missing_prompts(Ontology(classes=(each,), file="o.yaml"), "RUN", names, made)
    return str(caught.value)


def test_fields_that_need_the_model_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    shown = (Example(file=f"{tmp_path}/a.png"),)
    of = {"name": "star", "phrases": ("star", "sun"), "line": 7}
    there = ["star", "sun"]
    refuse_missing_prompts(Ontology(classes=(OntologyClass(**of),)), "RUN", there, {})
    for changed, field in [
        ({"phrases": ("star", "moon")}, "phrases"),
        ({"templates": ("{}", "a {}")}, "templates"),
        ({"negatives": ("moon",)}, "negatives"),
        ({"combine": "mean"}, "combine: mean"),
        ({"image_prompts": shown}, "image_prompts"),
    ]:
        each = OntologyClass(**(of | changed))
        says = refusal(each, there, {})
        assert f"o.yaml:7: class 'star': {field} needs the model, and RUN has no map of" in says
        names = [prompt.name for prompt in each.prompts] + list(each.negatives)
        made = recipes(each.prompts)
        refuse_missing_prompts(Ontology(classes=(each,)), "RUN", names, made)
    # A map of that name, of other phrases.
    mean = OntologyClass(**of, combine="mean")
    other = recipes(OntologyClass(**(of | {"phrases": ("a", "b")}), combine="mean").prompts)
    assert "is of other phrases or examples" in refusal(mean, ["star (mean)"], other)
    assert "is of other phrases or examples" in refusal(mean, ["star (mean)"], {})
    # Another image under the same name is another prompt.
    each = OntologyClass(**of, image_prompts=shown)
    names, made = [prompt.name for prompt in each.prompts], recipes(each.prompts)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "image_prompts needs the model" in refusal(each, names, made)


def test_a_class_that_nothing_passes_is_told() -> None:
    classes = (OntologyClass(name="a"), OntologyClass(name="b", threshold=0.9, min_area=50))
    lines = describe_classes({0: 1234}, Ontology(classes=classes))
    assert lines == [
        "  a: 1,234 annotations",
        "  b: 0 annotations (warning: nothing passes threshold 0.9, min_area 50)",
    ]


def test_the_fingerprint_says_what_decides_the_annotations(tmp_path: Path) -> None:
    file = tmp_path / "o.yaml"

    def fingerprint(**changes: Any) -> dict[str, Any]:
        each = OntologyClass(**({"name": "a", "phrases": ("a",), "color": "#00ff00"} | changes))
        file.write_text(to_yaml(Ontology(classes=(each, OntologyClass(name="b")))))
        return LabelConfig(input="run", output="out", ontology=str(file)).fingerprint()["ontology"]

    first = fingerprint()
    assert [(c["name"], c["color"]) for c in first["classes"]] == [("a", "#00ff00"), ("b", None)]
    assert first != fingerprint(threshold=0.4) != fingerprint(min_area=2)
    file.write_text("# a comment\n\n" + file.read_text())
    again = LabelConfig(input="run", output="out", ontology=str(file)).fingerprint()["ontology"]
    assert again == fingerprint(min_area=2)


def write_run(folder: Path, *, images: int = 5) -> tuple[Shard, np.ndarray]:
    """The parts of one shard: `images` with two prompts each, one added; row 1 failed."""
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 255, (images, 3, 4, 6), dtype=np.uint8)
    ids = [{"shard": "a.tar", "row": row, "key": f"k{row}"} for row in range(images) if row != 1]
    decoded = {"height": 40, "width": 60, "format": "PNG", "mode": "RGB", "orientation": 1}
    rows = [each | decoded | {"member": "m", "size_bytes": 9} for each in ids]
    why = {"stage": "decode", "reason": "image_empty", "detail": "d", "retryable": False}
    tables = {
        "images/a": (rows, schema.IMAGES),
        "errors/a": ([why | {"shard": "a.tar", "row": 1, "key": "k1"}], schema.ERRORS),
    }
    for name, prompts in (("a", (0, 1)), ("a.from-2", (2,))):
        found = [
            each
            | {"prompt_id": i, "prompt": "p", "size": [4, 6], "map": maps[each["row"], i].tobytes()}
            for each in ids
            for i in prompts
        ]
        tables[f"probabilities/{name}"] = (found, schema.PROBABILITIES)
    for name, (some, columns) in tables.items():
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(some, schema=columns), file)
    (shard,) = list_finished(str(folder), "probabilities")
    assert shard.name == "a.tar"
    return shard, maps


def read(shard: Shard, wanted: list[int], **options: int) -> list[dict[str, Any]]:
    tables = list(read_kept_maps(shard, wanted, **options))
    assert all(table.schema == schema.KEPT_MAPS for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    assert rows[-1]["row"] == -1
    assert sorted(row["row"] for row in rows[:-1]) == list(range(rows[-1]["total"]))
    assert all(bool(row["maps"]) == (not row["reason"]) for row in rows[:-1])
    return rows


@pytest.mark.parametrize("batch_bytes", [1, 60, 2**20])
@pytest.mark.parametrize("wanted", [[0], [0, 1], [1, 2], [2]])
def test_maps_of_all_passes_come_image_by_image(
    wanted: list[int], batch_bytes: int, tmp_path: Path
) -> None:
    shard, maps = write_run(tmp_path)
    rows = {row["row"]: row for row in read(shard, wanted, batch_bytes=batch_bytes)}
    for i in (0, 2, 3, 4):
        assert rows[i]["maps"] == maps[i, wanted].tobytes()
        known = ("key", "height", "map_height", "map_width", "reason")
        assert [rows[i][name] for name in known] == [f"k{i}", 40, 4, 6, ""]
    assert [rows[1][name] for name in ("key", "reason", "maps")] == ["k1", "image_empty", b""]
    assert (rows[-1]["total"], rows[-1]["reason"]) == (5, "")


@pytest.mark.parametrize("skip", ["0", "0-1_3", "2-4", "0-4"])
def test_rows_that_a_stop_left_done_are_not_made_again(skip: str, tmp_path: Path) -> None:
    shard, _ = write_run(tmp_path)
    tables = list(read_kept_maps(replace(shard, skip=skip), [0, 1]))
    rows = [row for table in tables for row in table.to_pylist()]
    done = set(iter_rows(skip))
    assert sorted(row["row"] for row in rows[:-1]) == [i for i in range(5) if i not in done]
    assert (rows[-1]["row"], rows[-1]["total"]) == (-1, 5)


def test_an_image_without_a_map_is_an_error(tmp_path: Path) -> None:
    shard, _ = write_run(tmp_path)
    file = tmp_path / "probabilities" / "a.from-2.parquet"
    table = pq.read_table(file)
    bad = table.to_pylist()
    bad[1]["size"] = [4, 7]  # row 2: a size that its bytes do not have
    pq.write_table(pa.Table.from_pylist(bad[:3], schema=schema.PROBABILITIES), file)
    rows = {row["row"]: row["reason"] for row in read(shard, [0, 2])}
    assert rows == {0: "", 1: "image_empty", 2: "no_map", 3: "", 4: "no_map", -1: ""}
    # What is wrong with prompts that are not asked for is nothing to the labels.
    assert {row["reason"] for row in read(shard, [0, 1])} == {"", "image_empty"}


@pytest.mark.parametrize("table", ["images", "probabilities", "errors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_is_a_reason_of_the_shard(table: str, damage: str, tmp_path: Path) -> None:
    shard, _ = write_run(tmp_path)
    file = tmp_path / table / "a.parquet"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    rows = read(shard, [0, 1])
    assert rows[-1]["reason"] == ("shard_corrupt" if damage == "cut" else "shard_missing")
    assert all(row["reason"] for row in rows)


def test_the_job_needs_no_torch() -> None:
    code = "import sys, jobs.label; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OF_THE_DEMO = """\
classes:
  - name: star
    phrases: [star, red star]
    negatives: [moon]
    threshold: 0.4
    min_area: 20
    fill_holes: 30
    color: "#e20074"
  - {name: round, phrases: [circle, ring], combine: mean}
  - name: heart
    image_prompts: [{file: heart.png, mask: heart-mask.png}]
  - {name: zebra, phrases: [black], min_area: 100000}
"""


def run_job(main: Callable[..., None], config: Any, capsys: pytest.CaptureFixture[str]) -> str:
    main(config)
    return capsys.readouterr().out


def table_of(output: Path, name: str) -> pa.Table:
    parts = sorted((output / name).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts])


def test_photos_become_labels_and_other_labels_without_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = next(s for s in map(scene_of, range(99)) if s.mask("red", "heart").sum() > 300)
    Image.fromarray(scene.image).save(tmp_path / "heart.png")
    Image.fromarray(scene.mask("red", "heart")).save(tmp_path / "heart-mask.png")
    file = tmp_path / "o.yaml"
    file.write_text(OF_THE_DEMO)
    run = SegmentConfig(
        input=str(SHARDS),
        output=f"{tmp_path}/run",
        model=str(MODEL),
        ontology=str(file),
        run=RunOptions(),
        workers=WorkerOptions(quiet=True, local=True),
    )
    run_job(segment, run, capsys)
    first = LabelConfig(
        input=run.output, output=f"{tmp_path}/labels", ontology=str(file), workers=run.workers
    )
    said = run_job(label, first, capsys)
    assert "zebra: 0 annotations (warning: nothing passes threshold 0.5, min_area 100000)" in said
    images, rows = (table_of(tmp_path / "labels", name) for name in ("images", "annotations"))
    assert images.num_rows == table_of(tmp_path / "run", "images").num_rows > 0
    counts = Counter(rows["class"].to_pylist())
    assert set(counts) == {"star", "round", "heart"}
    assert f"star: {counts['star']:,} annotations" in said
    ids = [(row["shard"], row["row"], row["instance"]) for row in rows.to_pylist()]
    assert ids == sorted(ids)
    record = json.loads((tmp_path / "labels" / "_run.json").read_text())
    classes = record["fingerprint"]["ontology"]["classes"]
    assert [(c["name"], c["color"]) for c in classes][:2] == [("star", "#e20074"), ("round", None)]
    # What a stop left undone is done by the same command, and nothing else is.
    before = files_of(tmp_path / "labels")
    (done, other) = sorted((tmp_path / "labels" / "_receipts").iterdir())
    shutil.rmtree(done)
    (tmp_path / "labels" / "annotations" / f"{done.name}.parquet").unlink()
    (tmp_path / "labels" / "_SUCCESS").unlink()
    kept = next(other.iterdir()).stat().st_mtime_ns
    run_job(label, first, capsys)
    assert files_of(tmp_path / "labels") == before
    assert next(other.iterdir()).stat().st_mtime_ns == kept
    # Another threshold is another run.
    file.write_text(OF_THE_DEMO.replace("threshold: 0.4", "threshold: 0.1"))
    with pytest.raises(UsageError, match="holds another run"):
        run_job(label, first, capsys)
    wider = replace(first, output=f"{tmp_path}/wider")
    run_job(label, wider, capsys)
    area = {
        n: pc.sum(table_of(tmp_path / n, "annotations")["area"]).as_py()
        for n in ("labels", "wider")
    }
    assert area["wider"] > area["labels"]
    file.write_text(OF_THE_DEMO.replace("combine: mean", "combine: max"))
    with pytest.raises(UsageError, match="class 'round': phrases needs the model"):
        run_job(label, replace(first, output=f"{tmp_path}/other"), capsys)
    with pytest.raises(UsageError, match="of the job 'label'; labels are cut from segment's"):
        run_job(label, replace(first, input=first.output, output=f"{tmp_path}/other"), capsys)


def files_of(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in output.glob("annotations/*.parquet")}


def scene_of(number: int) -> Scene:
    return draw_scene(np.random.default_rng((99, number)))


def test_a_run_without_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it has no _run\.json"):
        open_kept_maps(str(tmp_path))
    record = {"fingerprint": {"job": "segment", "keep_probabilities": "none"}}
    (tmp_path / "_run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="kept no probability maps"):
        open_kept_maps(str(tmp_path))


def test_a_retry_asks_for_the_prompts_of_the_run(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "heart.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "heart-mask.png")
    (tmp_path / "o.yaml").write_text(OF_THE_DEMO)
    shown = f"moon={tmp_path}/heart.png"
    (tmp_path / "more.txt").write_text("cross\n")
    asked = SegmentConfig(
        input="in",
        output="out",
        prompts=f"{tmp_path}/more.txt",
        image_prompt=(shown.replace("moon", "shown"),),
        ontology=f"{tmp_path}/o.yaml",
    )
    first = asked.resolve().fingerprint()
    assert first["prompts"][:2] == ["cross", "shown"]
    assert set(first["recipes"]) == {"shown", "round (mean)", "heart (examples)"}
    again = with_all_phrases(asked, first, ["square"]).resolve().fingerprint()
    assert set(again["prompts"]) == {*first["prompts"], "square"}
    assert len(again["prompts"]) == len(first["prompts"]) + 1
    assert again["recipes"] == first["recipes"]
    with pytest.raises(UsageError, match="'moon' is given twice"):  # a phrase of the ontology, too
        replace(asked, image_prompt=(shown,)).resolve()
