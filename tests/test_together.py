"""The GPU's route on a CPU: rows computed together, masks finished on the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mask_rows import as_rows, masks_of
from pycocotools import mask as coco

from pipeline.config.classify import ClassifyConfig
from pipeline.config.segment import MaskRule, SegmentConfig
from pipeline.errors import JobError
from pipeline.infer.classify import ClassifyImages, open_classifier
from pipeline.infer.device import Device
from pipeline.infer.device_masks import maps_on_device, masks_on_device
from pipeline.infer.embed import EmbedImages, open_embedder
from pipeline.infer.masks import Found, logit, probability_map
from pipeline.infer.runs import mask_columns
from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter
from pipeline.prepare.images import PrepareImages
from pipeline.read.inputs import list_shards
from pipeline.read.records import read_batches
from pipeline.read.shard import shard_to_row
from pipeline.schema import PIXELS, RUNS
from pipeline.write.rows import MakeMaskRows

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DEMO = Path(__file__).parent.parent / "pipeline" / "demo"
PROMPTS = ["blue", "star", "red circle", "green"]

sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
thresholds = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def assert_same_but_for_ties(found: Any, expected: Any, grid: np.ndarray, level: float) -> None:
    """Rows of one mask; pixels may differ where the interpolated logit is the threshold's."""
    size = tuple(expected["rle"]["size"])
    assert found["rle"]["size"] == list(size)
    one, other = coco.decode(found["rle"]), coco.decode(expected["rle"])
    wide = F.interpolate(torch.from_numpy(grid)[None, None], size=size, mode="bilinear")[0, 0]
    distance = (wide.double() - level).abs().numpy()[one != other]
    assert not (distance > 1e-5 * (1 + np.abs(grid).max())).any(), distance.max()
    assert found["score_max"] == pytest.approx(expected["score_max"], rel=1e-6)
    if not distance.size:
        assert found["bbox"] == expected["bbox"] and found["area"] == expected["area"]
        means = (found["score_mean"], expected["score_mean"])
        assert means == (None, None) or means[0] == pytest.approx(means[1], rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    grid=sizes,
    each=st.lists(sizes, min_size=1, max_size=4),
    threshold=thresholds,
    pixels=st.sampled_from([1, 5000, 10**6]),
    seed=st.integers(0, 99),
)
@example(grid=(1, 1), each=[(1, 1), (3000, 3)], threshold=0.5, pixels=1, seed=0)
@example(grid=(88, 120), each=[(480, 640), (640, 480)], threshold=0.5, pixels=10**6, seed=1)
@example(grid=(9, 7), each=[(9, 7), (9, 7)], threshold=0.0, pixels=10**6, seed=2)
@example(grid=(9, 7), each=[(20, 3), (9, 7)], threshold=1.0, pixels=10**6, seed=3)
def test_masks_of_the_device_are_the_tasks(
    grid: tuple[int, int], each: list[tuple[int, int]], threshold: float, pixels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (3 * len(each), *grid)).astype(np.float32)
    logits[::3] -= 50  # empty, full, and rough
    logits[1::3] += 50
    wanted = np.repeat(np.array(each), 3, axis=0)
    found = masks_on_device(torch.from_numpy(logits), wanted, MaskRule(threshold), pixels)
    for pair, one, size in zip(found, logits, wanted.tolist(), strict=True):
        assert pair.finite
        made = Found(tuple(size), [pair.counts], [pair.score_max], [pair.score_mean], one[None])
        (expected,) = masks_of(one[None], size=tuple(size), threshold=threshold)
        assert_same_but_for_ties(as_rows(made)[0], expected, one, logit(threshold))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pair_that_is_not_finite_is_told_and_has_no_mask(bad: float) -> None:
    logits = np.full((3, 4, 5), 2, np.float32)
    logits[1, 2, 3] = bad
    found = masks_on_device(torch.from_numpy(logits), np.full((3, 2), 8), MaskRule(), 10**6)
    assert [pair.finite for pair in found] == [True, False, True]
    assert [pair.counts.tolist() for pair in found] == [[0, 64], [64], [0, 64]]


@pytest.mark.parametrize("side", [3, 11, 88])
def test_kept_maps_are_the_tasks(side: int) -> None:
    logits = np.random.default_rng(side).normal(0, 3, (5, 40, 30)).astype(np.float32)
    found = maps_on_device(torch.from_numpy(logits), side)
    expected = np.stack([probability_map(grid, side) for grid in logits])
    assert np.abs(found.astype(int) - expected).max() <= 1 and (found != expected).mean() < 0.01
    assert maps_on_device(torch.from_numpy(logits), 0).shape == (5, 0, 0)


def test_columns_of_many_masks_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 30, 2)) < rng.choice([0, 0.1, 0.9, 1]) for _ in range(60)]
    counts = []
    for mask in masks:
        edges = np.flatnonzero(np.diff(mask.T.reshape(-1).astype(np.int8), prepend=0))
        counts.append(np.diff(edges, prepend=0, append=mask.size).tolist())
    lists = pa.array(counts, pa.list_(pa.int32()))
    shapes = np.array([mask.shape for mask in masks])
    whole = pa.table(mask_columns(lists, shapes)).to_pylist()
    monkeypatch.setattr("pipeline.infer.runs._AT_ONCE", 100)
    assert pa.table(mask_columns(lists, shapes)).to_pylist() == whole
    for row, mask in zip(whole, masks, strict=True):
        expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert row["rle"]["counts"] == expected["counts"].decode()
        assert row["bbox"] == coco.toBbox(expected).tolist()
        assert row["area"] == coco.area(expected)


@pytest.fixture(scope="module")
def spec() -> SegmentSpec:
    return open_segmenter(str(DEMO / "model"), PROMPTS, embed=True)


@pytest.fixture(scope="module")
def pixels(spec: SegmentSpec) -> pa.Table:
    """Scenes of many sizes, each with phrases of its own, one failure and an end record."""
    shard = list_shards(str(DEMO / "shards/scenes-000001.parquet")).shards[0]
    read = pa.concat_tables(read_batches(pa.Table.from_pylist([shard_to_row(shard)])))
    table = pa.concat_tables([read[:9], read[-1:]])
    prepared = PrepareImages(spec.checkpoint.processor, 10**7)(table)
    rows = prepared.to_pylist()
    rows[3] |= {"pixels": b"", "stage": "decode", "reason": "not_an_image"}
    for i, row in enumerate(rows):
        row["text"] = ("[]", '["blue"]', '["star", "blue", "red"]')[i % 3]
    return pa.Table.from_pylist(rows, schema=PIXELS)


def both_routes(
    spec: SegmentSpec, pixels: pa.Table, **options: Any
) -> tuple[dict[str, pa.Table], dict[str, pa.Table], np.ndarray]:
    """Rows of all tables by the GPU's and by the CPU's route, and the CPU's logits of each mask."""
    asked = {} if spec.per_row else {"prompt": tuple(PROMPTS)}
    own: Any = {"prompt_column": "text"} if spec.per_row else {}
    config = SegmentConfig(input="in", output="out", **asked, **own, **options)
    names = [] if spec.per_row else PROMPTS
    rule = spec.only(names, embed=spec.embed, rule=config.rule)
    tables = config.tables(spec.checkpoint.dimension, spec.checkpoint.weights_hash)
    make = MakeMaskRows(config, tables, names, 0)
    runs = pa.concat_tables(SegmentImages(rule, Device("cpu", together=True))(pixels))
    assert runs.schema.equals(RUNS)
    logits = pa.concat_tables(SegmentImages(rule, "cpu")(pixels))
    assert sorted(runs["row"].to_pylist()) == sorted(logits["row"].to_pylist())
    grids = [
        np.frombuffer(row["logits"], np.float32).reshape(
            -1, max(1, row["logits_height"]), max(1, row["logits_width"])
        )
        for row in logits.to_pylist()
        if row["logits"]
    ]
    return make(runs), make(logits), np.concatenate(grids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_size": "model", "threshold": 0.2},
        {"keep_probabilities": "88", "embed": True},
        {"threshold": 0.0},
    ],
    ids=["plain", "model", "maps", "all"],
)
@pytest.mark.parametrize("own", [False, True], ids=["for all", "own"])
def test_rows_are_those_of_the_cpu(
    spec: SegmentSpec, pixels: pa.Table, options: dict[str, Any], own: bool
) -> None:
    if own:
        spec = open_segmenter(str(DEMO / "model"), [], per_row=True, embed=True)
    found, expected, grids = both_routes(spec, pixels, **options)
    assert found.keys() == expected.keys()
    assert found["images"].equals(expected["images"]) and len(found["images"]) == 8
    level = logit(options.get("threshold", 0.5))
    same = ["shard", "row", "key", "prompt_id", "prompt", "height", "width", "threshold"]
    assert found["masks"].select(same).equals(expected["masks"].select(same))
    for one, other, grid in zip(
        found["masks"].to_pylist(), expected["masks"].to_pylist(), grids, strict=True
    ):
        size = tuple(other["rle"]["size"])
        wide = F.interpolate(torch.from_numpy(grid)[None, None], size=size, mode="bilinear")
        wrong = coco.decode(one["rle"]) != coco.decode(other["rle"])
        # Logits of a batch differ in their last bits, too.
        assert not ((wide[0, 0] - level).abs().numpy()[wrong] > 1e-4).any()
        assert one["score_max"] == pytest.approx(other["score_max"], rel=1e-4, abs=1e-7)
    if "embed" in options:
        near = [np.stack(t["embeddings"]["vector"].to_pylist()) for t in (found, expected)]
        assert np.abs(near[0] - near[1]).max() < 1e-5
        kept = [t["probabilities"] for t in (found, expected)]
        assert kept[0].drop_columns(["map"]).equals(kept[1].drop_columns(["map"]))
        maps = [np.frombuffer(b"".join(t["map"].to_pylist()), np.uint8) for t in kept]
        assert np.abs(maps[0].astype(int) - maps[1]).max() <= 1


def test_an_image_that_overflows_fails_alone(spec: SegmentSpec, pixels: pa.Table) -> None:
    actor = SegmentImages(spec, Device("cpu", together=True))

    def overflow(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
        return out.index_fill(0, torch.tensor([2]), torch.inf)

    actor.model.clip.vision_model.embeddings.register_forward_hook(overflow)
    rows = [row for table in actor(pixels) for row in table.to_pylist()]
    failed = [row for row in rows if row["reason"] == "model_failed"]
    assert [(row["row"], row["stage"]) for row in failed] == [(2, "segment")]
    assert failed[0]["counts"] == [] and failed[0]["vector"] == b""
    assert sum(len(row["counts"]) == len(PROMPTS) for row in rows) == 7


def test_vectors_and_labels_are_those_of_the_cpu(pixels: pa.Table) -> None:
    model = str(DEMO / "model")
    embedder = open_embedder(model, text=True, normalize=True, dtype="float32")
    labels = ClassifyConfig(input="in", output="out", label=("red", "green"), template=("{}",))
    classifier = open_classifier(model, labels)
    makers: list[tuple[Callable[..., Any], str]] = [
        (lambda device: EmbedImages(embedder, device), "vector"),
        (lambda device: EmbedImages(embedder, device), "text_vector"),
        (lambda device: ClassifyImages(classifier, device), "probability"),
    ]
    for make, name in makers:
        one, other = (make(d)(pixels)[name] for d in (Device("cpu", together=True), "cpu"))
        for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True):
            if isinstance(a, bytes):
                a, b = np.frombuffer(a, np.float32), np.frombuffer(b, np.float32)
            assert len(a) == len(b) and np.allclose(a, b, atol=1e-5)


def test_two_slices_are_in_flight_and_results_in_their_order() -> None:
    meeting, seen = threading.Barrier(2, timeout=60), []

    def function(some: slice) -> int:
        if some.start < 8:
            meeting.wait()  # passes only with another one beside it
        seen.append(threading.current_thread().name)
        return some.start

    assert list(Device("cpu", together=True).over(10, 4, function)) == [0, 4, 8]
    assert len(set(seen)) == 2


class Small:
    """A function on a device with room for `rows`."""

    def __init__(self, rows: int):
        self.rows, self.calls = rows, []  # type: ignore[var-annotated]

    def __call__(self, some: slice) -> list[int]:
        self.calls.append(some.stop - some.start)
        if self.calls[-1] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(some.start, some.stop))


def test_without_memory_slices_are_halved_and_stay_so(capsys: pytest.CaptureFixture[str]) -> None:
    device, function = Device("cpu", together=True), Small(3)
    for _ in range(2):
        found = [row for rows in device.over(19, 16, function) for row in rows]
        assert found == list(range(19))
    said = "the GPU has too little memory for 16 images at once; halving\n"
    assert capsys.readouterr().err == said
    assert function.calls.count(16) == 1 and max(function.calls[-7:]) <= 3
    with pytest.raises(JobError, match="too little memory for one image"):
        list(device.over(2, 2, Small(0)))
