"""The segment stage without Ray: batches in, logits out, whatever the slices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import schema
from pipeline.errors import CheckpointError, JobError, UsageError
from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.tokenizer import Tokenizer

PROMPTS = [f"a red star {i}" for i in range(5)]
SIZE = {"height": 64, "width": 96}  # not square


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save(checkpoints.small_clipseg(), folder)
    checkpoints.write_vocabulary(folder)
    config = {"image_processor_type": "ViTImageProcessor", "size": SIZE}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def prompted(checkpoint: Path) -> SegmentSpec:
    return open_segmenter(str(checkpoint), PROMPTS)


def record(row: int, pixels: np.ndarray | None, reason: str = "") -> dict[str, object]:
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in schema.PIXELS}
    data = b"" if pixels is None else pixels.tobytes()
    return empty | {"shard": "s", "row": row, "reason": reason, "pixels": data, "retryable": False}


def batch(count: int) -> tuple[pa.Table, np.ndarray]:
    """`count` images, one that failed among them, and the end of the shard."""
    pixels = np.random.default_rng(0).integers(0, 255, (count, 64, 96, 3), dtype=np.uint8)
    records = [record(i, image) for i, image in enumerate(pixels)]
    records.insert(1, record(count, None, "no_image"))
    records.append(record(-1, None))
    return pa.Table.from_pylist(records, schema=schema.PIXELS), pixels


def gather(tables: list[pa.Table], count: int) -> np.ndarray:
    """Logits (images, prompts, H, W) put together again; every pair exactly once."""
    out = np.full((count, len(PROMPTS), 64, 96), np.nan, np.float32)
    for table in tables:
        assert table.schema.equals(schema.LOGITS)
        for row in table.to_pylist():
            if row["logits"]:
                size = (row["logits_height"], row["logits_width"])
                some = np.frombuffer(row["logits"], np.float32).reshape(-1, *size)
                part = out[row["row"], row["first_prompt"] : row["first_prompt"] + len(some)]
                assert np.isnan(part).all()
                part[:] = some
    assert np.isfinite(out).all()
    return out


@pytest.mark.parametrize("pairs_per_block", [100, 7, 5, 2, 1])
def test_blocks_do_not_change_the_logits(
    prompted: SegmentSpec,
    checkpoint: Path,
    pairs_per_block: int,
) -> None:
    table, pixels = batch(3)
    actor = SegmentImages(prompted, "cpu", block_bytes=pairs_per_block * 64 * 96 * 4)
    out = list(actor(table))
    assert max(t["logits"].nbytes for t in out) <= pairs_per_block * 64 * 96 * 4 + 100
    in_one = gather(list(SegmentImages(prompted, "cpu")(table)), 3)
    assert gather(out, 3).tobytes() == in_one.tobytes()
    model, _ = CLIPSeg.from_folder(checkpoint)
    with torch.inference_mode():
        normalized = prompted.checkpoint.processor.normalize(torch.from_numpy(pixels))
        reference = model(normalized, torch.from_numpy(prompted.conditional)).numpy()
    assert np.abs(gather(out, 3) - reference).max() < 1e-4 * np.abs(reference).max()
    passed = [row for t in out for row in t.to_pylist() if not row["logits"]]
    assert [(row["row"], row["reason"]) for row in passed] == [(3, "no_image"), (-1, "")]


def test_an_image_that_overflows_fails_alone(prompted: SegmentSpec) -> None:
    actor, (table, pixels) = SegmentImages(prompted, "cpu"), batch(3)
    one = prompted.checkpoint.processor.normalize(torch.from_numpy(pixels[1:2]))

    def overflow(_: object, inputs: tuple[torch.Tensor, bool], out: torch.Tensor) -> torch.Tensor:
        same = (inputs[0] == one).flatten(1).all(1)
        return out.masked_fill(same[:, None, None], torch.inf)

    actor.model.clip.vision_model.embeddings.register_forward_hook(overflow)
    rows = [row for t in actor(table) for row in t.to_pylist()]
    assert {row["row"] for row in rows if row["logits"]} == {0, 2}
    (failed,) = [row for row in rows if row["row"] == 1]
    assert (failed["stage"], failed["reason"]) == ("segment", "model_failed")


def test_an_actor_with_other_weights_refuses(prompted: SegmentSpec, tmp_path: Path) -> None:
    checkpoint = replace(prompted.checkpoint, weights_hash="0" * 64)
    other = replace(prompted, checkpoint=checkpoint)
    with pytest.raises(JobError, match="other weights"):
        SegmentImages(other, "cpu")


def test_a_gpu_that_is_not_there_is_an_error(prompted: SegmentSpec) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="GPU"):
        SegmentImages(prompted, "cuda")


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoints.copy_with(checkpoint, tmp_path / "copy")
    merges = [*checkpoints.small_merges(), ("a</w>", "an</w>")]
    checkpoints.write_vocabulary(folder, merges)
    with pytest.raises(CheckpointError, match="the tokenizer has 558 tokens, the model 557"):
        open_segmenter(str(folder), PROMPTS)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ({"height": 64, "width": 15}, "64 x 15 pixels, less than a patch of 16"),
        ({"shortest_edge": 64}, "no common size"),
    ],
)
def test_images_of_a_size_that_no_model_takes_are_refused(
    size: dict[str, int], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    config = {"image_processor_type": "ViTImageProcessor", "size": size}
    folder = checkpoints.copy_with(checkpoint, tmp_path / "m", preprocessor_config=config)
    with pytest.raises(CheckpointError, match=says):
        open_segmenter(str(folder), PROMPTS)


def test_an_embedding_that_overflows_fails_as_a_row(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoints.copy_with(checkpoint, tmp_path / "m")
    # Read by no mask, only by the embedding.
    checkpoints.change_tensors(
        folder, lambda tensors: tensors["clip.visual_projection.weight"].mul_(torch.inf)
    )
    actor = SegmentImages(open_segmenter(str(folder), PROMPTS, embed=True), "cpu")
    rows = [row for t in actor(batch(2)[0]) for row in t.to_pylist()]
    failed = [row for row in rows if row["reason"] == "model_failed"]
    assert sorted(row["row"] for row in failed) == [0, 1]
    assert {(row["stage"], row["detail"]) for row in failed} == {
        ("embed", "the embedding is not finite")
    }
    assert not any(row["logits"] or row["vector"] for row in rows)


def test_another_tokenizer_is_another_run(prompted: SegmentSpec) -> None:
    """It decides what a prompt is."""
    folder = prompted.checkpoint.name
    known = prompted.checkpoint.fingerprint()["tokenizer_hash"]
    assert known == Tokenizer.from_folder(folder).content_hash != ""
