"""Our CLIP, its halves and its classifier against transformers', on checkpoints that it saved."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import (
    DECODER,
    PROJECTION,
    TEXT,
    VISION,
    change_json,
    write_bin,
    write_vocabulary,
)
from compare import TOLERANCE, assert_close, random_model, token_ids
from PIL import Image
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline.errors import CheckpointError
from pipeline.model.clip import ACTIVATIONS, CLIP, contrastive_loss
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.config import HIDDEN_ACTS, CLIPConfig, CLIPSegConfig, TextConfig, VisionConfig
from pipeline.model.encoders import ImageClassifier, ImageEncoder, TextEncoder
from pipeline.model.tokenizer import Tokenizer
from pipeline.model.weights import hash_weights
from pipeline.prepare.processor import ImageProcessor

SMALL: dict[str, Any] = {
    "text_config": TEXT | {"projection_dim": PROJECTION},
    "vision_config": VISION | {"projection_dim": PROJECTION},
    "projection_dim": PROJECTION,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "legacy_eos": {"text_config": TEXT | {"eos_token_id": 2}},
    # A border that no patch covers, one head, one layer, and another activation in each tower.
    "odd": {
        "text_config": TEXT | {"num_hidden_layers": 1, "hidden_act": "gelu"},
        "vision_config": VISION
        | {"image_size": 45, "patch_size": 7, "num_attention_heads": 1, "layer_norm_eps": 1e-2},
        "projection_dim": 5,
    },
}


def random_clip(**changes: Any) -> transformers.CLIPModel:
    return random_model(transformers.CLIPModel, transformers.CLIPConfig(**SMALL | changes))


def random_clipseg(kind: Any = transformers.CLIPSegForImageSegmentation) -> Any:
    return random_model(kind, transformers.CLIPSegConfig(**SMALL | DECODER))


@torch.inference_mode()
def assert_equal_models(oracle: Any, model: CLIP, pixels: Tensor, length: int) -> None:
    """States, pooled and projected features, logits both ways and the loss."""
    ids, mask = token_ids(len(pixels), length, oracle.config.text_config.vocab_size)
    wanted = oracle(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True)
    texts = model.text_model(ids, mask)
    assert_close(texts, wanted.text_model_output.last_hidden_state)
    assert_close(model.text_model.pool(texts, ids), oracle.text_model(ids, mask).pooler_output)
    assert_close(model.encode_text(ids, mask), wanted.text_model_output.pooler_output)
    images = model.vision_model(pixels)
    assert_close(images, wanted.vision_model_output.last_hidden_state)
    assert_close(model.vision_model.pool(images), oracle.vision_model(pixels).pooler_output)
    assert_close(model.encode_image(pixels), wanted.vision_model_output.pooler_output)
    logits = model(pixels, ids, mask)
    assert_close(logits, wanted.logits_per_image)
    assert_close(logits.T, wanted.logits_per_text)
    assert_close(model.similarity(wanted.image_embeds, wanted.text_embeds), logits)
    assert contrastive_loss(logits).item() == pytest.approx(wanted.loss.item(), rel=TOLERANCE)


@pytest.mark.parametrize("name", HIDDEN_ACTS)
def test_activations_equal_the_reference(name: str) -> None:
    x = torch.linspace(-9, 9, 1001)
    assert_close(ACTIVATIONS[name]()(x.clone()), ACT2FN[name](x))


def test_an_activation_that_is_unknown_is_named(tmp_path: Path) -> None:
    random_clip(text_config=TEXT | {"hidden_act": "mish"}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"text_config\.hidden_act is 'mish', not one of"):
        CLIP.from_folder(tmp_path)


@torch.inference_mode()
@pytest.mark.parametrize("eos", [2, TEXT["eos_token_id"]])
def test_padding_above_the_end_is_never_pooled(tmp_path: Path, eos: int) -> None:
    """As the reference gives it for one text without padding; with padding it takes that."""
    end, pad = TEXT["eos_token_id"], TEXT["eos_token_id"] + 1
    oracle = random_clip(text_config=TEXT | {"eos_token_id": eos, "vocab_size": pad + 1})
    oracle.save_pretrained(tmp_path)
    wide = torch.tensor([[end - 1, 5, end, pad, pad], [end - 1, 5, 6, 7, end]])
    mask = (wide != pad).long()
    alone = [oracle.get_text_features(row[row != pad][None]).pooler_output for row in wide]
    for model in (CLIP.from_folder(tmp_path)[0], TextEncoder.from_folder(tmp_path)[0]):
        assert_close(model.encode_text(wide, mask), torch.cat(alone))


@pytest.mark.parametrize("variant", VARIANTS)
def test_clip_equals_the_reference(variant: str, tmp_path: Path) -> None:
    oracle = random_clip(**VARIANTS[variant])
    oracle.save_pretrained(tmp_path)
    model, weights_hash = CLIP.from_folder(tmp_path)
    assert weights_hash == hash_weights(tmp_path)
    side = oracle.config.vision_config.image_size
    assert_equal_models(oracle, model, torch.randn(4, 3, side, side), 9)


@pytest.mark.parametrize("decoder", [True, False])
def test_the_clip_of_a_clipseg_checkpoint(decoder: bool, tmp_path: Path) -> None:
    """Which takes images of any size, as transformers' CLIPSegModel does."""
    oracle = random_clipseg() if decoder else random_clipseg(transformers.CLIPSegModel)
    oracle.save_pretrained(tmp_path)
    model, weights_hash = CLIP.from_folder(tmp_path)
    assert weights_hash == hash_weights(tmp_path)
    assert_equal_models(oracle.clip if decoder else oracle, model, torch.randn(3, 3, 96, 96), 12)


FULL: dict[str, dict[str, Any]] = {
    "base-patch32": {"vision_config": {"patch_size": 32}},
    "base-patch16": {"vision_config": {"patch_size": 16}},
    "large-patch14": {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        "projection_dim": 768,
    },
}


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone after the test, not kept with those of the last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", FULL)
@torch.inference_mode()
def test_full_size_equals_the_reference(name: str, large_folder: Path) -> None:
    """FileInfo in half the bytes, and every tower run once: what costs time here is the size."""
    oracle = random_model(transformers.CLIPModel, transformers.CLIPConfig(**FULL[name]))
    oracle.bfloat16().save_pretrained(large_folder)
    oracle.float()
    model, _ = CLIP.from_folder(large_folder)
    (ids, mask), pixels = token_ids(3, 16, 49408), torch.randn(1, 3, 224, 224)
    wanted = oracle(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    texts, images = model.text_model(ids, mask), model.vision_model(pixels)
    assert_close(texts, wanted.text_model_output.last_hidden_state)
    assert_close(images, wanted.vision_model_output.last_hidden_state)
    texts = model.text_projection(model.text_model.pool(texts, ids))
    images = model.visual_projection(model.vision_model.pool(images))
    assert_close(texts, wanted.text_model_output.pooler_output)
    assert_close(images, wanted.vision_model_output.pooler_output)
    assert_close(model.similarity(images, texts), wanted.logits_per_image)


# ---- sizes other than the checkpoint's ----


def test_another_size_is_refused_by_default(tmp_path: Path) -> None:
    random_clip().save_pretrained(tmp_path)
    for model in (CLIP.from_folder(tmp_path)[0], ImageEncoder.from_folder(tmp_path)[0]):
        with pytest.raises(ValueError, match=r"80 x 64 pixels.*takes 64 x 64"):
            model.encode_image(torch.randn(1, 3, 80, 64))


@pytest.mark.parametrize("variant", ["plain", "odd"])
@torch.inference_mode()
def test_positions_are_interpolated_on_request(variant: str, tmp_path: Path) -> None:
    oracle = random_clip(**VARIANTS[variant])
    oracle.save_pretrained(tmp_path)
    model = CLIP.from_folder(tmp_path, interpolate=True)[0]
    encoder = ImageEncoder.from_folder(tmp_path, interpolate=True)[0]
    # The last two have as many patches as the table of "plain" in another grid, or a border.
    for size in ((64, 64), (45, 45), (112, 80), (48, 160), (32, 128), (70, 75)):
        pixels = torch.randn(2, 3, *size)
        wanted = oracle.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        assert_close(model.encode_image(pixels), wanted)
        assert_close(encoder.encode_image(pixels), wanted)


def test_a_clipseg_checkpoint_can_be_held_to_its_size(tmp_path: Path) -> None:
    random_clipseg().save_pretrained(tmp_path)
    assert ImageEncoder.from_folder(tmp_path)[0].encode_image(torch.randn(1, 3, 96, 64)).any()
    for kind in (CLIP, ImageEncoder):
        with pytest.raises(ValueError, match="takes 64 x 64"):
            kind.from_folder(tmp_path, interpolate=False)[0].encode_image(torch.randn(1, 3, 96, 64))


# ---- one half alone ----

KINDS = {"text": "Text", "vision": "Vision"}
SOURCES = ["clip", "clipseg", "clipseg without decoder", "tower", "old tower", "projected"]
SOURCES += ["clipseg tower"]


def save_source(source: str, tower: str, folder: Path) -> Any:
    """A checkpoint that holds a tower; returns transformers' CLIPModel or tower with its weights.

    The towers of CLIPSeg are taken from the full model: loaded alone by transformers, they would
    be random ones.
    """
    if source == "clip":
        model = random_clip()
    elif source == "clipseg":
        model = random_clipseg()
    elif source == "clipseg without decoder":
        model = random_clipseg(transformers.CLIPSegModel)
    else:
        prefix = "CLIPSeg" if source == "clipseg tower" else "CLIP"
        suffix = "WithProjection" if source in ("old tower", "projected") else ""
        kind = getattr(transformers, f"{prefix}{KINDS[tower]}Model{suffix}")
        config = transformers.CLIPSegConfig if prefix == "CLIPSeg" else transformers.CLIPConfig
        model = random_model(kind, getattr(config(**SMALL), f"{tower}_config"))
    model.save_pretrained(folder)
    if source == "old tower":  # as transformers 4 saved CLIPTextModel: the prefix, no projection
        part = f"{tower}_model."
        state = {n: t for n, t in model.state_dict().items() if n.startswith(part)}
        write_bin(folder, state)
    return getattr(model, "clip", model)


@pytest.mark.parametrize("source", SOURCES)
@torch.inference_mode()
def test_text_encoder_alone(source: str, tmp_path: Path) -> None:
    oracle = save_source(source, "text", tmp_path)
    ids, mask = token_ids(4, 11, TEXT["vocab_size"])
    tower = getattr(oracle, "text_model", oracle)
    wanted = tower(ids, mask)
    model, weights_hash = TextEncoder.from_folder(tmp_path, project=False)
    assert weights_hash == hash_weights(tmp_path)
    assert_close(model.text_model(ids, mask), wanted.last_hidden_state)
    assert_close(model.encode_text(ids, mask), wanted.pooler_output)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tower.parameters())
    if "tower" in source:
        with pytest.raises(CheckpointError, match="has no text_projection"):
            TextEncoder.from_folder(tmp_path)
        return
    projected, weights_hash = TextEncoder.from_folder(tmp_path)
    assert weights_hash == hash_weights(tmp_path)
    wanted = oracle.text_projection(wanted.pooler_output)
    assert_close(projected.encode_text(ids, mask), wanted)
    if source == "projected":
        assert_close(projected.encode_text(ids, mask), oracle(ids, mask).text_embeds)


@pytest.mark.parametrize("source", SOURCES)
@torch.inference_mode()
def test_image_encoder_alone(source: str, tmp_path: Path) -> None:
    oracle = save_source(source, "vision", tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    tower = getattr(oracle, "vision_model", oracle)
    wanted = tower(pixels)
    model, weights_hash = ImageEncoder.from_folder(tmp_path, project=False)
    assert weights_hash == hash_weights(tmp_path)
    assert_close(model.vision_model(pixels), wanted.last_hidden_state)
    assert_close(model.encode_image(pixels), wanted.pooler_output)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tower.parameters())
    if "tower" in source:
        with pytest.raises(CheckpointError, match="has no visual_projection"):
            ImageEncoder.from_folder(tmp_path)
        return
    projected, weights_hash = ImageEncoder.from_folder(tmp_path)
    assert weights_hash == hash_weights(tmp_path)
    wanted = oracle.visual_projection(wanted.pooler_output)
    assert_close(projected.encode_image(pixels), wanted)
    if source == "projected":
        assert_close(projected.encode_image(pixels), oracle(pixels).image_embeds)


def test_what_a_checkpoint_does_not_hold_is_named(tmp_path: Path) -> None:
    save_source("tower", "text", tmp_path / "text")
    save_source("tower", "vision", tmp_path / "vision")
    random_clip().save_pretrained(tmp_path / "clip")
    save_classifier(tmp_path / "classifier")
    for load, folder, message in (
        (CLIP.from_folder, "text", "is a clip_text_model"),
        (ImageEncoder.from_folder, "text", "no vision tower"),
        (TextEncoder.from_folder, "vision", "no text tower"),
        (ImageClassifier.from_folder, "clip", r"no classifier\.weight"),
        (CLIP.from_folder, "classifier", r"text_model\..* is missing"),
        (TextEncoder.from_folder, "classifier", "no text_projection"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(tmp_path / folder)
        assert str(tmp_path / folder) in str(caught.value)


def test_an_activation_that_nobody_knows_is_named(tmp_path: Path) -> None:
    random_clipseg().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    change_json(path, lambda config: config["text_config"].update(hidden_act="swish2"))
    for kind in (CLIP, TextEncoder, ImageEncoder, CLIPSeg):
        with pytest.raises(CheckpointError, match=r"config\.json: text_config.hidden_act.*swish2"):
            kind.from_folder(tmp_path)


def test_the_loss_needs_pairs() -> None:
    with pytest.raises(ValueError, match="as many images as texts"):
        contrastive_loss(torch.zeros(3, 4))


# ---- image classification ----


def save_classifier(folder: Path, **labels: Any) -> Any:
    config = transformers.CLIPConfig(**SMALL, **labels)
    oracle = random_model(transformers.CLIPForImageClassification, config)
    oracle.save_pretrained(folder)
    return oracle


@pytest.mark.parametrize(
    "labels", [{"id2label": {i: f"a {i}" for i in range(11)}}, {"num_labels": 3}, {}]
)
@torch.inference_mode()
def test_image_classification_equals_the_reference(labels: Any, tmp_path: Path) -> None:
    oracle = save_classifier(tmp_path, **labels)
    model, weights_hash = ImageClassifier.from_folder(tmp_path)
    assert weights_hash == hash_weights(tmp_path)
    pixels = torch.randn(5, 3, 64, 64)
    logits = model(pixels)
    assert_close(logits, oracle(pixels).logits)
    assert dict(enumerate(model.labels)) == oracle.config.id2label
    with pytest.raises(ValueError, match="takes 64 x 64"):
        model(torch.randn(1, 3, 64, 80))
    larger = torch.randn(2, 3, 64, 80)
    wanted = oracle(larger, interpolate_pos_encoding=True).logits
    assert_close(ImageClassifier.from_folder(tmp_path, interpolate=True)[0](larger), wanted)


@pytest.mark.parametrize(
    "labels", [["cat"], {"0": "cat"}, {"0": "cat", "2": "dog"}, {"0": "cat", "1": 5}, {"0": "a"}]
)
def test_labels_that_do_not_fit_the_classes(labels: Any, tmp_path: Path) -> None:
    save_classifier(tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update(id2label=labels))
    with pytest.raises(CheckpointError, match=r"config\.json: id2label must"):
        ImageClassifier.from_folder(tmp_path)


# ---- configurations, and raw images and texts ----

CONFIGS = [
    (TextConfig, transformers.CLIPTextConfig),
    (TextConfig, transformers.CLIPSegTextConfig),
    (VisionConfig, transformers.CLIPVisionConfig),
    (VisionConfig, transformers.CLIPSegVisionConfig),
    (CLIPConfig, transformers.CLIPConfig),
    (CLIPSegConfig, transformers.CLIPSegConfig),
]


# What decides no output: of training, the decoder's activation, which the reference does not read,
# and what a tower is told of its projection, whose weights have that shape.
WITHOUT_EFFECT = {
    "attention_dropout",
    "decoder_attention_dropout",
    "decoder_hidden_act",
    "initializer_factor",
    "initializer_range",
    "projection_dim",
}


@pytest.mark.parametrize(("ours", "reference"), CONFIGS)
def test_defaults_equal_the_reference(ours: Any, reference: Any) -> None:
    wanted = reference()
    known = {field.name for field in dataclasses.fields(ours)}
    of_any_model = transformers.PretrainedConfig().to_dict().keys()
    assert wanted.to_dict().keys() - of_any_model - known <= WITHOUT_EFFECT
    for field in dataclasses.fields(ours):
        if not field.name.endswith("_config"):
            value = getattr(wanted, field.name)
            assert getattr(ours(), field.name) == (
                tuple(value) if isinstance(value, list) else value
            )


@pytest.mark.parametrize(("ours", "reference"), CONFIGS[4:])
def test_configs_of_two_towers(ours: Any, reference: Any) -> None:
    """Made of two towers' configurations, read from transformers', and written for it."""
    parts = {
        name: {k: v for k, v in values.items() if k != "projection_dim"}
        for name, values in (("text_config", TEXT), ("vision_config", VISION))
    }
    oracle = reference(
        text_config=CONFIGS[0][1](**TEXT).to_dict(),
        vision_config=CONFIGS[2][1](**VISION).to_dict(),
        projection_dim=PROJECTION,
    )
    made = ours(
        text_config=TextConfig(**parts["text_config"]),
        vision_config=VisionConfig(**parts["vision_config"]),
        projection_dim=PROJECTION,
        **({"extract_layers": (1, 2)} if ours is CLIPSegConfig else {}),
    )
    if ours is CLIPSegConfig:
        oracle.extract_layers = [1, 2]
    assert ours.from_dict(oracle.to_dict()) == made
    back = reference.from_dict(made.to_dict())
    assert ours.from_dict(back.to_dict()) == made


@torch.inference_mode()
def test_raw_images_and_texts_equal_the_reference(tmp_path: Path) -> None:
    """CLIPProcessor and CLIPModel of a folder, all the way."""
    oracle = random_clip()
    oracle.save_pretrained(tmp_path)
    processor = transformers.CLIPProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path / "vocab")),
    )
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        for size in ((50, 90), (200, 64), (64, 64))
    ]
    texts = ["a photo of a cat", "the red circle, the blue star and 12 dogs", ""]
    inputs = processor(
        text=texts,
        images=images,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=16,
    )
    pixels = ImageProcessor.from_folder(tmp_path)(images)
    ids, mask = Tokenizer.from_folder(tmp_path)(texts, 16, pad_to_longest=True)
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=1e-6, atol=1e-6)
    assert torch.equal(ids, inputs["input_ids"])
    assert torch.equal(mask, inputs["attention_mask"])
    model, _ = CLIP.from_folder(tmp_path)
    assert_close(model(pixels, ids, mask), oracle(**inputs).logits_per_image)


def test_the_parity_table_names_tests_that_exist() -> None:
    """Every proof in the table of transformers' classes is a test in the file it names."""
    root = Path(__file__).parents[1]
    page = (root / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `CLIP")]
    assert len(rows) >= 15
    for row in rows:
        proofs = re.findall(r"(test_\w+)\.py`?: ((?:`?test_\w+`?,? ?)+)", row)
        assert proofs, row
        for file, names in proofs:
            source = (root / "tests" / f"{file}.py").read_text(encoding="utf-8")
            for name in re.findall(r"test_\w+", names):
                assert f"def {name}(" in source, name
