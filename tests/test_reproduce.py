"""Tiny data sets in the layouts of the paper's, against its definitions counted one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import simpson
from skimage.draw import polygon2mask

from jobs import reproduce
from pipeline.annotations.class_lists import COCO, PASCAL
from pipeline.annotations.episodes import VOID, Episode, open_folds
from pipeline.annotations.polygon_mask import polygon_mask
from pipeline.annotations.predict_episode import Predict, fit_image
from pipeline.annotations.published import Scores
from pipeline.config.reproduce import ReproduceConfig
from pipeline.demo import MODEL
from pipeline.demo.scenes import draw_scene
from pipeline.demo.scenes import phrase as plain_phrase
from pipeline.errors import UsageError
from pipeline.prepare.processor import ImageProcessor

ROOT = Path(__file__).parent.parent


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, and where its first object is."""
    found = draw_scene(np.random.default_rng((7, number)))
    return found.image, found.mask(*found.objects[0])


@pytest.fixture(scope="module")
def phrasecut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phrasecut")
    (folder / "images").mkdir()
    images, tasks = [], []
    for number in range(1, 5):
        pixels, _ = scene(number)
        there = plain_phrase(*draw_scene(np.random.default_rng((7, number))).objects[0])
        height, width = pixels.shape[:2]
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
        split = "val" if number == 3 else "test"
        images.append({"image_id": number, "height": height, "width": width, "split": split})
        for phrase in (there, "blue"):
            square = [[20.0, 30], [90.5, 30], [90.5, 80.25], [20, 80.25]]
            triangle = [[100, 100], [140, 100], [120, 140.0]]
            tasks.append(
                {
                    "task_id": f"{number}__{phrase}",
                    "image_id": number,
                    "instance_boxes": [[20, 30, 70, 50], [100, 100, 40, 40]],
                    "Polygons": [[square], [triangle]],
                    "phrase": phrase,
                    "phrase_structure": {"name": phrase},
                }
            )
    images[3]["width"] += 1  # one of those whose size is wrong
    tasks[1]["instance_boxes"] = [[0, 0, 0, 0]]
    (folder / "image_data_split3000.json").write_text(json.dumps(images))
    (folder / "refer_test.json").write_text(json.dumps(tasks))
    return folder


@pytest.fixture(scope="module")
def pascal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each of the first six classes; the last has too little of it."""
    folder = tmp_path_factory.mktemp("pascal")
    for name in ("JPEGImages", "SegmentationClassAug"):
        (folder / name).mkdir()
    lines = []
    for number in range(12):
        pixels, mask = scene(number)
        pixels = cv2.resize(pixels, (300, 180))
        mask = cv2.resize(mask.astype(np.uint8), (300, 180)) * np.uint8(number // 2 + 1)
        if number == 11:
            mask[:] = 0
            mask[:20, :20] = 6
        mask[:3] = 255
        Image.fromarray(pixels).save(folder / f"JPEGImages/{number:06}.jpg")
        image = Image.fromarray(mask, "P")
        image.putpalette([i // 3 for i in range(768)])
        image.save(folder / f"SegmentationClassAug/{number:06}.png")
        lines.append(f"JPEGImages/{number:06}.jpg SegmentationClassAug/{number:06}.png")
    (folder / "val.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    for name in ("val2014", "annotations/val2014"):
        (folder / name).mkdir(parents=True)
    for number in range(8):
        pixels, mask = scene(number)
        name = f"COCO_val2014_{number:012}"
        Image.fromarray(pixels).save(folder / "val2014" / f"{name}.jpg")
        classes = mask * np.uint8(number % 4 + 1)  # one class of each fold
        Image.fromarray(classes).save(folder / "annotations/val2014" / f"{name}.png")
    return folder


def config_of(data_set: Any, folder: Path, **options: Any) -> ReproduceConfig:
    return ReproduceConfig(
        data_set=data_set, data=str(folder), model=str(MODEL), device="cpu", **options
    )


def by_definition(
    samples: list[tuple[np.ndarray, np.ndarray, int]], threshold: float
) -> dict[str, float]:
    """FixedIntervalMetrics.value (metrics.py), over samples of p, truth and class."""
    thresholds = np.linspace(0, 1, 51)[1:-1]
    counts = []
    for p, g, _ in samples:
        on = [p > np.float32(t) for t in thresholds]
        pairs = [((o & g), (o & ~g), (~o & g), (~o & ~g)) for o in on]
        counts.append([[int(part.sum()) for part in pair] for pair in pairs])
    summed = np.sum(counts, axis=0)  # (T, 4): tp, fp, fn, tn
    tp, fp, fn, tn = summed.T
    used = tp + fp > 0
    precision, recall = (tp / (1 + tp + fp))[used], (tp / (1 + tp + fn))[used]
    points = sorted(set(zip(recall, precision, strict=True)), key=lambda x: x[0])
    i = int(np.abs(thresholds - threshold).argmin())
    ious = []
    for c in {c for *_, c in samples}:
        of = np.sum([n for n, (*_, k) in zip(counts, samples, strict=True) if k == c], axis=0)[i]
        ious.append(of[0] / (1 + of[0] + of[1] + of[2]))
    fg = tp / (1 + tp + fp + fn)
    return {
        "miou": float(np.mean(ious)),
        "fgiou": float(fg[i]),
        "biniou": float((0.5 * fg + 0.5 * tn / (1 + tn + fn + fp))[i]),
        "ap": float(simpson([y for _, y in points], x=[x for x, _ in points]))
        if points
        else np.nan,
    }


@pytest.mark.parametrize("apart", [False, True])
def test_figures_are_those_of_the_definitions(apart: bool) -> None:
    random = np.random.default_rng(0)
    scores, samples = Scores(apart=apart), []
    for number in range(9):
        p = random.random(500, np.float32) ** 2
        truth = random.random(500) < p
        samples.append((p, truth, number if apart else number % 3))
        scores.add(*samples[-1])
    for threshold in (0.1, 0.3, 0.5):
        assert scores.value(threshold) == pytest.approx(by_definition(samples, threshold))


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_polygons_are_filled_as_by_skimage(digits: int) -> None:
    random, others, pixels = np.random.default_rng(1), 0, 0
    for _ in range(60):
        points = random.uniform(-5, 45, (random.integers(3, 12), 2)).round(digits)
        theirs = polygon2mask((30, 40), points[:, ::-1])
        others += (polygon_mask(points, (30, 40)) != theirs).sum()
        pixels += theirs.sum()
    assert others <= 0.0005 * pixels  # centres on an edge, by the last bit


def test_images_come_to_the_size_of_the_model_as_in_each_code() -> None:
    processor = ImageProcessor.from_folder(MODEL)
    side = processor.image_size[0]
    random = np.random.default_rng(0)
    pixels = cv2.GaussianBlur(random.integers(0, 256, (300, 431, 3)).astype(np.uint8), (0, 0), 3)
    image = Image.fromarray(pixels)

    def restored(fit: str) -> np.ndarray:
        x = fit_image(image, fit, processor)[0].permute(1, 2, 0).numpy()
        return 255 * (x * np.array(processor.image_std) + np.array(processor.image_mean))

    new = (side, int(300 * side / 431) // 8 * 8)  # PFENet's test_Resize
    padded = np.zeros((side, side, 3))
    padded[: new[1], : new[0]] = cv2.resize(pixels.astype(np.float32), new)
    assert np.abs(restored("pad") - padded).max() < 0.01
    by_pillow = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    assert np.abs(restored("resize") - by_pillow).max() < 1e-3
    corners = restored("stretch")[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.abs(corners - pixels[[0, 0, -1, -1], [0, -1, 0, -1]]).max() < 1e-3
    small = Image.fromarray(pixels[:50, :60])
    x = fit_image(small, "pad", processor)
    assert x.shape[2:] == (side, side)
    assert torch.equal(x[..., :50, :60], fit_image(small, "none", processor))


# ---- the layouts


def samples_of(config: ReproduceConfig) -> list[Episode]:
    side = ImageProcessor.from_folder(MODEL).image_size[0]
    return [episode for fold in open_folds(config, side) for episode in fold.episodes()]


def test_phrases_are_those_of_the_test_split(phrasecut: Path) -> None:
    found = samples_of(config_of("phrasecut", phrasecut))
    assert len(found) == 3  # one has no area, two are of an image of another size
    assert found[2].text == "blue" and found[0].text != "blue"
    height, width = found[0].image.height, found[0].image.width
    square = [[30, 20], [30, 90.5], [80.25, 90.5], [80.25, 20]]
    wanted = polygon2mask((height, width), square)
    wanted |= polygon2mask((height, width), [[100, 100], [100, 140], [140, 120]])
    grown = torch.nn.functional.interpolate(
        torch.from_numpy(wanted[None, None]).float(), found[0].truth.shape, mode="nearest"
    )
    assert (found[0].truth == grown[0, 0].numpy()).all()


def test_folds_of_pascal_have_their_classes(pascal: Path) -> None:
    found = samples_of(config_of("pascal-5i", pascal, folds=(0,)))
    assert [e.of_class for e in found] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for episode in found:
        assert episode.text == f"a photo of a {PASCAL[episode.of_class - 1]}."
        assert episode.truth.shape == (300, 300)
        assert set(np.unique(episode.truth[:180])) == {0, 1, VOID}
        assert (episode.truth[180:] == VOID).all() and (episode.truth[:3] == VOID).all()
        assert episode.example is not None
        shown, where = episode.example
        assert where.any() and shown.tobytes() != episode.image.tobytes()
    again = samples_of(config_of("pascal-5i", pascal, folds=(0,)))
    assert [e.example[0].tobytes() for e in again] == [e.example[0].tobytes() for e in found]  # type: ignore[index]
    (one,) = samples_of(config_of("pascal-5i", pascal, folds=(1,), prompt="text"))
    assert one.of_class == 6 and one.example is None  # the other image has too little of it


def test_folds_of_coco_have_their_classes(coco: Path) -> None:
    found = samples_of(config_of("coco-20i", coco, folds=(2,), limit=5))
    assert len(found) == 5 and {e.of_class for e in found} == {2} and found[0].text == COCO[2]
    assert all(e.truth.shape == (160, 160) and e.truth.any() for e in found)
    assert COCO[0] == "person" and COCO[79] == "toothbrush" and len(COCO) == 80


@pytest.mark.parametrize(
    ("data_set", "options"),
    [
        ("phrasecut", {}),
        ("pascal-5i", {"folds": (0,), "limit": 3}),
        ("pascal-5i", {"folds": (0, 1), "prompt": "text", "limit": 2}),
        ("coco-20i", {"folds": (0, 3), "limit": 2}),
    ],
)
def test_the_whole_is_what_its_parts_are(
    data_set: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(data_set.partition("-")[0])
    config = config_of(data_set, folder, **options)
    found, folds, samples = reproduce.measure(config)
    predict = Predict(str(MODEL), "cpu")
    threshold = 0.1 if data_set == "coco-20i" else 0.3
    by_hand = []
    for fold in open_folds(config, predict.side):
        counted = []
        for episode in fold.episodes():
            p, known = predict(episode), episode.truth != VOID
            counted.append((p[known], episode.truth[known] == 1, episode.of_class))
        by_hand.append(by_definition(counted, threshold))
    assert samples >= len(folds) == len(by_hand)
    assert found["biniou"] > 0.1
    assert found == pytest.approx({n: np.mean([f[n] for f in by_hand]) for n in found}, nan_ok=True)


def test_published_figures_stand_beside(
    phrasecut: Path, pascal: Path, coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of docs/reproduce.md, and the figures of its table."""
    text = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    places = {"VGPhraseCut_v0": phrasecut, "VOC2012": pascal, "COCO-20i": coco}
    for line in commands.strip().splitlines():
        words = [str(places.get(w, w)) for w in line.split()[2:]]
        words[words.index("--model") + 1] = str(MODEL)
        words = [*words[: words.index("--limit")], "--limit", "2"] if "--limit" in words else words
        fold = [] if "phrasecut" in words else ["--folds", "0"]
        assert reproduce.main([*words, *fold, "--device", "cpu", "--quiet"]) == 0, line
        said = capsys.readouterr().out
        (row,) = [each for each in text.splitlines() if each.startswith(f"| {words[0]} |")]
        figures = re.findall(r"^  (?:mIoU|IoU_\w+|AP)\D.*?\d+\.\d\s+(\d+\.\d)$", said, re.MULTILINE)
        assert len(figures) == 3 and all(figure in row for figure in figures), said
    assert "not measured here" in text


def test_mistakes_are_one_line(
    phrasecut: Path, pascal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "image_data_split3000.json").write_text("{")
    (tmp_path / "masks" / "annotations" / "val2014").mkdir(parents=True)
    (tmp_path / "masks" / "annotations" / "val2014" / "a.png").write_bytes(b"no")
    for words, says in (
        (["phrasecut", "--data", f"{tmp_path}/none"], "no such folder"),
        (["phrasecut", "--data", f"{tmp_path}"], "image_data_split3000.json: cannot be read"),
        (["phrasecut", "--data", f"{tmp_path}/bad"], "not valid JSON"),
        (["phrasecut", "--data", f"{phrasecut}", "--prompt", "image"], "phrases alone"),
        (["pascal-5i", "--data", f"{tmp_path}"], "has neither val.txt nor"),
        (["pascal-5i", "--data", f"{pascal}", "--folds", "4"], "must be among 0 1 2 3"),
        (["pascal-5i", "--data", f"{pascal}", "--folds", "3"], "fold 3: no sample of it"),
        (["pascal-5i", "--data", f"{pascal}", "--folds", "1"], "no second image of"),
        (["coco-20i", "--data", f"{tmp_path}"], "no .png in it"),
        (["coco-20i", "--data", f"{tmp_path}/masks"], "a.png: cannot be read"),
    ):
        assert reproduce.main([*words, "--model", str(MODEL), "--quiet"]) == 2, words
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1, said


@pytest.mark.parametrize("polygons", [3, [3], [[3]], [[["a", "b"]]], [[[1, 2, 3]]]])
def test_polygons_that_are_none_are_one_line(
    polygons: Any, phrasecut: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").symlink_to(phrasecut / "images")
    images = (phrasecut / "image_data_split3000.json").read_text()
    (tmp_path / "image_data_split3000.json").write_text(images)
    tasks = json.loads((phrasecut / "refer_test.json").read_text())[:1]
    tasks[0]["Polygons"] = polygons
    (tmp_path / "refer_test.json").write_text(json.dumps(tasks))
    with pytest.raises(UsageError, match=r"task 1__.*: Polygons that are no lists"):
        samples_of(config_of("phrasecut", tmp_path))
