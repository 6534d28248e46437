"""Our CLIPSeg against transformers' on checkpoints that transformers saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import TEXT, write_vocabulary
from compare import TOLERANCE, assert_close, token_ids
from PIL import Image
from torch import Tensor, nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.model.clipseg import CLIPSeg, segmentation_loss
from pipeline.model.tokenizer import Tokenizer
from pipeline.prepare.processor import ImageProcessor

SMALL_TEXT = {
    "vocab_size": 99,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 98,
}
SMALL_VISION = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "image_size": 64,
    "patch_size": 16,
}
SMALL = {
    "text_config": SMALL_TEXT,
    "vision_config": SMALL_VISION,
    "projection_dim": 28,
    "reduce_dim": 12,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 33,
    "extract_layers": [1, 2, 3],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "simple": {},
    "complex": {"use_complex_transposed_convolution": True},
    "legacy_eos": {"text_config": SMALL_TEXT | {"eos_token_id": 2}},
    "conditional_1": {"conditional_layer": 1},
    "conditional_2_complex": {"conditional_layer": 2, "use_complex_transposed_convolution": True},
    "two_layers": {"extract_layers": [0, 2]},
    "one_layer": {"extract_layers": [3]},
    "patch_32": {"vision_config": SMALL_VISION | {"patch_size": 32, "image_size": 96}},
    "gelu": {"vision_config": SMALL_VISION | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}},
}


def save_oracle(folder: Path, **config: Any) -> transformers.CLIPSegForImageSegmentation:
    """Transformers' model with random weights whose logits are of order 1, saved to `folder`."""
    torch.manual_seed(0)
    model = transformers.CLIPSegForImageSegmentation(transformers.CLIPSegConfig(**config)).eval()
    for module in model.decoder.modules():
        # Its own initialisation (standard deviation 1) gives logits up to thousands.
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm):
            module.reset_parameters()
    model.decoder.film_mul.weight.data *= 10
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory) -> tuple[transformers.CLIPSegForImageSegmentation, CLIPSeg]:
    """The oracle and ours with the same weights; the parameter is the config."""
    folder = tmp_path_factory.mktemp("checkpoint")
    oracle = save_oracle(folder, **request.param)
    return oracle, CLIPSeg.from_folder(folder)[0]


small = pytest.mark.parametrize(
    "pair", [SMALL | v for v in VARIANTS.values()], ids=list(VARIANTS), indirect=True
)
simple = pytest.mark.parametrize("pair", [SMALL], ids=["simple"], indirect=True)


def assert_prompts_matter(logits: Tensor) -> None:
    """Logits (B, P, H, W) that differ from prompt to prompt, so that a mix-up would show."""
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 100 * TOLERANCE * logits.abs().max()


@torch.inference_mode()
def reference_logits(oracle: Any, pixels: Tensor, **prompts: Tensor) -> Tensor:
    """The oracle once per prompt, every image with it: (B, P, H, W)."""
    count = len(next(iter(prompts.values())))
    columns = []
    for i in range(count):
        one = {k: v[i : i + 1].expand(len(pixels), *v.shape[1:]) for k, v in prompts.items()}
        logits = oracle(pixel_values=pixels, **one).logits
        columns.append(logits.reshape(len(pixels), *logits.shape[-2:]))
    return torch.stack(columns, 1)


@small
@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (1, 3), (3, 1), (2, 5)])
@torch.inference_mode()
def test_text_prompts_equal_the_reference(pair, images: int, prompts: int) -> None:
    oracle, model = pair
    pixels = torch.randn(images, 3, 96, 96)
    ids, mask = token_ids(prompts, 9, 99)
    conditional = model.encode_text(ids, mask)
    assert_close(conditional, oracle.clip.get_text_features(ids, mask).pooler_output)
    logits = model(pixels, conditional)
    assert_close(logits, reference_logits(oracle, pixels, input_ids=ids, attention_mask=mask))
    if prompts > 1:
        assert_prompts_matter(logits)


@small
@torch.inference_mode()
def test_image_prompts_equal_the_reference(pair) -> None:
    oracle, model = pair
    pixels, prompt = torch.randn(2, 3, 96, 96), torch.randn(2, 3, 64, 64)
    conditional = model.encode_image(prompt)
    assert_close(conditional, oracle.clip.get_image_features(prompt).pooler_output)
    reference = reference_logits(oracle, pixels, conditional_pixel_values=prompt)
    assert_close(model(pixels, conditional), reference)


@small
@torch.inference_mode()
def test_embedding_prompts_equal_the_reference(pair) -> None:
    oracle, model = pair
    pixels, conditional = torch.randn(2, 3, 64, 64), torch.randn(4, 28)
    logits = model(pixels, conditional)
    reference = reference_logits(oracle, pixels, conditional_embeddings=conditional)
    assert_close(logits, reference)
    assert_prompts_matter(logits)


@small
def test_loss_equals_the_reference(pair) -> None:
    oracle, model = pair
    pixels, conditional = torch.randn(3, 3, 64, 64), torch.randn(3, 28)
    labels = (torch.rand(3, 64, 64) > 0.5).float()
    if oracle.config.vision_config.patch_size == 32:
        labels = labels[:, :64, :64]
    reference = oracle(pixel_values=pixels, conditional_embeddings=conditional, labels=labels).loss
    loss = segmentation_loss(model(pixels, conditional[:, None])[:, 0], labels)
    assert loss.item() == pytest.approx(reference.item(), rel=TOLERANCE)
    loss.backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    model.zero_grad()


@simple
@torch.inference_mode()
def test_each_image_may_have_prompts_of_its_own(pair) -> None:
    oracle, model = pair
    pixels, conditional = torch.randn(3, 3, 64, 64), torch.randn(3, 28)
    reference = oracle(pixel_values=pixels, conditional_embeddings=conditional).logits
    assert_close(model(pixels, conditional[:, None])[:, 0], reference)


@simple
@torch.inference_mode()
def test_slices_do_not_change_the_result(pair) -> None:
    _, model = pair
    pixels, conditional = torch.randn(3, 3, 64, 64), torch.randn(7, 28)
    whole = model(pixels, conditional)
    activations, grid = model.activations(pixels), model.grid(pixels)
    assert_close(model.decode(activations, conditional, grid, pairs_at_once=4), whole)


@simple
@torch.inference_mode()
def test_an_image_is_encoded_once_and_only_as_deep_as_masks_need(pair) -> None:
    _, model = pair
    calls: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(model.clip.vision_model.encoder.layers)
    ]
    hooks += [r.register_forward_hook(lambda *_: calls.append(-1)) for r in model.decoder.reduces]
    model(torch.randn(2, 3, 64, 64), torch.randn(9, 28))
    model.clip.vision_model.activations(torch.randn(2, 3, 64, 64), (0, 1))
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 2, 3, -1, -1, -1, 0, 1]


@small
@pytest.mark.parametrize("size", [(64, 128), (96, 32), (32, 128), (160, 64)])
@torch.inference_mode()
def test_inputs_that_are_not_square(pair, size: tuple[int, int]) -> None:
    """The reference refuses these, or returns another shape; its parts do take them."""
    oracle, model = pair
    pixels, conditional = torch.randn(2, 3, *size), torch.randn(2, 28)
    logits = model(pixels, conditional)
    assert logits.shape == (2, 2, *size)
    # The reference's vision tower is right for any size; its decoder up to its last reshape.
    states = oracle.clip.vision_model(pixels, output_hidden_states=True).hidden_states
    for ours, layer in zip(model.activations(pixels), oracle.config.extract_layers, strict=True):
        assert_close(ours, states[layer + 1])
    # A mask follows its picture when both are turned: no axis is mixed up with the other.
    patch = oracle.config.vision_config.patch_size
    assert model.grid(pixels) == (size[0] // patch, size[1] // patch)


@simple
@torch.inference_mode()
def test_rows_and_columns_stay_apart(pair) -> None:
    """With positions and kernels made symmetric, turning the input turns the mask."""
    _, model = pair
    vision = model.clip.vision_model.embeddings
    vision.position_embedding.weight.zero_()
    kernel = vision.patch_embedding.weight
    kernel.copy_((kernel + kernel.transpose(2, 3)) / 2)
    upsample = model.decoder.transposed_convolution.weight
    upsample.copy_((upsample + upsample.transpose(2, 3)) / 2)
    pixels, conditional = torch.randn(1, 3, 64, 128), torch.randn(1, 28)
    assert_close(model(pixels.mT.contiguous(), conditional), model(pixels, conditional).mT)


@torch.inference_mode()
def test_raw_images_texts_and_visual_prompts_equal_the_reference(tmp_path: Path) -> None:
    """CLIPSegProcessor and the model of a folder, all the way; a visual prompt is an image."""
    oracle = save_oracle(tmp_path, **SMALL | {"text_config": TEXT})
    processor = transformers.CLIPSegProcessor(
        image_processor=ViTImageProcessorPil(size=96),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path / "vocab")),
    )
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    images, prompts = (
        [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
        for sizes in (((50, 90), (200, 64)), ((30, 30), (96, 20)))
    )
    model, _ = CLIPSeg.from_folder(tmp_path)
    resize, tokenize = ImageProcessor.from_folder(tmp_path), Tokenizer.from_folder(tmp_path)
    texts = ["a cat", "the red circle"]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    conditional = model.encode_text(*tokenize(texts, 16, pad_to_longest=True))
    # The reference takes the i-th prompt for the i-th image.
    logits = model(resize(images), conditional[:, None])[:, 0]
    assert_close(logits, oracle(**inputs).logits)
    inputs = processor(visual_prompt=prompts, images=images, return_tensors="pt")
    conditional = model.encode_image(resize(prompts))
    logits = model(resize(images), conditional[:, None])[:, 0]
    assert_close(logits, oracle(**inputs).logits)


def test_too_many_tokens_are_refused(tmp_path: Path) -> None:
    save_oracle(tmp_path, **SMALL)
    model, _ = CLIPSeg.from_folder(tmp_path)
    with pytest.raises(ValueError, match="at most 16"):
        model.encode_text(torch.zeros(1, 17, dtype=torch.int64))


FULL = {
    "rd16": {"reduce_dim": 16},
    "rd64": {"reduce_dim": 64},
    "rd64-refined": {"reduce_dim": 64, "use_complex_transposed_convolution": True},
}


@pytest.mark.parametrize(  # the simple decoder is held against the reference at small sizes, too
    "variant",
    [*(pytest.param(v, marks=pytest.mark.soak) for v in ("rd16", "rd64")), "rd64-refined"],
)
@torch.inference_mode()
def test_full_size_equals_the_reference(variant: str, tmp_path: Path) -> None:
    config = {
        "text_config": {"eos_token_id": 2, "bos_token_id": 0},
        "vision_config": {"patch_size": 16},
    }
    oracle = save_oracle(tmp_path, **config, **FULL[variant])
    model, _ = CLIPSeg.from_folder(tmp_path)
    pixels = torch.randn(1, 3, 352, 352)
    ids, mask = token_ids(2, 12, 49408)
    conditional = model.encode_text(ids, mask)
    assert_close(conditional, oracle.clip.get_text_features(ids, mask).pooler_output)
    image = model.encode_image(pixels[..., :224, :224])
    assert_close(image, oracle.clip.get_image_features(pixels[..., :224, :224]).pooler_output)
    reference = reference_logits(oracle, pixels, input_ids=ids, attention_mask=mask)
    assert reference.shape == (1, 2, 352, 352)
    assert_close(model(pixels, conditional), reference)
