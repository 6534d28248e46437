"""--size, --tile and --refine: transformers at another size, crops seen one by one, and He's filter
written out decide."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
import transformers
from compare import assert_close
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import uniform_filter

from jobs import label, segment
from pipeline import CLIPSeg, schema
from pipeline.config.fine import MAX_LOOK_PX, FineOptions
from pipeline.config.segment import SegmentConfig
from pipeline.demo import MODEL
from pipeline.demo.closely import measure
from pipeline.demo.scenes import draw_scene
from pipeline.errors import CheckpointError, UsageError
from pipeline.infer.blend import Grid
from pipeline.infer.refine import EPSILON, fit_lines
from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter
from pipeline.prepare.images import PrepareImages
from pipeline.prepare.processor import ImageProcessor
from pipeline.prepare.windows import OVERLAP, Looks, PrepareLooks, window_starts
from pipeline.write.rows import MakeMaskRows

PROMPTS = ["a red star", "a cat", "the dog"]
SIDE = 64  # of the checkpoint's look
TILE = FineOptions(tile=True)
PROCESSOR = ImageProcessor.from_dict(
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 352, "width": 352}}
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = checkpoints.small_clipseg()
    model.decoder.film_mul.weight.data *= 10  # logits that differ from prompt to prompt
    checkpoints.save(model, folder)
    checkpoints.write_vocabulary(folder)
    config = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()).resize((width, height))


def records(*images: Image.Image, text: str = "") -> pa.Table:
    """schema.RECORDS of images, one that failed among them, and the end of the shard."""
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in schema.RECORDS}
    empty |= {"image": b"", "retryable": False, "shard": "s", "text": text}
    rows = []
    for i, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append(empty | {"row": i, "image": file.getvalue()})
    rows.insert(1, empty | {"row": len(images), "reason": "no_image", "stage": "read"})
    return pa.Table.from_pylist([*rows, empty | {"row": -1}], schema=schema.RECORDS)


def prepare(spec: SegmentSpec, table: pa.Table) -> pa.Table:
    stage = spec.looks and PrepareLooks(spec.looks, 10**7)
    if stage:
        return pa.concat_tables(stage(table))
    return PrepareImages(spec.checkpoint.processor, 10**7)(table)


def see(
    spec: SegmentSpec, table: pa.Table, threads: int = 2, **options: int
) -> dict[int, np.ndarray]:
    """Logits (P, h, w) of each row; every prompt once, and the others pass."""
    found: dict[int, list[np.ndarray]] = {}
    passed = []
    for part in SegmentImages(spec, "cpu", threads, **options)(prepare(spec, table)):
        assert part.schema.equals(schema.LOGITS)
        for row in part.to_pylist():
            if row["reason"] or row["row"] < 0:
                passed.append((row["row"], row["reason"]))
                continue
            size = (row["logits_height"], row["logits_width"])
            parts = found.setdefault(row["row"], [])
            assert row["first_prompt"] == sum(map(len, parts))
            parts.append(np.frombuffer(row["logits"], np.float32).reshape(-1, *size))
    assert sorted(passed) == [(-1, ""), (len(table) - 2, "no_image")]
    return {row: np.concatenate(parts) for row, parts in found.items()}


# ---- what is asked for


def test_sizes_that_cannot_be_are_refused_in_one_line(checkpoint: Path) -> None:
    for size, says in (
        ("abc", "must be a number such as 704, or 704x1056"),
        ("704x", "must be a number"),
        ("-5", "must be a number"),
        ("0", "must be of 1 to"),
        ("4096x4097", "must be of 1 to 16,777,216 pixels"),
        ("999999", "must be of 1 to"),
    ):
        with pytest.raises(UsageError, match=says):
            FineOptions(size=size)
    with pytest.raises(UsageError, match=r"patches of 16 px; the nearest is 96x112"):
        open_segmenter(str(checkpoint), PROMPTS, fine=FineOptions(size="100x110"))
    cropping = replace(PROCESSOR, do_center_crop=True)
    with pytest.raises(CheckpointError, match="crops images to their centre"):
        Looks(processor=cropping, patch=16, options=TILE)
    Looks(processor=cropping, patch=16, options=FineOptions(refine=True))


def test_the_fingerprint_knows_and_older_runs_are_the_same() -> None:
    assert FineOptions().fingerprint() == {}
    every = [FineOptions(size="704"), FineOptions(size="704x704"), TILE, FineOptions(refine=True)]
    assert len({json.dumps(each.fingerprint()) for each in every}) == len(every)
    assert FineOptions(size="704X0704") == FineOptions(size="704X0704")
    assert FineOptions(size="704X0704").fingerprint() == FineOptions(size="704x704").fingerprint()


# ---- one look of another size


@pytest.mark.parametrize(("size", "side"), [("704", 704), ("96x96", 96)])
def test_logits_at_another_size_are_those_of_transformers(
    size: str, side: int, checkpoint: Path
) -> None:
    image = photo(300, 300)
    spec = open_segmenter(str(checkpoint), PROMPTS, fine=FineOptions(size=size))
    processor = transformers.CLIPSegProcessor(
        transformers.ViTImageProcessorPil.from_pretrained(
            checkpoint, size={"height": side, "width": side}
        ),
        transformers.CLIPTokenizer.from_pretrained(checkpoint),
    )
    inputs = processor(text=PROMPTS, images=[image] * 3, padding=True, return_tensors="pt")
    model = transformers.CLIPSegForImageSegmentation.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        reference = model(**inputs, interpolate_pos_encoding=True).logits
    assert_close(torch.tensor(see(spec, records(image))[0]), reference)


@pytest.mark.parametrize(
    ("size", "image", "expected"),
    [
        ("96", (60, 90), (64, 96)),
        ("96", (90, 60), (96, 64)),
        ("96", (1000, 7), (96, 16)),  # a patch at least
        ("64", (50, 50), (64, 64)),  # the plain look
        ("48x96", (50, 50), (48, 96)),
    ],
)
def test_size_keeps_the_aspect_but_for_whole_patches(
    size: str, image: tuple[int, int], expected: tuple[int, int], checkpoint: Path
) -> None:
    spec = open_segmenter(str(checkpoint), PROMPTS, fine=FineOptions(size=size))
    found = see(spec, records(photo(*image)))[0]
    assert found.shape == (3, *expected)


# ---- windows


def test_what_one_window_can_see_has_the_bits_of_the_plain_look(checkpoint: Path) -> None:
    images = records(photo(64, 64), photo(40, 63), photo(64, 10))
    tiled = see(open_segmenter(str(checkpoint), PROMPTS, fine=TILE), images)
    plain = see(open_segmenter(str(checkpoint), PROMPTS), images)
    assert {i: v.tobytes() for i, v in tiled.items()} == {i: v.tobytes() for i, v in plain.items()}


def test_equal_looks_blend_to_their_value() -> None:
    """One window on the whole grid, and the same as the plain look: within 1e-6 of the largest."""
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 20, (4, 48, 64)).astype(np.float32))
    starts = (np.zeros(1, np.int64), np.zeros(1, np.int64))
    blended = Grid((48, 64), (48, 64), starts, (48, 64)).weigh(x, x, torch.zeros(4, dtype=int))
    assert (blended - x).abs().max() <= 1e-6 * x.abs().max()


def test_windows_blend_as_if_each_was_an_image_of_its_own(checkpoint: Path) -> None:
    """The definition in float64, from the plain stage's logits of every crop."""
    image = photo(90, 150)
    tops, lefts = window_starts(90, SIDE), window_starts(150, SIDE)
    assert (tops.tolist(), lefts.tolist()) == ([0, 26], [0, 43, 86])
    crops = [image.crop((x, y, x + SIDE, y + SIDE)) for y in tops for x in lefts]
    plain = see(open_segmenter(str(checkpoint), PROMPTS), records(image, *crops))
    whole = torch.nn.functional.interpolate(
        torch.tensor(plain[0], dtype=torch.float64)[None], size=(90, 150), mode="bilinear"
    )[0].numpy()
    ramp = np.arange(SIDE) + 0.5
    ramp = np.minimum(ramp, ramp[::-1]) / (SIDE * OVERLAP)
    weight = np.sin(np.pi / 2 * np.minimum(ramp, 1)) ** 2
    total, expected = np.zeros((90, 150)), np.zeros((3, 90, 150))
    for i, (y, x) in enumerate((y, x) for y in tops for x in lefts):
        part = (slice(y, y + SIDE), slice(x, x + SIDE))
        total[part] += np.outer(weight, weight)
        mean = np.log(
            (np.exp(plain[i + 1].astype(float)) + np.exp(whole[(slice(None), *part)])) / 2
        )
        expected[(slice(None), *part)] += np.outer(weight, weight) * mean
    spec = open_segmenter(str(checkpoint), PROMPTS, fine=TILE)
    assert_close(torch.tensor(see(spec, records(image))[0]), torch.tensor(expected / total))


def test_no_seam() -> None:
    """Windows that say 0 or 1 throughout: neighbours differ by no more than the ramp's slope."""
    size, side = (180, 260), (64, 64)
    starts = (window_starts(180, 64), window_starts(260, 64))
    count = len(starts[0]) * len(starts[1])
    grid = Grid(size, (8, 8), starts, side)
    for seed in range(5):
        values = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, count)).float()
        nothing = torch.full((count, 8, 8), -1e4)  # beside which a window counts alone
        tiles = grid.weigh(values[:, None, None].expand(-1, 64, 64), nothing, torch.arange(count))
        out = torch.zeros(size)
        for i, tile in enumerate(tiles):
            grid.window(out, i).add_(tile)
        steps = max(float(out.diff(dim=d).abs().max()) for d in (0, 1))
        assert steps <= math.pi / 2 / (64 * OVERLAP)
        # Where a window begins or ends, it has hardly a share.
        for d, at in ((0, starts[0]), (1, starts[1])):
            edges = np.concatenate([at[1:] - 1, at[:-1] + 63])
            over = out.diff(dim=d).abs().index_select(d, torch.from_numpy(edges))
            assert float(over.max()) <= 0.01
    everywhere = grid.weigh(torch.ones(count, 64, 64), torch.ones(count, 8, 8), torch.arange(count))
    out = torch.zeros(size)
    for i, tile in enumerate(everywhere):
        grid.window(out, i).add_(tile)
    assert (out - 1).abs().max() < 1e-6


SIZES = st.tuples(st.integers(1, 60_000), st.integers(1, 60_000))


@given(SIZES, st.sampled_from([None, "704", "1500", "4096", "704x1408"]))
def test_windows_cover_any_image_within_the_bound(size: tuple[int, int], asked: str | None) -> None:
    options = FineOptions(size=asked, tile=True)
    looks = Looks(processor=PROCESSOR, patch=16, options=options)
    fine = looks.fine_size(*size)
    if fine is None:
        return
    assert math.prod(fine) <= MAX_LOOK_PX
    assert min(fine) >= 352
    for length, starts in zip(fine, looks.windows(fine), strict=True):
        assert starts[0] == 0
        assert starts[-1] == length - 352
        assert (np.diff(starts) > 0).all()
        assert (np.diff(starts) <= 352 * (1 - OVERLAP) + 1).all()
    if asked is None and min(fine) > 352:
        assert abs(fine[0] / fine[1] - size[0] / size[1]) <= 0.01 * size[0] / size[1]


@pytest.mark.parametrize("options", [TILE, FineOptions(tile=True, refine=True, size="120")])
def test_batches_blocks_and_threads_do_not_change_a_bit(
    options: FineOptions, checkpoint: Path
) -> None:
    spec = open_segmenter(str(checkpoint), PROMPTS, fine=options)
    images = [photo(90, 150), photo(30, 30), photo(150, 90)]
    together = see(spec, records(*images), threads=3)
    one_prompt_a_block = see(spec, records(*images), threads=1, block_bytes=1)
    for i, image in enumerate(images):
        alone = see(spec, records(image))[0]
        assert together[i].tobytes() == one_prompt_a_block[i].tobytes() == alone.tobytes()
    assert together[0].shape == (3, *((72, 120) if options.size else (90, 150)))


def test_own_phrases_give_the_bits_of_the_same_prompts(checkpoint: Path) -> None:
    table = records(photo(70, 90), text=json.dumps(PROMPTS[::-1]))
    own = open_segmenter(str(checkpoint), [], per_row=True, fine=TILE)
    every = see(open_segmenter(str(checkpoint), PROMPTS, fine=TILE), table)[0]
    assert see(own, table, block_bytes=1)[0].tobytes() == every[::-1].tobytes()
    config = SegmentConfig(input="in", output="out", prompt_column="text", fine=TILE)
    make_rows = MakeMaskRows(config, {}, [], 0)
    runs = list(SegmentImages(own, "cpu", block_bytes=1)(prepare(own, table)))
    rows = [row for run in runs for row in make_rows(run)["masks"].to_pylist()]
    assert [(row["prompt_id"], row["prompt"]) for row in rows] == list(enumerate(PROMPTS[::-1]))
    nothing = see(own, records(photo(70, 90)))[0]
    assert nothing.shape == (0, 70, 90)


def test_the_embedding_is_of_the_plain_look(checkpoint: Path) -> None:
    vectors = []
    for options in (FineOptions(), TILE, FineOptions(size="96"), FineOptions(refine=True)):
        spec = open_segmenter(str(checkpoint), PROMPTS, embed=True, fine=options)
        tables = SegmentImages(spec, "cpu")(prepare(spec, records(photo(70, 90))))
        (vector,) = [v for t in tables for v in t["vector"].to_pylist() if v]
        vectors.append(vector)
    assert len(vectors[0]) == 4 * checkpoints.PROJECTION
    assert len(set(vectors)) == 1


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_image_fails_alone_if_one_window_overflows(value: float, checkpoint: Path) -> None:
    spec = open_segmenter(str(checkpoint), PROMPTS, fine=FineOptions(tile=True, refine=True))
    actor = SegmentImages(spec, "cpu", 1)
    seen = []

    def overflow(_: object, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out)
        return torch.full_like(out, value) if len(seen) == 4 else out

    actor.model.decoder.transposed_convolution.register_forward_hook(overflow)
    rows = [
        r
        for t in actor(prepare(spec, records(photo(70, 90), photo(70, 90))))
        for r in t.to_pylist()
    ]
    failed = [r["row"] for r in rows if r["reason"] == "model_failed"]
    assert failed == [0]
    assert {r["row"] for r in rows if r["logits"]} == {1}


# ---- jobs


def rows_of(output: Path, table: str) -> list[dict[str, Any]]:
    parts = [pq.read_table(path) for path in sorted((output / table).glob("*.parquet"))]
    rows = pa.concat_tables(parts).to_pylist()
    return sorted(rows, key=lambda row: (row["key"], row.get("prompt_id", 0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes, one of them larger than the bundled model's 160 x 160 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for i, side in enumerate((160, 240)):
        scene = draw_scene(np.random.default_rng(i), size=(side, side))
        Image.fromarray(scene.image).save(folder / f"{i}.png")
    return folder


def test_masks_maps_and_added_prompts_are_of_the_finer_grid(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once, added, before = (tmp_path / name for name in ("at_once", "added", "plain"))
    asked = ["--model", str(MODEL), "--local", "--quiet", "--mask-size", "model", "--prompt", "red"]
    maps = ["--keep-probabilities", "704"]
    tile, more = ["--tile", *maps, "--embed"], ["--prompt", "star"]
    assert segment.main([str(folder), str(at_once), *asked, *tile, *more]) == 0
    assert segment.main([str(folder), str(added), *asked, *tile]) == 0
    assert segment.main([str(folder), str(added), *asked, *tile, *more]) == 0
    assert segment.main([str(folder), str(before), *asked, *maps, "--embed", *more]) == 0
    for table in ("images", "masks", "probabilities", "embeddings"):
        assert rows_of(added, table) == rows_of(at_once, table), table
    assert rows_of(before, "embeddings") == rows_of(at_once, "embeddings")
    sizes = {(row["key"], *row["rle"]["size"]) for row in rows_of(at_once, "masks")}
    assert sizes == {("0", 160, 160), ("1", 240, 240)}
    sizes = {(row["key"], *row["size"]) for row in rows_of(at_once, "probabilities")}
    assert sizes == {("0", 160, 160), ("1", 240, 240)}
    assert {tuple(row["size"]) for row in rows_of(before, "probabilities")} == {(160, 160)}
    capsys.readouterr()
    assert segment.main([str(folder), str(before), *asked, *tile, *more]) == 2
    assert "tile was null, now true" in capsys.readouterr().err


def test_labels_of_images_are_cut_from_finer_maps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.yaml").write_text("classes: [red, star]\n")
    output = tmp_path / "labels"
    asked = [str(folder), str(output), "--ontology", str(tmp_path / "o.yaml"), "--local", "--quiet"]
    assert label.main([*asked, "--size", "192"]) == 2
    assert "name the --model that segments them first" in capsys.readouterr().err
    assert label.main([*asked, "--model", str(MODEL), "--size", "192", "--refine"]) == 0
    assert {tuple(r["size"]) for r in rows_of(output / "segment", "probabilities")} == {(192, 192)}
    asked[1] = str(tmp_path / "others")
    assert label.main([*asked, "--model", str(MODEL), "--size", "4097x4097"]) == 2
    assert "must be of 1 to 16,777,216 pixels" in capsys.readouterr().err


def test_one_picture_has_the_logits_of_the_job(folder: Path) -> None:
    image = Image.open(folder / "1.png")
    spec = open_segmenter(str(MODEL), ["red"], fine=TILE)
    logits = see(spec, records(image))[0]
    found = CLIPSeg.from_pretrained(str(MODEL))(image, "red", tile=True)
    expected = torch.tensor(logits).sigmoid().numpy()
    assert found.probabilities.tobytes() == expected.tobytes()  # of the image's own size


# ---- edges


def test_lines_are_those_of_the_guided_filter() -> None:
    """Equations 5, 6 and 8 of He et al. for colour guides, pixel by pixel."""
    rng = np.random.default_rng(0)
    guide, p, radius = rng.random((24, 30, 3)), rng.random((24, 30)), 3

    def mean(x: np.ndarray) -> np.ndarray:
        size = (2 * radius + 1,) * 2 + (1,) * (x.ndim - 2)
        weights = uniform_filter(np.ones_like(x), size, mode="constant")
        return uniform_filter(x, size, mode="constant") / weights

    outer = guide[..., :, None] * guide[..., None, :]
    m = mean(guide)
    sigma = mean(outer) - m[..., :, None] * m[..., None, :] + EPSILON * np.eye(3)
    covariance = mean(guide * p[..., None]) - m * mean(p)[..., None]
    a = np.linalg.solve(sigma, covariance[..., None])[..., 0]
    b = mean(p) - (a * m).sum(-1)
    expected = np.concatenate([mean(a), mean(b)[..., None]], -1)
    found = fit_lines(
        torch.from_numpy(guide).permute(2, 0, 1)[None], torch.from_numpy(p)[None, None], radius
    )
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=1e-9)


def test_small_objects_are_found_through_windows_and_edges_by_refining() -> None:
    plain = {"plain": FineOptions()}
    found = measure(1, {"quarter": 0.25}, plain | {"tile": TILE})
    iou = {way: np.mean(each.iou) for (_, way), each in found.items()}
    assert iou["tile"] >= iou["plain"] + 0.2
    found = measure(2, {"usual": 1.0}, plain | {"refine": FineOptions(refine=True)})
    edges = {way: np.mean(each.boundary_iou) for (_, way), each in found.items()}
    assert edges["refine"] >= edges["plain"] + 0.05
