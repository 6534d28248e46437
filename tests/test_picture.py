"""CLIPSeg on a single picture: transformers' processor and model decide."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from pipeline import CLIPSeg
from pipeline.errors import CheckpointError, UsageError

PROMPTS = ["a cat", "a red star"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = checkpoints.small_clipseg()
    model.decoder.film_mul.weight.data *= 10  # masks that differ from prompt to prompt
    checkpoints.save(model, folder)
    checkpoints.write_vocabulary(folder)
    config = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()).resize((113, 75))


def reference(checkpoint: Path, picture: Image.Image) -> np.ndarray:
    """Probabilities (P, H, W) of transformers' processor and model."""
    processor = transformers.CLIPSegProcessor(
        transformers.ViTImageProcessorPil.from_pretrained(checkpoint),
        transformers.CLIPTokenizer.from_pretrained(checkpoint),
    )
    inputs = processor(
        text=PROMPTS, images=[picture] * len(PROMPTS), padding=True, return_tensors="pt"
    )
    model = transformers.CLIPSegForImageSegmentation.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        logits = model(**inputs).logits
    size = (picture.height, picture.width)
    return F.interpolate(logits[:, None], size=size, mode="bilinear")[:, 0].sigmoid().numpy()


def test_masks_are_those_of_transformers(checkpoint: Path, picture: Image.Image) -> None:
    expected = reference(checkpoint, picture)
    threshold = float(np.median(expected))
    found = CLIPSeg.from_pretrained(checkpoint)(picture, PROMPTS, threshold=threshold)
    assert found.probabilities.dtype == np.float32
    assert found.masks.shape == found.probabilities.shape == (2, 75, 113)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    clear = np.abs(expected - threshold) > 1e-5
    assert found.masks.dtype == bool
    assert (found.masks == (expected > threshold))[clear].all()
    assert 0 < found.masks.mean() < 1


def test_several_pictures_any_mode_and_upright(checkpoint: Path, picture: Image.Image) -> None:
    model = CLIPSeg.from_pretrained(str(checkpoint))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned back for the viewer
    grey = picture.convert("L")
    alone, of_turned, of_grey = model([picture, turned, grey], "a cat")
    np.testing.assert_array_equal(alone.masks, model(picture, ["a cat"]).masks)
    np.testing.assert_array_equal(of_turned.probabilities, alone.probabilities)
    again = model(grey.convert("RGB"), "a cat")
    np.testing.assert_array_equal(of_grey.probabilities, again.probabilities)


def test_what_cannot_be_asked_is_told(checkpoint: Path, picture: Image.Image) -> None:
    model = CLIPSeg.from_pretrained(checkpoint)
    for prompts, threshold, says in (
        ([], 0.5, "at least one prompt"),
        (["a cat", " "], 0.5, "none of them empty"),
        (["a cat", "a cat"], 0.5, "given twice"),
        ("a cat", 1.5, "between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=says):
            model(picture, prompts, threshold=threshold)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CLIPSeg.from_pretrained(checkpoint.parent)
