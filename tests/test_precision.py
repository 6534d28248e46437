"""--precision: how far masks and vectors are from float32's, and from transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from torch import nn

from jobs import embed, segment
from pipeline.config.classify import ClassifyConfig
from pipeline.config.embed import EmbedConfig
from pipeline.config.label import LabelConfig
from pipeline.config.options import Precision, WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import UsageError
from pipeline.infer.device import Device
from pipeline.infer.embed import EmbedImages, open_embedder
from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.images import PrepareImages
from pipeline.read.inputs import list_shards
from pipeline.read.records import read_batches
from pipeline.read.shard import shard_to_row

DEMO = Path(__file__).parent.parent / "pipeline" / "demo"
PROMPTS = ["blue", "star", "a red circle", "green"]
HALF: list[Precision] = ["bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def scenes() -> pa.Table:
    """Bundled scenes at the size of the bundled model: schema.PIXELS."""
    prepare = PrepareImages(spec().checkpoint.processor, 10**7)
    shards = [
        shard_to_row(shard)
        for shard in list_shards(str(DEMO / "shards/scenes-000001.parquet")).shards
    ]
    read = read_batches(pa.Table.from_pylist(shards))
    return pa.concat_tables([prepare(batch) for batch in read])


@cache
def spec() -> SegmentSpec:
    return open_segmenter(str(DEMO / "model"), PROMPTS)


@cache
def logits(precision: Precision) -> np.ndarray:
    """(pairs, h, w) of the scenes."""
    checkpoint = replace(spec().checkpoint, precision=precision)
    actor = SegmentImages(replace(spec(), checkpoint=checkpoint), "cpu")
    rows = [row for table in actor(scenes()) for row in table.to_pylist() if row["logits"]]
    size = (rows[0]["logits_height"], rows[0]["logits_width"])
    found = [np.frombuffer(row["logits"], np.float32).reshape(-1, *size) for row in rows]
    return np.concatenate(found)


def iou(masks: np.ndarray, others: np.ndarray) -> float:
    """Of all masks together."""
    return float((masks & others).sum() / (masks | others).sum())


def rms(values: Any, others: Any) -> float:
    return float(np.sqrt(np.mean((np.asarray(values) - np.asarray(others)) ** 2)))


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.99), ("fp16", 0.999)])
def test_masks_of_the_scenes_are_those_of_float32(precision: Precision, least: float) -> None:
    exact, found = logits("float32"), logits(precision)
    assert 0 < rms(found, exact) < 0.02 * exact.std()
    assert iou(found > 0, exact > 0) >= least
    of_each = [iou(a > 0, b > 0) for a, b in zip(found, exact, strict=True) if (b > 0).any()]
    assert np.median(of_each) >= 0.995


@pytest.mark.parametrize("precision", HALF)
def test_vectors_are_those_of_float32(precision: Precision) -> None:
    def vectors(precision: Precision) -> np.ndarray:
        asked: Any = {"text": True, "normalize": True, "dtype": "float32", "precision": precision}
        table = EmbedImages(open_embedder(str(DEMO / "model"), **asked), "cpu")(scenes())
        good = [row for row in table.to_pylist() if row["vector"]]
        both = [row["vector"] + row["text_vector"] for row in good]
        return np.stack([np.frombuffer(data, np.float32) for data in both])

    exact, found = vectors("float32"), vectors(precision)
    width = exact.shape[1] // 2
    assert (exact * found)[:, :width].sum(1).min() >= 0.999
    assert not np.array_equal(exact[:, :width], found[:, :width])
    assert np.array_equal(exact[:, width:], found[:, width:])  # texts are encoded in float32


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIPSeg rd64-refined's widths, with four blocks and a text tower of one."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    decoder = {"projection_dim": 512, "reduce_dim": 64, "decoder_num_attention_heads": 4}
    decoder |= {"decoder_intermediate_size": 2048, "use_complex_transposed_convolution": True}
    config = checkpoints.clipseg_config({"num_hidden_layers": 1}, vision, **decoder)
    model = checkpoints.small_clipseg(config)
    for block in model.clip.vision_model.encoder.layers:  # transformers draws them for training
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    folder = checkpoints.save(model, tmp_path_factory.mktemp("wide"))
    return folder


@pytest.mark.parametrize("precision", HALF)
@torch.inference_mode()
def test_at_full_width_it_is_nearer_to_float32_than_transformers_is(
    precision: Precision, wide: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 128, 128, generator=generator)
    prompts = torch.randn(1, 512, generator=generator) * 3
    oracle = transformers.CLIPSegForImageSegmentation.from_pretrained(wide).eval()

    def reference(dtype: torch.dtype) -> np.ndarray:
        model = oracle.to(dtype)
        asked = {"pixel_values": pixels.to(dtype), "conditional_embeddings": prompts.to(dtype)}
        return model(**asked, interpolate_pos_encoding=True).logits.float().numpy()

    def ours(precision: Precision) -> np.ndarray:
        model, _ = CLIPSeg.from_folder(wide)
        Device("cpu", precision=precision).place(model)
        found = model(pixels, prompts)[0]
        assert found.dtype == torch.float32
        return found.numpy()

    exact, theirs = reference(torch.float32), reference(DTYPES[precision])
    found = ours(precision)
    scale = 4 / exact.std()  # as of a trained model: the bundled one's is 4.4
    level = np.median(exact)
    assert iou((found - level) * scale > 0, (exact - level) * scale > 0) >= 0.995
    assert rms(found, exact) <= rms(theirs, exact)
    assert rms(found, theirs) <= 1.1 * rms(theirs, exact)
    assert np.abs(ours("float32") - exact).max() < 1e-4 * np.abs(exact).max()


def test_bf16_does_not_depend_on_the_batch() -> None:
    checkpoint = replace(spec().checkpoint, precision="bf16")
    asked = replace(spec(), checkpoint=checkpoint)
    all_ = [t["logits"].to_pylist() for t in SegmentImages(asked, "cpu", 2)(scenes()[:5])]
    (one,) = SegmentImages(asked.only(PROMPTS, embed=False), "cpu", 1)(scenes()[3:4])
    assert one["logits"].to_pylist()[0] == all_[0][3]


def test_it_is_part_of_what_a_run_is_known_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = str(DEMO / "shards/scenes-000001.parquet"), str(tmp_path / "out")
    common = [source, output, "--model", str(DEMO / "model"), "--local", "--quiet"]
    assert embed.main([*common, "--precision", "bf16"]) == 0
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["fingerprint"]["dtype"] == record["config"]["precision"] == "bf16"
    assert embed.main(common) == 2
    assert 'holds another run (dtype was "bf16", now "float32")' in capsys.readouterr().err
    assert spec().checkpoint.fingerprint()["dtype"] == "float32"  # as before there was a choice


@pytest.mark.parametrize("where", [["--local"], ["--device", "cpu"]])
def test_tf32_is_for_gpus(where: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["in", "out", "--precision", "tf32", *where]
    assert segment.main([*asked, "--prompt", "a cat"]) == 2
    assert embed.main(asked) == 2
    said = capsys.readouterr().err
    assert said.count("--precision tf32: only GPUs compute in it; on a CPU float32 or bf16") == 2
    with pytest.raises(UsageError, match="only GPUs"):
        ClassifyConfig(
            input="in", output="out", precision="tf32", workers=WorkerOptions(device="cpu")
        )
    with pytest.raises(UsageError, match="only GPUs"):  # --device auto, and no GPU on the worker
        Device("cpu", precision="tf32")


def test_label_passes_it_on(tmp_path: Path) -> None:
    ontology = str(DEMO / "ontology.yaml")
    asked: Any = {"input": "in", "output": str(tmp_path), "ontology": ontology}
    config = LabelConfig(**asked, model="m", precision="bf16")
    assert config.of_images().precision == "bf16"
    assert config.of_maps().precision == "float32"
    with pytest.raises(UsageError, match=r"--precision, .*are for images"):
        LabelConfig(**asked, precision="bf16")
    assert {c.precision for c in (SegmentConfig, EmbedConfig, ClassifyConfig)} == {"float32"}
