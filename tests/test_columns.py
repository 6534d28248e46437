"""A table of a user through the stages, without a scheduler: columns, arrays, failures, clashes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray.data.extensions import ArrowTensorArray, ArrowVariableShapedTensorArray

from pipeline.config.segment import SegmentConfig
from pipeline.errors import RowError, UsageError
from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter
from pipeline.prepare.convert import image_of_array
from pipeline.prepare.images import PrepareImages, decode_image
from pipeline.run.columns import InferBeside, MakeResults, PrepareRecords, result_schema
from pipeline.run.guard import run_stage
from pipeline.write.rows import MakeMaskRows

MODEL = Path(__file__).parent.parent / "pipeline" / "demo" / "model"
PROMPTS = ["blue", "star"]
RLE = pa.schema([("rle", pa.string())])


@pytest.fixture(scope="module")
def spec() -> SegmentSpec:
    return open_segmenter(str(MODEL), PROMPTS)


@pytest.fixture(scope="module")
def actor(spec: SegmentSpec) -> InferBeside:
    # A block of logits for each prompt, so that an image comes in several runs.
    return InferBeside(SegmentImages, spec, "cpu", 1, block_bytes=1)


def picture(seed: int, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def segment(
    table: pa.Table, spec: SegmentSpec, actor: InferBeside, key: str | None = None
) -> pa.Table:
    config = SegmentConfig(input="", output="", prompt=tuple(PROMPTS), model=str(MODEL))
    tables = config.tables(0, "")
    results = result_schema(tables["masks"].schema, key=key is not None)
    decode = PrepareImages(spec.checkpoint.processor, 10_000)
    last = MakeResults(MakeMaskRows(config, tables, PROMPTS, 0), "masks", results)
    blocks = [table]
    for stage in (PrepareRecords(decode, "image", key, results), actor, last):
        blocks = [output for block in blocks for output in run_stage(stage, block)]
    found = pa.concat_tables(blocks)
    found.validate(full=True)
    return found.sort_by([("n", "ascending"), ("prompt_id", "ascending")])


def test_other_columns_pass_and_failures_are_rows(spec: SegmentSpec, actor: InferBeside) -> None:
    images = [png(picture(0)), b"<html>", None, b"", png(picture(1, (200, 200))), png(picture(2))]
    boxes = ArrowTensorArray.from_numpy(np.arange(12).reshape(6, 2))
    count = len(images)
    table = pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "n": range(count),
            "path": [f"{i}.png" for i in range(count)],
            "boxes": boxes,
            "row": pa.array([None] * count, pa.float64()),  # our own word, and free for the user
        }
    )
    found = segment(table, spec, actor, key="path")
    rows = found.to_pylist()
    assert [(r["n"], r["key"], r["prompt"], r["stage"], r["reason"]) for r in rows] == [
        (0, "0.png", "blue", None, None),
        (0, "0.png", "star", None, None),
        (1, "1.png", None, "decode", "not_an_image"),
        (2, "2.png", None, "read", "no_image"),
        (3, "3.png", None, "decode", "image_empty"),
        (4, "4.png", None, "decode", "too_many_pixels"),
        (5, "5.png", "blue", None, None),
        (5, "5.png", "star", None, None),
    ]
    for row in rows:
        assert row["path"] == row["key"]
        assert row["boxes"].tolist() == [2 * row["n"], 2 * row["n"] + 1]
        assert row["row"] is None
        assert all((row[name] is None) == bool(row["reason"]) for name in ("rle", "area", "bbox"))
    assert "shard" not in found.column_names
    assert "key" not in segment(table, spec, actor).column_names


def test_the_forms_of_images_give_the_same_rows(spec: SegmentSpec, actor: InferBeside) -> None:
    pixels = [picture(0), picture(1)]
    ragged = [picture(0), picture(1, (30, 60))]
    encoded = [png(p) for p in pixels]
    forms = {
        "binary": pa.array(encoded, pa.binary()),
        "struct": pa.array([{"bytes": e, "path": "x"} for e in encoded]),
        "tensor": ArrowTensorArray.from_numpy(np.stack(pixels)),
    }
    tables = {
        form: segment(pa.table({"image": column, "n": [0, 1]}), spec, actor)
        for form, column in forms.items()
    }
    assert tables["struct"].equals(tables["binary"])
    assert tables["tensor"].equals(tables["binary"])
    objects = np.empty(2, object)
    objects[:] = ragged
    column = ArrowVariableShapedTensorArray.from_numpy(objects)
    of_arrays = segment(pa.table({"image": column, "n": [0, 1]}), spec, actor)
    of_bytes = segment(pa.table({"image": [png(p) for p in ragged], "n": [0, 1]}), spec, actor)
    assert of_arrays.equals(of_bytes)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1", "I;16"])
def test_arrays_become_rgb_as_encoded_images_do(mode: str) -> None:
    values = np.random.default_rng(3).integers(0, 256, (20, 30, 4), np.uint8)
    image = Image.fromarray(values)
    image = Image.fromarray(values[:, :, 0] * np.uint16(200)) if mode == "I;16" else image
    image = image.convert(mode) if mode != "I;16" else image
    file = io.BytesIO()
    image.save(file, "PNG")
    of_bytes = decode_image(file.getvalue(), max_pixels=1000)
    of_array = decode_image(np.asarray(image), max_pixels=1000)
    assert np.array_equal(np.asarray(of_array.image), np.asarray(of_bytes.image))
    assert (of_array.height, of_array.width, of_array.mode) == (20, 30, of_bytes.mode)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((3, 4, 3), np.float32), "unsupported_format"),
        (np.zeros((3, 4, 5), np.uint8), "unsupported_format"),
        (np.zeros(12, np.uint8), "unsupported_format"),
        (np.zeros((2, 3, 4, 3), np.uint8), "unsupported_format"),
        (np.zeros((3, 4), np.int64), "unsupported_format"),
        (np.zeros((0, 4, 3), np.uint8), "image_empty"),
        (np.zeros((3, 0, 3), np.uint8), "image_empty"),
        (np.zeros((40, 40, 3), np.uint8), "too_many_pixels"),
        (np.zeros((1, 1001), np.uint8), "extreme_aspect"),
        ("a name", "unsupported_format"),
    ],
)
def test_arrays_that_are_no_images_are_told(pixels: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        decode_image(pixels, max_pixels=1500)
    assert error.value.reason == reason


def test_one_channel_is_grey() -> None:
    assert image_of_array(np.zeros((3, 4, 1), np.uint8)).mode == "L"


@pytest.mark.parametrize(
    ("columns", "key", "says"),
    [
        ({"picture": [b""]}, None, "image='image': the dataset has no such column; it has picture"),
        ({"image": [b""]}, "path", "key='path': the dataset has no such column"),
        ({"image": [b""], "prompt": ["x"]}, None, "has a column 'prompt', as the results have"),
        ({"image": [b""], "key": ["x"], "p": [""]}, "p", "has a column 'key', as the results have"),
        ({"image": ["a.jpg"]}, None, "holds string: it must hold encoded bytes or uint8 arrays"),
    ],
)
def test_columns_that_do_not_fit_are_one_line(
    columns: dict[str, Any], key: str | None, says: str, spec: SegmentSpec, actor: InferBeside
) -> None:
    with pytest.raises(UsageError, match=says) as error:
        segment(pa.table(columns), spec, actor, key)
    assert "\n" not in str(error.value)


def test_a_key_of_the_users_own_passes(spec: SegmentSpec, actor: InferBeside) -> None:
    table = pa.table({"image": [png(picture(0))], "n": [0], "key": [7]})
    assert segment(table, spec, actor)["key"].to_pylist() == [7, 7]
    assert segment(table, spec, actor, "key")["key"].to_pylist() == ["7", "7"]


def test_images_alone_and_no_images(spec: SegmentSpec, actor: InferBeside) -> None:
    prepare = PrepareRecords(PrepareImages(spec.checkpoint.processor, 10_000), "image", None, RLE)
    table = pa.table({"image": pa.array([png(picture(0))], pa.binary())})
    for rows in (table, table.slice(1)):
        (prepared,) = prepare(rows)
        out = list(actor(prepared))
        assert sum(len(output) for output in out) == len(rows) * len(PROMPTS)
