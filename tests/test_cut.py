"""Annotations cut from kept maps, against the plain recipe on the whole image at once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from skimage.measure import label as skimage_label
from skimage.morphology import remove_small_holes

from pipeline import schema
from pipeline.annotations.cut import ask, cut_image, fill_holes, label_parts, split_runs
from pipeline.config.ontology import OVERLAPS, Ontology, OntologyClass
from pipeline.infer.masks import mask_from_probabilities

# pycocotools 2.0.11 decodes with an __array__ of numpy 1's form.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PHRASES = ("a", "b", "c", "d", "e")
IDS = {name: i for i, name in enumerate(PHRASES)}


def hills(count: int, grid: tuple[int, int], seed: int, scale: float = 4) -> dict[int, np.ndarray]:
    """Smooth maps, uint8 (h, w), by prompt_id."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 6, 7, generator=generator) * scale - 1
    smooth = F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)[:, 0]
    return dict(enumerate(torch.round(torch.sigmoid(smooth) * 255).to(torch.uint8).numpy()))


def logits_of(kept: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float64, interpolated by torch."""
    values = torch.logit(torch.from_numpy(kept).double().clamp(0.5, 254.5) / 255)
    return F.interpolate(values[None, None], size=size, mode="bilinear")[0, 0].numpy()


def plain_recipe(
    maps: dict[int, np.ndarray], size: tuple[int, int], ontology: Ontology
) -> dict[int, np.ndarray]:
    """By class_id, its (H, W) bool: every pixel of every class at once."""
    passing = np.full((len(ontology.classes), *size), -np.inf)
    for i, each in enumerate(ontology.classes):
        own = np.max([logits_of(maps[IDS[p]], size) for p in each.phrases], axis=0)
        inside = 1 / (1 + np.exp(-own)) > each.threshold
        for negative in each.negatives:
            inside &= own > logits_of(maps[IDS[negative]], size)
        if max(maps[IDS[p]].max() for p in each.phrases) / 255 >= each.presence:
            passing[i][inside] = own[inside]
    found = passing > -np.inf
    if ontology.overlap != "multilabel":
        by_priority = ontology.overlap == "priority"
        ranks = [c.priority if by_priority else 0 for c in ontology.classes]
        ranked = np.where(found, np.array(ranks)[:, None, None], -(10**6))
        best = found & (ranked == ranked.max(0))
        winner = np.where(best, passing, -np.inf).argmax(0)
        found = found & (winner == np.arange(len(found))[:, None, None])
    background = ~found.any(0)
    out = {}
    for i, each in enumerate(ontology.classes):
        mask = found[i]
        if each.fill_holes and mask.any():
            filled = holes_filled(mask, each.fill_holes)
            mask = mask | (filled if ontology.overlap == "multilabel" else filled & background)
        out[i] = mask
    return out


def holes_filled(mask: np.ndarray, largest: int) -> np.ndarray:
    """The mask and its holes of at most so many pixels; an edge opens a hole."""
    outside = skimage_label(np.pad(~mask, 1, constant_values=True), connectivity=1)
    closed = ~(outside == outside[0, 0])[1:-1, 1:-1]  # the mask and all its holes
    return remove_small_holes(mask | ~closed, max_size=largest, connectivity=1) & closed


def decode(row: dict[str, Any]) -> np.ndarray:
    return coco.decode(row["rle"]).astype(bool)


def random_ontology(data: st.DataObject) -> Ontology:
    classes = []
    for i, phrases in enumerate([("a", "b"), ("c",), ("d",)]):
        others = [p for p in PHRASES if p not in phrases]
        classes.append(
            OntologyClass(
                name=f"class {i}",
                phrases=phrases,
                negatives=tuple(data.draw(st.lists(st.sampled_from(others), max_size=1))),
                threshold=data.draw(st.sampled_from([0.21, 0.35, 0.5, 0.79])),
                presence=data.draw(st.sampled_from([0, 0.9])),
                fill_holes=data.draw(st.sampled_from([0, 20, 10**6])),
                min_area=data.draw(st.sampled_from([1, 30])),
                priority=data.draw(st.integers(0, 1)),
            )
        )
    return Ontology(
        classes=tuple(classes),
        overlap=data.draw(st.sampled_from(OVERLAPS)),  # type: ignore[arg-type]
        instances=data.draw(st.booleans()),
    )


sides = st.integers(1, 60)


@settings(max_examples=120, deadline=None)
@given(st.data(), st.tuples(sides, sides), st.tuples(sides, sides), st.integers(0, 999))
def test_annotations_are_those_of_the_plain_recipe(
    data: st.DataObject, grid: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    ontology, maps = random_ontology(data), hills(5, grid, seed)
    rows = cut_image(maps, size, ask(ontology, IDS), ontology)
    assert [row["instance"] for row in rows] == list(range(len(rows)))
    expected = plain_recipe(maps, size, ontology)
    for i, each in enumerate(ontology.classes):
        of_class = [row for row in rows if row["class_id"] == i]
        labels, parts = skimage_label(expected[i], connectivity=2, return_num=True)
        if not ontology.instances:
            labels, parts = expected[i].astype(int), int(expected[i].any())
        wanted = [labels == k for k in range(1, parts + 1)]
        wanted = [mask for mask in wanted if mask.sum() >= each.min_area]
        counts = {
            coco.encode(np.asfortranarray(m.astype(np.uint8)))["counts"].decode() for m in wanted
        }
        assert {row["rle"]["counts"] for row in of_class} == counts
        assert len(of_class) == len(wanted)
        for row in of_class:
            check_facts(row, each, maps, size)


def check_facts(
    row: dict[str, Any], each: OntologyClass, maps: dict[int, np.ndarray], size: tuple[int, int]
) -> None:
    mask = decode(row)
    logits = np.stack([logits_of(maps[IDS[p]], size) for p in each.phrases])
    assert row["score"] == pytest.approx((1 / (1 + np.exp(-logits.max(0))))[mask].mean(), abs=1e-5)
    assert row["presence"] == max(maps[IDS[p]].max() for p in each.phrases) / 255
    wins = np.bincount(logits.argmax(0)[mask], minlength=len(each.phrases))
    assert wins[each.phrases.index(PHRASES[row["prompt_id"]])] >= wins.max() - 2  # but for ties
    ys, xs = np.nonzero(mask)
    assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    assert (row["area"], row["height"], row["width"]) == (mask.sum(), *size)
    assert (row["class"], row["threshold"]) == (each.name, each.threshold)


@settings(max_examples=60, deadline=None)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.integers(0, 99))
def test_one_phrase_is_the_mask_of_its_map(
    grid: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    ontology = Ontology(classes=(OntologyClass(name="a", phrases=("a",)),), instances=False)
    maps = hills(1, grid, seed)
    rows = cut_image(maps, size, ask(ontology, IDS), ontology)
    expected = mask_from_probabilities(maps[0], size, 0.5)
    found = decode(rows[0]) if rows else np.zeros(size, bool)
    wrong = found != expected.astype(bool)
    assert not (np.abs(logits_of(maps[0], size)[wrong]) > 1e-5).any()


def test_thresholds_at_the_ends() -> None:
    for threshold, area in ((0.0, 63), (1.0, 0)):
        each = OntologyClass(name="a", phrases=("a",), threshold=threshold)
        ontology = Ontology(classes=(each,))
        maps = {0: np.array([[0, 255]], np.uint8)}
        rows = cut_image(maps, (7, 9), ask(ontology, IDS), ontology)
        assert sum(row["area"] for row in rows) == area


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9999), st.sampled_from([0.2, 0.6, 1]))
def test_runs_of_a_label_image_are_what_pycocotools_encodes(
    height: int, width: int, seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((height, width)) < share, rng.integers(1, 4, (height, width)), 0)
    top, left = rng.integers(0, height), rng.integers(0, width)
    labels[:top], labels[:, :left] = 0, 0
    window = np.ascontiguousarray(labels[top:, left:].T.astype(np.int32))
    found = split_runs(window, (height, width), (int(left), int(top)))
    expected = {
        int(k): coco.encode(np.asfortranarray((labels == k).astype(np.uint8)))
        for k in np.unique(labels)
        if k
    }
    assert found == expected


def test_parts_touch_at_corners_and_holes_do_not() -> None:
    mask = np.array([[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0]], bool)
    assert label_parts(mask).max() == 1
    assert fill_holes(mask, 1, None).sum() == mask.sum() + 1
    assert fill_holes(mask, 0, None).sum() == mask.sum()
    assert fill_holes(mask, 9, np.zeros_like(mask)).sum() == mask.sum()
    open_ring = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1]], bool)  # the edge cuts it: no hole
    assert not (fill_holes(open_ring, 9, None) != open_ring).any()
    assert not fill_holes(np.zeros((3, 3), bool), 9, None).any()


def test_rows_fit_the_table() -> None:
    ontology = Ontology(classes=(OntologyClass(name="a", phrases=("a",)),))
    rows = cut_image(hills(1, (40, 40), 3), (50, 60), ask(ontology, IDS), ontology)
    ids = {"shard": "s", "row": 0, "key": "k"}
    table = pa.Table.from_pylist([ids | row for row in rows], schema=schema.ANNOTATIONS)
    assert table.num_rows == len(rows) > 0
    table.validate(full=True)


def test_cutting_needs_no_torch() -> None:
    code = "import sys, pipeline.annotations.cut; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
