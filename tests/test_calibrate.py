"""Chosen thresholds and gates against a search by hand, the file they are written to, the gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_tables import image_row

from jobs import calibrate
from pipeline.annotations.calibrate import (
    GATES,
    NEAR,
    Calibration,
    describe_gains,
    is_chosen_on,
)
from pipeline.annotations.metrics import THRESHOLDS
from pipeline.annotations.predicted import Found
from pipeline.config.ontology import OntologyClass, parse_ontology
from pipeline.config.ontology_edit import edit_ontology
from pipeline.config.yaml_file import parse_yaml
from pipeline.demo.calibrate import NAMES as DEMO_NAMES
from pipeline.demo.calibrate import measure
from tests.kept_maps import NAMES, SIZE, as_coco, smooth, write_run

Sample = tuple[np.ndarray, np.ndarray]
"""Probabilities and truth, (N, K, W, H)."""


def draw(random: np.random.Generator, images: int, classes: int) -> Sample:
    """Truth is where the probability was above .3, in half of the images; noise elsewhere."""
    p = smooth(random, images, classes, 9, 7) / np.float32(255)
    truth = (p > 0.3) & (random.random((images, classes, 1, 1)) < 0.5)
    p[~truth.any((2, 3))] *= 0.7
    return p, truth


def count(sample: Sample, classes: list[OntologyClass], halves: np.ndarray) -> Calibration:
    found = Calibration(classes)
    for p, truth, half in zip(*sample, halves, strict=True):
        found.add(
            bool(half),
            lambda k, p=p: Found(  # type: ignore[misc]
                probability=p[k], inside=p[k] > classes[k].threshold, presence=float(p[k].max())
            ),
            lambda k, truth=truth: truth[k],  # type: ignore[misc]
        )
    return found


def measure_by_hand(sample: Sample, k: int, threshold: float, gate: float) -> tuple[float, float]:
    """IoU over all pixels, and the share of images in which an absent class is found."""
    p, truth = (a[:, k] for a in sample)
    on = (p > np.float32(threshold)) & (p.max((1, 2)).astype(float) >= gate)[:, None, None]
    absent = ~truth.any((1, 2))
    iou = (on & truth).sum() / (1 + (on | truth).sum())
    return float(iou), float(on[absent].any((1, 2)).sum() / max(1, absent.sum()))


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    random = np.random.default_rng(seed)
    sample = draw(random, 20, 2)
    classes = [OntologyClass(name="a", threshold=0.9), OntologyClass(name="b", presence=0.99)]
    counted = count(sample, classes, np.ones(20))
    for k, choice in enumerate(counted.choose()):
        grid = {
            (t, g): measure_by_hand(sample, k, t, g)
            for t in THRESHOLDS.tolist()
            for g in GATES.tolist()
        }
        best = max(iou for iou, _ in grid.values())
        near = {pair: found for pair, found in grid.items() if found[0] >= best - NEAR}
        fewest = min(false for _, false in near.values())
        iou, false = grid[choice.threshold, choice.presence]
        assert iou == pytest.approx(choice.iou) and iou >= best - NEAR
        assert false == fewest
        assert iou == max(i for i, f in near.values() if f == fewest)


def test_the_gain_is_of_the_other_half_alone() -> None:
    random = np.random.default_rng(5)
    sample = draw(random, 40, 2)
    classes = [OntologyClass(name="a", threshold=0.8), OntologyClass(name="b", threshold=0.1)]
    halves = np.arange(40) < 20
    counted = count(sample, classes, halves)
    assert (counted.chosen_on, counted.held_out) == (20, 20)
    choices = counted.choose()
    held = (sample[0][20:], sample[1][20:])
    gains = counted.gains(choices)
    settings = [
        [(0.5, 0.0)] * 2,
        [(c.threshold, c.presence) for c in classes],
        [(c.threshold, c.presence) for c in choices],
    ]
    by_hand = [[measure_by_hand(held, k, *s[k])[0] for k in range(2)] for s in settings]
    assert gains["mean IoU"].values == pytest.approx(np.mean(by_hand, 1), abs=1e-6)
    gain = gains["mean IoU"]
    assert gain.low[0] < gain.values[2] - gain.values[0] < gain.high[0]
    assert gain.low[2] == gain.high[2] == 0
    assert counted.gains(choices) == gains  # no chance in it
    first, second = describe_gains(gains)
    assert first.startswith("mean IoU: 0.5 everywhere ") and "95 %" in first
    assert second.startswith("found where absent: ")


def test_a_class_that_is_nowhere_keeps_what_it_has() -> None:
    p = np.full((6, 1, 5, 5), 0.6, np.float32)
    classes = [OntologyClass(name="a", threshold=0.55, presence=0.2)]
    counted = count((p, np.zeros(p.shape, bool)), classes, np.arange(6) % 2)
    (choice,) = counted.choose()
    assert (choice.threshold, choice.presence, choice.images) == (0.55, 0.2, 0)
    assert counted.gains([choice])["found where absent"].values == (1.0, 1.0, 1.0)


def test_halves_do_not_depend_on_the_order_and_are_even() -> None:
    chosen = [is_chosen_on("s.tar", f"k{i}") for i in range(2000)]
    assert 900 < sum(chosen) < 1100
    assert chosen[7] == is_chosen_on("s.tar", "k7")


# ---- the file

FILES = {
    "block": """\
# my classes
overlap: multilabel
classes:
  - name: star   # the best
    phrases: [star, sun]
    threshold: 0.5  # a guess
  # next
  - name: "moon, half"
    min_area: 3
  - phrases: [disc]
    name: round
    presence: 0.25
""",
    "flow": "classes: [{name: star, threshold: 0.9}, {phrases: [m], name: 'moon, half'}, round]\n",
    "text": "classes:\n- star  # short\n- moon, half\n-   round",
    "json": '{"classes": [{"name": "star"}, {"name": "moon, half", "presence": 0.1}, "round"]}',
    "windows": "classes:\r\n  - name: star\r\n    priority: 1\r\n  - moon, half\r\n  - round\r\n",
}
CHANGES = {
    "star": {"threshold": 0.34, "presence": 0.6},
    "moon, half": {"threshold": 0.02, "presence": 0.0},
}


@pytest.mark.parametrize("form", FILES)
def test_the_file_says_what_was_chosen_and_keeps_the_rest(form: str) -> None:
    text = FILES[form]
    suffix = "json" if form == "json" else "yaml"
    out = edit_ontology(text.encode(), f"in.{suffix}", f"out.{suffix}", CHANGES, ["why", "a\nb"])
    before, after = (parse_ontology(parse_yaml(t.encode(), "x")).classes for t in (text, out))
    for old, new in zip(before, after, strict=True):
        wanted = CHANGES.get(old.name, {"threshold": old.threshold, "presence": old.presence})
        assert {n: getattr(new, n) for n in wanted} == wanted
        assert (old.name, old.phrases, old.min_area) == (new.name, new.phrases, new.min_area)
    assert out.startswith("# why\n# a\N{REPLACEMENT CHARACTER}b\n") == (form != "json")
    for comment in ("# my classes", "# the best", "# a guess", "# next", "# short"):
        assert (comment in out) == (comment in text)
    if form == "json":
        import json

        assert json.loads(out)["classes"][0]["threshold"] == 0.34


def test_relative_paths_still_lead_to_their_files(tmp_path: Path) -> None:
    text = "# lost\nclasses:\n  - name: star\n    image_prompts: [{file: a.png}]\n"
    file = str(tmp_path / "in" / "o.yaml")
    changes = {"star": {"threshold": 0.3}}
    same = edit_ontology(text.encode(), file, str(tmp_path / "in" / "new.yaml"), changes, [])
    assert "# lost" in same and "file: a.png" in same
    other = edit_ontology(text.encode(), file, str(tmp_path / "new.yaml"), changes, [])
    assert f'"{tmp_path}/in/a.png"' in other and "threshold: 0.3" in other


# ---- the job


def truth_of_maps(folder: Path, maps: np.ndarray) -> str:
    """Truth where a map is above a third, in two of three images."""
    drawn: list[tuple[dict[str, Any], list[tuple[int, np.ndarray]]]] = []
    for i, of_image in enumerate(maps):
        found = []
        for k, one in enumerate(of_image):
            big = np.kron(one, np.ones((4, 4), np.uint8)) > 85
            if (i + k) % 3 and big.any():
                found.append((k, big.astype(np.uint8)))
        drawn.append((image_row("s.tar", i, f"k{i}", SIZE), found))
    return as_coco(folder, drawn, "str")


def test_a_badly_set_ontology_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = smooth(np.random.default_rng(1), 40, 2, 12, 16)
    for i in range(40):
        for k in range(2):
            if (i + k) % 3 == 0:
                maps[i, k] = maps[i, k] * 0.6
    run = write_run(tmp_path / "run", maps, NAMES[:2])
    truth = truth_of_maps(tmp_path, maps)
    file, out = tmp_path / "in.yaml", tmp_path / "out.yaml"
    file.write_text(
        f"# mine\nclasses:\n  - name: {NAMES[0]}\n    threshold: 0.95\n  - {NAMES[1]}\n"
    )
    asked = [run, "--ground-truth", truth, "--ontology", str(file), "--output", str(out)]
    assert calibrate.main(asked) == 0
    said = capsys.readouterr().out
    text = out.read_text()
    assert "# mine" in text and "# thresholds and presence gates chosen by" in text
    chosen = parse_ontology(parse_yaml(text.encode(), "x")).classes
    assert [0.25 < c.threshold < 0.45 for c in chosen] == [True, True]
    assert "0.5 everywhere" in said and f"threshold 0.95 -> {chosen[0].threshold:g}" in said
    assert "change from 0.5 +" in said
    assert calibrate.main(asked) == 2  # the file is there
    assert "exists already" in capsys.readouterr().err
    assert calibrate.main([*asked[:-1], str(file)]) == 2
    # Nothing to hold the choice against.
    one = as_coco(tmp_path, [(image_row("s.tar", 0, "k0", SIZE), [])], "str")
    asked[2], asked[-1] = one, str(tmp_path / "new.yaml")
    assert calibrate.main(asked) == 2
    assert "a few dozen" in capsys.readouterr().err


def test_the_model_card_is_measured_on_scenes() -> None:
    counted = measure(3)
    assert counted.chosen_on + counted.held_out == 3
    assert len(counted.choose()) == len(DEMO_NAMES)
    assert counted.gains(counted.choose())["mean IoU"].values[2] > 0.3
