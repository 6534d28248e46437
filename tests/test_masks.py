"""Masks equal the plain recipe (resize the logits, sigmoid, threshold), pixel for pixel."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mask_rows import masks_of
from pycocotools import mask as coco

from pipeline import schema
from pipeline.errors import RowError
from pipeline.infer.masks import (
    mask_from_logits,
    mask_from_probabilities,
    probability_map,
)

# pycocotools 2.0.11 decodes with an __array__ of numpy 1's form.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def smooth_logits(
    grid: tuple[int, int], *, prompts: int = 1, scale: float = 4.0, shift: float = -1.0, seed: int
) -> torch.Tensor:
    """(P, h, w) float32: a few hills, as a decoder gives them."""
    generator = torch.Generator().manual_seed(seed)
    hills = torch.randn(prompts, 1, 6, 7, generator=generator) * scale + shift
    return F.interpolate(hills, size=grid, mode="bicubic", align_corners=False)[:, 0].contiguous()


def plain_probabilities(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """The reference: (H, W) float32."""
    resized = F.interpolate(logits[None, None], size=size, mode="bilinear", align_corners=False)
    return torch.sigmoid(resized[0, 0]).numpy()


def assert_same_but_for_ties(mask: np.ndarray, probability: np.ndarray, threshold: float) -> None:
    wrong = mask.astype(bool) != (probability > threshold)
    distance = np.abs(probability.astype(np.float64) - threshold)[wrong]
    assert not (distance >= 1e-6).any(), f"{wrong.sum()} wrong, up to {distance.max()} from a tie"


sizes = st.tuples(st.integers(1, 150), st.integers(1, 150))
thresholds = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(grid=sizes, size=sizes, threshold=thresholds, seed=st.integers(0, 99))
@example(grid=(1, 1), size=(1, 1), threshold=0.5, seed=0)
@example(grid=(352, 352), size=(480, 640), threshold=0.5, seed=1)
@example(grid=(352, 352), size=(1080, 1920), threshold=0.3, seed=2)
@example(grid=(352, 352), size=(704, 176), threshold=0.1, seed=3)
@example(grid=(352, 480), size=(37, 1001), threshold=0.5, seed=4)
@example(grid=(352, 352), size=(352, 352), threshold=0.5, seed=5)
@example(grid=(2, 2), size=(3000, 3), threshold=0.5, seed=6)
def test_masks_equal_the_plain_recipe(
    grid: tuple[int, int], size: tuple[int, int], threshold: float, seed: int
) -> None:
    logits = smooth_logits(grid, seed=seed)
    probability = plain_probabilities(logits[0], size)
    mask = mask_from_logits(logits[0], size, threshold)
    assert (mask.shape, mask.dtype) == (size, np.uint8)
    if 0 < threshold < 1:
        assert_same_but_for_ties(mask, probability, threshold)
    else:
        assert mask.all() if threshold == 0 else not mask.any()
    row = masks_of(logits, size=size, threshold=threshold)[0]
    assert row["rle"]["size"] == list(size)
    assert np.array_equal(coco.decode(row["rle"]), mask)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rough_logits_too(data: st.DataObject) -> None:
    grid, size = data.draw(sizes), data.draw(sizes)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    logits = torch.from_numpy(rng.normal(-3, 3, grid).astype(np.float32))
    threshold = data.draw(st.sampled_from([0.2, 0.5, 0.95]))
    mask = mask_from_logits(logits, size, threshold)
    assert_same_but_for_ties(mask, plain_probabilities(logits, size), threshold)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9999), st.sampled_from([0.05, 0.9]))
def test_rle_is_the_one_pycocotools_makes(height: int, width: int, seed: int, share: float) -> None:
    pixels = np.random.default_rng(seed).random((height, width)) < share
    logits = np.where(pixels, 5, -5).astype(np.float32)
    row = masks_of(logits[None], size=(9, 9), threshold=0.5, mask_size="model")[0]
    assert np.array_equal(mask_from_logits(logits, None, 0.5), pixels)
    expected = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    assert row["rle"] == {"size": [height, width], "counts": expected["counts"].decode()}
    assert row["area"] == pixels.sum() == coco.area(expected)
    assert row["bbox"] == coco.toBbox(expected).tolist()


def test_scores_boxes_and_areas_of_every_prompt_in_order() -> None:
    logits = smooth_logits((96, 128), prompts=5, seed=7)
    logits[3] -= 100
    rows = masks_of(logits.numpy(), size=(240, 333), threshold=0.4)
    assert len(rows) == 5
    for grid, row in zip(logits, rows, strict=True):
        probability = plain_probabilities(grid, (240, 333))
        inside = probability > 0.4
        assert row["area"] == inside.sum()
        assert row["score_max"] == pytest.approx(float(torch.sigmoid(grid.max())))
        # The image lies between the cells of the grid, so its own maximum is never above.
        assert probability.max() <= row["score_max"] + 1e-6
        if inside.any():
            ys, xs = np.nonzero(inside)
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert row["bbox"] == [float(side) for side in box]
            assert row["score_mean"] == pytest.approx(probability[inside].mean(), rel=1e-4)
    empty = rows[3]
    assert (empty["area"], empty["bbox"], empty["score_mean"]) == (0, [0.0] * 4, None)
    assert empty["rle"]["size"] == [240, 333]
    assert not coco.decode(empty["rle"]).any()
    assert 0 <= empty["score_max"] < 1e-6


def test_a_grid_above_the_threshold_may_still_give_an_empty_mask() -> None:
    # One hot cell on the grid, which a much smaller image steps over.
    logits = np.full((1, 90, 90), -9, np.float32)
    logits[0, 1, 1] = 9
    row = masks_of(logits, size=(3, 3), threshold=0.5)[0]
    assert (row["area"], row["score_mean"]) == (0, None)
    assert row["score_max"] > 0.99


def test_masks_at_the_model_size() -> None:
    logits = smooth_logits((40, 64), prompts=2, seed=3)
    rows = masks_of(logits, size=(500, 375), threshold=0.5, mask_size="model")
    for grid, row in zip(logits, rows, strict=True):
        assert row["rle"]["size"] == [40, 64]
        assert np.array_equal(coco.decode(row["rle"]), (grid > 0).numpy())


def test_rows_fit_the_table_of_masks_and_json() -> None:
    rows = masks_of(smooth_logits((32, 32), prompts=3, seed=1), size=(50, 60), threshold=0.5)
    fields = [schema.MASKS.field(name) for name in rows[0]]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    assert table.column("rle").to_pylist() == [row["rle"] for row in rows]
    assert json.loads(json.dumps(rows)) == rows


def test_no_prompts_no_masks() -> None:
    assert masks_of(np.zeros((0, 8, 8), np.float32), size=(5, 5), threshold=0.5) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_the_row(bad: float) -> None:
    logits = np.zeros((2, 8, 8), np.float32)
    logits[1, 3, 3] = bad
    with pytest.raises(RowError) as caught:
        masks_of(logits, size=(5, 5), threshold=0.5)
    assert (caught.value.stage, caught.value.reason) == ("segment", "model_failed")


# ---- kept probabilities ----


def test_the_full_map_is_the_rounded_probability() -> None:
    logits = smooth_logits((352, 352), seed=5)[0]
    kept = probability_map(logits, 352)
    assert (kept.shape, kept.dtype) == ((352, 352), np.uint8)
    assert np.array_equal(kept, np.rint(torch.sigmoid(logits).numpy() * np.float32(255)))


@pytest.mark.parametrize(
    ("grid", "side", "kept"),
    [
        ((352, 352), 176, (176, 176)),
        ((352, 352), 88, (88, 88)),
        ((160, 160), 176, (160, 160)),
        ((160, 160), 88, (88, 88)),
        ((352, 480), 88, (65, 88)),
        ((480, 1), 88, (88, 1)),
    ],
)
def test_maps_are_never_finer_than_the_grid(
    grid: tuple[int, int], side: int, kept: tuple[int, int]
) -> None:
    assert probability_map(smooth_logits(grid, seed=1)[0], side).shape == kept


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


@pytest.mark.parametrize(("side", "least"), [(352, 0.995), (176, 0.985), (88, 0.95)])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8])
def test_kept_probabilities_give_nearly_the_direct_mask(
    side: int, least: float, threshold: float
) -> None:
    agreement = []
    for logits in smooth_logits((352, 352), prompts=4, seed=side):
        direct = mask_from_logits(logits, (480, 640), threshold)
        kept = mask_from_probabilities(probability_map(logits, side), (480, 640), threshold)
        assert kept.shape == (480, 640)
        agreement.append(iou(direct, kept))
    assert np.mean(agreement) > least


def test_kept_probabilities_at_the_ends_of_the_scale() -> None:
    ends = np.array([[0, 255], [255, 0]], np.uint8)
    assert np.array_equal(mask_from_probabilities(ends, None, 0.5), ends > 0)
    values: dict[float, Any] = {0.0: 1, 0.999: 0, 1.0: 0}
    for threshold, expected in values.items():
        assert (mask_from_probabilities(ends, (4, 4), threshold) == expected).all()
