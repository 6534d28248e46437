"""Metrics from histograms against direct counting, and against the reference tools."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.integrate import simpson
from scipy.ndimage import binary_erosion

from pipeline.annotations import metrics
from pipeline.annotations.instance_ap import InstanceAP


def direct(p: np.ndarray, truth: np.ndarray) -> tuple[list[list[int]], dict[str, Any]]:
    """The definitions of CLIPSeg's FixedIntervalMetrics, one threshold after the other."""
    counts: list[list[int]] = []
    for t in np.linspace(0, 1, 51)[1:-1]:
        on = p > np.float32(t)
        pairs = ((on, truth), (on, ~truth), (~on, truth), (~on, ~truth))
        counts.append([int((a & b).sum()) for a, b in pairs])
    with_any = [c for c in counts if c[0] + c[1] > 0]
    points = {(tp / (1 + tp + fn), tp / (1 + tp + fp)) for tp, fp, fn, _ in with_any}
    recall, precision = zip(*sorted(points), strict=True) if points else ((), ())
    return counts, {
        "ap": simpson(precision, x=recall) if points else float("nan"),
        "fg": [tp / (1 + tp + fp + fn) for tp, fp, fn, _ in counts],
        "bin": [
            0.5 * tp / (1 + tp + fp + fn) + 0.5 * tn / (1 + tn + fn + fp)
            for tp, fp, fn, tn in counts
        ],
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.floats(0, 1), st.booleans())
def test_histograms_are_direct_counting(seed: int, n: int, share: float, steps: bool) -> None:
    random = np.random.default_rng(seed)
    p = random.random(n, np.float32)
    if steps:  # on the thresholds themselves, and at the ends
        p = np.float32(random.integers(0, 51, n) / 50)
    truth = random.random(n) < share
    off, on = metrics.count_bins(metrics.find_bins(p), truth)
    found = metrics.count_at_thresholds(off, on)
    counts, wanted = direct(p, truth)
    assert np.stack(found, 1).tolist() == counts
    assert metrics.foreground_iou(found).tolist() == wanted["fg"]
    assert metrics.binary_iou(found) == pytest.approx(wanted["bin"])
    assert metrics.average_precision(found) == pytest.approx(wanted["ap"], nan_ok=True)


def test_thresholds_are_those_of_the_reference() -> None:
    reference = np.linspace(0, 1, 51)[1:-1]
    assert len(metrics.THRESHOLDS) == 49
    assert np.abs(metrics.THRESHOLDS - reference).max() < 1e-15
    assert (metrics.THRESHOLDS.astype(np.float32) == reference.astype(np.float32)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 90))
def test_boundaries_are_what_erosion_takes(seed: int, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    mask = binary_erosion(random.random((height, width)) < 0.995, iterations=2, border_value=1)
    d = max(1, round(0.02 * float(np.hypot(height, width))))
    inner = binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=d)[1:-1, 1:-1]
    assert (metrics.find_boundary(mask) == (mask & ~inner)).all()


def test_the_boundary_of_a_moved_square() -> None:
    """.503, measured with faster-coco-eval's iouType "boundary", where the mask's IoU is .936."""
    one, other = np.zeros((2, 100, 100), bool)
    one[20:80, 20:80] = other[21:81, 21:81] = True
    edges = [metrics.find_boundary(m) for m in (one, other)]
    assert (edges[0] & edges[1]).sum() / (edges[0] | edges[1]).sum() == pytest.approx(
        0.503, abs=5e-4
    )


def test_the_calibration_error_is_of_bins() -> None:
    p = np.float32([0.11, 0.11, 0.11, 0.11, 0.91, 0.91])
    truth = np.array([0, 0, 0, 1, 1, 1], bool)
    bins = metrics.find_bins(p)
    off, on = metrics.count_bins(bins, truth)
    sums = np.bincount(bins, p, minlength=metrics.BINS)
    wanted = (4 * abs(0.25 - 0.11) + 2 * abs(1 - 0.91)) / 6
    assert metrics.calibration_error(off, on, sums) == pytest.approx(wanted)


def squares(random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        mask = np.zeros((40, 50), np.uint8, order="F")
        y, x = random.integers(0, 25, 2)
        mask[y : y + random.integers(3, 15), x : x + random.integers(3, 15)] = 1
        rle = coco.encode(mask)
        rle["counts"] = rle["counts"].decode()
        found.append({"rle": rle, "area": int(mask.sum()), "crowd": bool(random.random() < 0.1)})
    return found


def moved(random: np.random.Generator, each: dict[str, Any]) -> dict[str, Any]:
    mask = np.roll(coco.decode(each["rle"]), random.integers(-1, 2, 2), (0, 1))
    rle = coco.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    # Equal scores are met, too.
    return {"rle": rle, "area": int(mask.sum()), "score": random.integers(1, 12) / 12}


def by_cocoeval(images: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> np.ndarray:
    truth, found = [], []
    for i, (some, drawn) in enumerate(images, 1):
        shared = {"image_id": i, "category_id": 1}
        for each in drawn:
            entry = {"segmentation": each["rle"], "area": each["area"], "id": len(truth) + 1}
            truth.append(entry | shared | {"iscrowd": int(each["crowd"]), "bbox": [0, 0, 1, 1]})
        found += [shared | {"segmentation": e["rle"], "score": e["score"]} for e in some]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        sized = [{"id": i, "height": 40, "width": 50} for i in range(1, len(images) + 1)]
        reference.dataset = {"info": {}, "images": sized, "categories": [{"id": 1}]}
        reference.dataset["annotations"] = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(copy.deepcopy(found)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, 2]  # all areas, 100 detections
    return precision.mean(1)


@pytest.mark.parametrize("seed", range(6))
def test_instances_are_matched_and_counted_as_cocoeval_does(seed: int) -> None:
    random = np.random.default_rng(seed)
    images = []
    for _ in range(8):
        drawn = squares(random, int(random.integers(0, 6)))
        found = [moved(random, each) for each in drawn if random.random() < 0.8]
        extra = [moved(random, each) for each in squares(random, int(random.integers(0, 3)))]
        images.append((found + extra, drawn))
    ours = InstanceAP()
    for found, drawn in images:
        ours.add(found, drawn)
    assert 0 < ours.value().mean() < 1
    assert ours.value() == pytest.approx(by_cocoeval(images), abs=1e-12)


def test_no_more_than_a_hundred_detections_count() -> None:
    random = np.random.default_rng(0)
    drawn = [each | {"crowd": False} for each in squares(random, 1)]
    images = [([moved(random, each) for each in squares(random, 130)], drawn)]
    ours = InstanceAP()
    ours.add(*images[0])
    assert ours.value() == pytest.approx(by_cocoeval(images), abs=1e-12)
    assert np.isnan(InstanceAP().value()).all()
