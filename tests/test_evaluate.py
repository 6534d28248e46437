"""Ground truth in every form, matched to the rows of a run; and whole evaluations."""

from __future__ import annotations

import html
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from label_tables import (
    Found,
    annotation_rows,
    export_labels,
    image_row,
    random_blobs,
    small_labels,
    write_labels,
)
from PIL import Image
from pycocotools import mask as coco

from jobs import evaluate
from pipeline.annotations.evaluate import evaluate_run as count
from pipeline.annotations.labelstudio import brush_rle
from pipeline.annotations.predicted import open_predictions
from pipeline.annotations.truth import Matcher, Truth, TruthImage, TruthName
from pipeline.annotations.truth_files import open_truth
from pipeline.annotations.truth_json import decode_brush
from pipeline.config.ontology import parse_ontology
from pipeline.config.yaml_file import open_yaml
from pipeline.demo.make_shards import PARQUET_NAME
from pipeline.errors import UsageError
from tests.kept_maps import NAMES, SIZE, as_coco, smooth, write_run

KEYS = ["a/1", "a/2", "b/3", "b/4"]


def images(seed: int = 0, keys: list[str] = KEYS) -> list[tuple[dict[str, Any], list[Found]]]:
    """Rows and random masks; the last image has none."""
    rows = [image_row("s.tar", i, key, SIZE) for i, key in enumerate(keys)]
    found = [random_blobs(seed + i, SIZE) for i in range(len(keys) - 1)]
    return list(zip(rows, [*found, []], strict=True))


def union(found: list[Found], class_id: int) -> np.ndarray:
    masks = [mask for each, mask in found if each == class_id]
    return np.logical_or.reduce([np.zeros(SIZE, bool), *masks])


# ---- the forms of ground truth


def as_parquet(
    folder: Path, drawn: list[tuple[dict[str, Any], list[Found]]], form: str, group: int = 4
) -> str:
    rows = []
    for row, found in drawn:
        for class_id, name in enumerate(NAMES):  # a mask for each class, empty ones too
            mask = union(found, class_id).astype(np.uint8, order="F")
            rle = coco.encode(mask) | {"size": list(SIZE)}
            rows.append({"class": name, "rle": rle | {"counts": rle["counts"].decode()}})
            names = ("shard", "row") if form == "row" else (form,)
            rows[-1] |= {n: row[n] for n in names}
    file = folder / "masks.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    return str(file)


def as_folders(folder: Path, drawn: list[tuple[dict[str, Any], list[Found]]], form: str) -> str:
    for row, found in drawn:
        for class_id, name in enumerate(NAMES):
            file = folder / "drawn" / name / f"{row['key']}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = union(found, class_id)
            image = (
                Image.fromarray(pixels) if form == "1" else Image.fromarray(pixels * np.uint8(255))
            )
            image.save(file)
    return str(folder / "drawn")


def as_export(folder: Path, drawn: list[tuple[dict[str, Any], list[Found]]], form: str) -> str:
    labels = write_labels(str(folder / "drawn"), drawn)
    assert export_labels(labels, str(folder / form), form) == 0
    if form == "coco":
        return str(folder / form / "annotations/instances_train.json")
    if form == "labelstudio":  # somebody accepts the predictions
        tasks = json.loads((folder / form / "tasks/train-00000.json").read_text())
        for task in tasks:
            task["annotations"] = [{"result": []}, task.pop("predictions")[0]]
            task["annotations"].append({"was_cancelled": True, "result": []})
        (folder / "studio.json").write_text(json.dumps([*tasks, {"data": {"image": "x.jpg"}}]))
        return str(folder / "studio.json")
    return str(folder / form)


FORMS = [
    *((as_coco, form) for form in ("str", "list")),
    *((as_parquet, form) for form in ("row", "key", "member")),
    *((as_folders, form) for form in ("1", "L")),
    *((as_export, form) for form in ("coco", "png", "voc", "labelstudio")),
]


@pytest.mark.parametrize(("write", "form"), FORMS)
def test_every_form_of_truth_gives_the_same_masks(write: Any, form: str, tmp_path: Path) -> None:
    drawn = images()
    truth = open_truth(write(tmp_path, drawn, form))
    matcher = Matcher(truth)
    assert set(truth.classes) <= set(NAMES)
    for row, found in drawn:
        index = matcher.find(row["shard"], row["row"], (row["key"], row["member"]))
        assert index is not None
        image = truth.read(index)
        for class_id, name in enumerate(NAMES):
            wanted = union(found, class_id)
            assert (wanted == image.mask_at(name, SIZE).T).all(), (row["key"], name)
    assert matcher.describe() == []
    assert truth.instances == (write is not as_folders and form not in ("png", "voc"))
    if form == "labelstudio":
        assert truth.notes == ("1 tasks without an annotation are left out",)


def test_polygons_are_read_as_pycocotools_does(tmp_path: Path) -> None:
    file = as_coco(tmp_path, images(), "str")
    content = json.loads(Path(file).read_text())
    polygons = [[5.0, 5, 40.5, 8, 30, 40], [50, 10, 90, 10, 90, 30, 50, 30]]  # one goes outside
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0] |= {"segmentation": polygons, "image_id": 1, "category_id": 7}
    Path(file).write_text(json.dumps(content))
    truth = open_truth(file)
    polygons[1] = [50, 10, 64, 10, 64, 30, 50, 30]
    wanted = coco.decode(coco.merge(coco.frPyObjects(polygons, *SIZE)))
    assert (wanted == truth.read(0).mask_at(NAMES[0], SIZE).T).all()
    result = {"type": "polygonlabels", "original_height": SIZE[0], "original_width": SIZE[1]}
    points = (np.array(polygons[0]).reshape(-1, 2) / [0.64, 0.48]).tolist()
    result["value"] = {"points": points, "polygonlabels": ["x"]}
    task = {"data": {"image": "/data/?d=a/1.jpg"}, "annotations": [{"result": [result]}]}
    (tmp_path / "studio.json").write_text(json.dumps([task]))
    studio = open_truth(str(tmp_path / "studio.json"))
    assert studio.images[0].names == ("a/1.jpg",)
    wanted = coco.decode(coco.frPyObjects(polygons[:1], *SIZE))[..., 0]
    assert (wanted == studio.read(0).mask_at("x", SIZE).T).all()


def test_brush_masks_are_read_as_they_are_written() -> None:
    for seed in range(5):
        mask = random_blobs(seed, (31, 45))[0][1]
        assert (decode_brush(brush_rle(mask), (31, 45), "x") == mask).all()
    whole = brush_rle(mask)
    for bad in (whole[:-9], whole[:3], [], [300], "text", None, [0] * 99):
        with pytest.raises(UsageError, match="x: a brush mask that is no RLE of 31 x 45 px"):
            decode_brush(bad, (31, 45), "x")
    with pytest.raises(UsageError):
        decode_brush(whole, (45, 32), "x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"segmentation": {"size": [48, 64], "counts": "PPPPP0"}}, "counts that are no RLE of 48"),
        ({"segmentation": {"size": [48, 64], "counts": [100]}}, "counts that are no RLE"),
        ({"segmentation": {"size": [48, 64], "counts": [4000, -928]}}, "counts that are no RLE"),
        ({"segmentation": {"size": [48, 64], "counts": None}}, "counts that are no RLE"),
        ({"segmentation": {"size": [48, 65], "counts": [3120]}}, "has the size"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon needs 3 or more points"),
        ({"segmentation": [[1, 2, 3, float("nan"), 5, 6]]}, "a polygon needs 3 or more points"),
        ({"segmentation": []}, "has no segmentation"),
        ({"image_id": 99}, "its image_id or category_id is not in the file"),
    ],
)
def test_damaged_truth_is_one_line(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = as_coco(tmp_path, images(), "str")
    content = json.loads(Path(file).read_text())
    content["annotations"][0] |= change
    Path(file).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=says) as caught:
        open_truth(file).read(0)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", "{", "not valid JSON"),
        ("x.json", "3", "none of COCO"),
        ("x.json", '{"images": 3}', "not COCO instances: it needs a list of"),
        ("x.json", "[1]", "neither COCO instances nor tasks"),
        ("x.json", '[{"data": {"image": "a"}}]', "no task has an annotation"),
        ("gone.json", None, "cannot be read"),
        ("folder/x.txt", "", "none of COCO"),
    ],
)
def test_what_is_no_truth_is_told(
    name: str, content: str | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    with pytest.raises(UsageError, match=says):
        open_truth(str(file.parent if "/" in name else file))


def test_pngs_without_numbers_and_in_colour_are_refused(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"no classes\.json or labelmap\.txt tells its numbers"):
        open_truth(str(tmp_path))
    (tmp_path / "classes.json").write_text('{"classes": [{"value": 1, "name": "cat"}]}')
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="has colours; a mask has one channel"):
        open_truth(str(tmp_path)).read(0)


def test_void_pixels_count_for_nothing(tmp_path: Path) -> None:
    pixels = np.array([[0, 1, 255, 255]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "k.png")
    (tmp_path / "classes.json").write_text(
        json.dumps({"classes": [{"value": 1, "name": NAMES[0]}]})
    )
    row = image_row("s", 0, "k", (1, 4))
    labels = write_labels(f"{tmp_path}/l", [(row, [(0, np.uint8([[0, 1, 1, 0]]))])])
    result = count(open_predictions(labels, None), open_truth(str(tmp_path)))
    (of,) = result.classes
    assert (of.tp, of.fp, of.fn) == (1, 0, 0)


# ---- matching


def truth_of(*names: str) -> Truth:
    def read(index: int) -> TruthImage:
        return TruthImage(size=SIZE, instances=())

    found = [TruthName(names=(name,)) for name in names]
    return Truth(source="T", classes=[], images=found, read=read, instances=True)


def test_names_match_with_and_without_folder_and_ending() -> None:
    for name in ("a/1.jpg", "a/1", "1.PNG", "1", "x/y/1.jpeg", "./a/1.jpg", "a\\1.jpg"):
        assert Matcher(truth_of("other.jpg", name)).find("s", 0, ("a/1", "a/1.jpg")) == 1
    assert Matcher(truth_of("2.jpg")).find("s", 0, ("a/1", "a/1.jpg")) is None
    # What follows a dot is no ending unless it is an image's.
    matcher = Matcher(truth_of("scan.001", "scan.002"))
    assert matcher.find("s", 0, ("scan.002", "scan.002")) == 1


def test_the_whole_path_decides_where_names_repeat() -> None:
    matcher = Matcher(truth_of("a/1.jpg", "b/1.jpg"))
    assert matcher.find("s", 0, ("b/1", "b/1.jpg")) == 1
    with pytest.raises(UsageError, match="T: several images are named '1', as s row 1"):
        matcher.find("s", 1, ("c/1", "c/1.jpg"))
    matcher = Matcher(truth_of("1.jpg"))
    matcher.find("s", 0, ("a/1", "a/1.jpg"))
    with pytest.raises(
        UsageError, match=r"T: '1\.jpg' fits two rows, the second is t row 5 \(b/1\)"
    ):
        matcher.find("t", 5, ("b/1", "b/1.jpg"))


def test_what_has_no_partner_is_counted_and_named() -> None:
    matcher = Matcher(truth_of("x", "y", "z", "v", "w"))
    for i, name in enumerate("abcdx"):
        matcher.find("s", i, (name, name))
    assert matcher.describe() == [
        "4 images of the run have no ground truth: a, b, c, ...",
        "4 images of the ground truth are not in the run: y, z, v, ...",
    ]


# ---- whole evaluations


def table(folder: Path) -> dict[str | None, dict[str, Any]]:
    return {r["class"]: r for r in pq.read_table(folder / "evaluation.parquet").to_pylist()}


def test_labels_against_truth_in_each_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guessed, drawn = images(50), images(0)
    labels = write_labels(f"{tmp_path}/labels", guessed)
    seen = []
    for write, form in [(as_coco, "str"), (as_parquet, "row"), (as_folders, "1")]:
        truth = write(tmp_path, drawn, form)
        out = tmp_path / form
        assert evaluate.main([labels, "--ground-truth", truth, "--output", str(out)]) == 0
        seen.append(table(out))
        said = capsys.readouterr().out
        assert "4 images of" in said and "mean IoU over classes" in said
    for class_id, name in enumerate(NAMES):
        pairs = [
            (union(one, class_id), union(other, class_id))
            for (_, one), (_, other) in zip(guessed, drawn, strict=True)
        ]
        both, either = (
            sum(int(f(a, b).sum()) for a, b in pairs) for f in (np.logical_and, np.logical_or)
        )
        for rows in seen:
            assert rows[name]["iou"] == both / (1 + either)
            there, told = (np.array([p[i].any() for p in pairs]) for i in (1, 0))
            assert rows[name]["images_present"] == there.sum()
            recall = rows[name]["presence_recall"]
            assert recall == ((there & told).sum() / there.sum() if there.any() else None)
            assert rows[name]["absent_found"] == (told & ~there).sum()
            assert rows[name]["ap"] is None and rows[name]["iou_at"] == []
    present = [r["iou"] for n, r in seen[0].items() if n and r["images_present"]]
    assert seen[0][None]["miou"] == pytest.approx(np.mean(present))
    assert seen[0][None]["coco_ap"] is not None and seen[2][None]["coco_ap"] is None


def test_the_truth_itself_is_perfect(tmp_path: Path) -> None:
    labels = write_labels(f"{tmp_path}/labels", images())
    truth = as_coco(tmp_path, images(), "str")
    assert evaluate.main([labels, "--ground-truth", truth, "--output", f"{tmp_path}/out"]) == 0
    overall = table(tmp_path / "out")[None]
    for name in ("coco_ap", "boundary_iou", "presence_precision", "presence_recall"):
        assert overall[name] == pytest.approx(1)
    assert overall["absent_found"] == 0 and 0.999 < overall["miou"] < 1  # + 1 below the line


@pytest.mark.parametrize("seed", range(3))
def test_kept_maps_are_counted_as_the_definitions_say(seed: int, tmp_path: Path) -> None:
    """Against torch's interpolation and counting at each threshold."""
    random = np.random.default_rng(seed)
    maps = smooth(random, 4, 2, 12, 16)
    run = write_run(tmp_path / "run", maps, NAMES[:2])
    truth = as_coco(tmp_path, images(seed, [f"k{i}" for i in range(4)]), "str")
    assert evaluate.main([run, "--ground-truth", truth, "--output", f"{tmp_path}/out"]) == 0
    rows = table(tmp_path / "out")
    share = torch.from_numpy(maps).double().clamp(0.5, 254.5) / 255
    grown = torch.nn.functional.interpolate(share.logit().float(), SIZE, mode="bilinear")
    p = grown.sigmoid().numpy()
    for k, name in enumerate(NAMES[:2]):
        drawn = np.stack([union(found, k) for _, found in images(seed, KEYS)])
        for i, t in enumerate(np.linspace(0, 1, 51)[1:-1]):
            on = p[:, k] > np.float32(t)
            wanted = [(on & drawn).sum(), (on & ~drawn).sum(), (~on & drawn).sum()]
            found = [rows[name][n][i] for n in ("tp", "fp", "fn")]
            assert np.abs(np.subtract(found, wanted)).max() <= 2  # the last bits of weights
        assert rows[name]["iou"] == pytest.approx(rows[name]["iou_0.5"], abs=1e-3)
        assert sum(rows[name]["bin_probabilities"]) == pytest.approx(p[:, k].sum(), rel=1e-4)
        if drawn.any():
            assert 0 < rows[name]["ap"] < 1
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("<svg") == 9
    assert "default-src 'none'; style-src 'unsafe-inline'" in page


def test_an_ontology_brings_phrases_negatives_thresholds_and_gates(tmp_path: Path) -> None:
    maps = np.zeros((2, 3, 4, 4), np.uint8)
    maps[:, 0, :2] = 200
    maps[:, 1, 2] = 150
    maps[:, 2, 0] = 250  # the negative takes the first row
    maps[1] //= 2
    run = write_run(tmp_path / "run", maps, ["a", "b", "n"])
    truth = as_coco(tmp_path, images(0, ["k0", "k1"]), "str")
    (tmp_path / "o.yaml").write_text(
        f"classes:\n  - {{name: {NAMES[0]}, phrases: [a, b], negatives: [n], threshold: 0.3, "
        "presence: 0.6}\n"
    )
    asked = [run, "--ground-truth", truth, "--output", f"{tmp_path}/out"]
    assert evaluate.main([*asked, "--ontology", str(tmp_path / "o.yaml")]) == 0
    row = table(tmp_path / "out")[NAMES[0]]
    assert row["images"] == 2 and row["threshold"] == 0.3
    assert row["tp"][0] + row["fp"][0] < SIZE[0] * SIZE[1]  # of the first image alone
    assert 0 < row["tp"][24] + row["fp"][24] < SIZE[0] * SIZE[1] / 2
    (tmp_path / "o.yaml").write_text("classes: [zebra]")
    assert evaluate.main([*asked, "--ontology", str(tmp_path / "o.yaml")]) == 2
    # Without an ontology each prompt is a class; the truth knows none of these.
    assert evaluate.main(asked) == 2


def test_images_of_another_size_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = images()
    drawn[0][0].update(height=SIZE[1], width=SIZE[0])
    turned = [(k, np.ascontiguousarray(m.T)) for k, m in drawn[0][1]]
    labels = write_labels(f"{tmp_path}/labels", [(drawn[0][0], turned), *drawn[1:]])
    truth = as_coco(tmp_path, images(), "str")
    assert evaluate.main([labels, "--ground-truth", truth]) == 0
    said = capsys.readouterr().out
    assert "1 images have another size or shape than their ground truth" in said
    assert "a/1 (64 x 48 and 48 x 64 px)" in said and said.startswith("3 images of")


def test_other_tables_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = as_coco(tmp_path, images(), "str")
    (tmp_path / "_run.json").write_text('{"fingerprint": {"job": "embed"}}')
    assert evaluate.main([str(tmp_path), "--ground-truth", truth]) == 2
    assert "of the job 'embed'" in capsys.readouterr().err
    labels = write_labels(f"{tmp_path}/labels", images())
    assert evaluate.main([labels, "--ground-truth", truth, "--ontology", truth]) == 2


def test_classes_that_one_side_alone_knows_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_labels(f"{tmp_path}/labels", images())
    file = Path(as_coco(tmp_path, images(), "str"))
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "kitten"
    file.write_text(json.dumps(content))
    assert evaluate.main([labels, "--ground-truth", str(file)]) == 0
    said = capsys.readouterr().out
    assert "without ground truth, not evaluated: 'cat'" in said
    assert "in the ground truth alone: 'kitten'" in said
    small_labels(f"{tmp_path}/others", ["p", "q"])
    assert evaluate.main([f"{tmp_path}/others", "--ground-truth", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no image of" in said and "has ground truth" in said


def test_a_page_of_hostile_names_is_text(tmp_path: Path) -> None:
    names = ["<script>x</script>", '"><img src=x onerror=y>', "\x1b[31m{title}"]
    labels = write_labels(f"{tmp_path}/labels", images(), classes=[(n, None) for n in names])
    rows = [row for image, found in images() for row in annotation_rows(image, found)]
    named = [row | {"class": names[row["class_id"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(named), tmp_path / "t.parquet")
    truth = str(tmp_path / "t.parquet")
    assert evaluate.main([labels, "--ground-truth", truth, "--output", f"{tmp_path}/out"]) == 0
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "<script" not in page and "<img" not in page and "\x1b" not in page
    assert html.escape(names[0]) in page
    assert not re.search(r"https?:|url\(|@import", page)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    def peak(number: int) -> int:
        folder = tmp_path / str(number)
        folder.mkdir()
        mask = np.zeros(SIZE, np.uint8)
        mask[5:20, 5:20] = 1
        many = [(image_row("s.tar", i, f"{i:05}", SIZE), [(i % 3, mask)]) for i in range(number)]
        labels = write_labels(str(folder / "labels"), many)
        truth = open_truth(as_parquet(folder, many, "row", 90))
        predictions = open_predictions(labels, None)
        tracemalloc.start()
        assert count(predictions, truth).images == number
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(240) - peak(80) < 160 * 1_000  # names, and 12 bytes an annotation


def test_evaluating_needs_no_torch_and_no_ray() -> None:
    code = "import sys, jobs.evaluate, jobs.calibrate as c; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_is_drawn(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    run = write_run(tmp_path / "run", smooth(random, 4, 2, 12, 16), NAMES[:2])
    truth = as_coco(tmp_path, images(0, [f"k{i}" for i in range(4)]), "str")
    assert evaluate.main([run, "--ground-truth", truth, "--output", f"{tmp_path}/out"]) == 0
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1400"]
    options += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}"]
    page = tmp_path / "out" / "evaluation.html"
    subprocess.run(["chromium", *options, page.as_uri()], check=True, capture_output=True)
    pixels = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB"))
    assert ((pixels == (0xC4, 0x00, 0x6A)).all(2)).sum() > 500  # the curves


def test_the_commands_of_the_docs_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parent.parent
    text = (root / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (ontology,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.yaml").write_text(ontology)
    for line in commands.strip().splitlines():
        # One of the two shards is enough here.
        command = line.replace("demo/shards", f"demo/shards/{PARQUET_NAME}")
        words = [str(root / w) if w.startswith("pipeline/") else w for w in command.split()]
        if words[0] == "python":
            importlib.import_module(words[2]).main(words[3:])
            continue
        options = ["--local", "--quiet"] if words[1] in ("segment", "label") else ["--quiet"]
        job = importlib.import_module(f"jobs.{words[1]}")
        assert job.main([*words[2:], *options]) == 0, command
    said = capsys.readouterr().out
    assert said.count("32 images of ") == 2
    chosen = parse_ontology(open_yaml(str(tmp_path / "chosen.yaml"))).classes
    assert 0.05 < chosen[1].threshold < 0.9 and "# far too low" in Path("chosen.yaml").read_text()
    rows = table(tmp_path / "evaluation")
    assert rows["red"]["images"] == 32 and rows["red"]["iou"] > 0.7
    assert rows["star"]["iou_best"] > rows["star"]["iou"]
    assert len(rows) == 4 and "in the ground truth alone: 'orange'" in said
