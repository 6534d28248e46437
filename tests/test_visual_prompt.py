"""Example images as prompts: prepared as the original does, encoded as transformers does."""

from __future__ import annotations

import io
import json
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

from pipeline.config.prompt import VISUAL_MODES, Example, Prompt
from pipeline.errors import UsageError
from pipeline.infer.segment import open_segmenter
from pipeline.infer.visual_prompt import open_example, prepare_example, read_embedding
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.processor import ImageProcessor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PROCESSOR = ImageProcessor.from_dict(
    {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 64, "width": 64},
        "image_mean": MEAN,
        "image_std": STD,
    }
)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def blob(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), np.bool_)
    top, left, bottom, right = box
    mask[top:bottom, left:right] = True
    mask[top, left] = False
    return mask


def gaussian_blur(image: np.ndarray) -> np.ndarray:
    """(h, w, 3): 15 x 15, sigma 3, mirrored borders, as one sum over the window."""
    one = np.exp(-(np.arange(-7, 8) ** 2) / 18)
    window = np.outer(one, one) / np.outer(one, one).sum()
    padded = np.pad(image, ((7, 7), (7, 7), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (15, 15), axis=(0, 1))
    return np.einsum("hwcij,ij->hwc", windows, window)


def as_the_original(
    image: Image.Image, mask: np.ndarray, side: int, *, crop: bool, blur: bool, background: float
) -> np.ndarray:
    """(3, side, side) of an image whose shorter side is `side` already, step by step."""
    normal = (np.asarray(image) / 255 - MEAN) / STD
    outside = background * (gaussian_blur(normal) if blur else normal)
    shown = np.where(mask[..., None], normal, outside)
    if crop:
        ys, xs = np.nonzero(mask)
        height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
        top, bottom = ys.min() - 0.1 * height, ys.max() + 1 + 0.1 * height
        left, right = xs.min() - 0.1 * width, xs.max() + 1 + 0.1 * width
        shown = shown[int(max(0, top)) : int(bottom), int(max(0, left)) : int(right)]
    height, width = shown.shape[:2]
    square = np.zeros((max(height, width),) * 2 + (3,))
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = shown
    tensor = torch.from_numpy(square).permute(2, 0, 1)[None]
    return F.interpolate(tensor, size=(side, side))[0].numpy()  # nearest


STEPS = {
    "crop_blur_highlight": {"crop": True, "blur": True, "background": 0.1},
    "crop": {"crop": True, "blur": False, "background": 1},
    "blur_highlight": {"crop": False, "blur": True, "background": 0.1},
    "blur": {"crop": False, "blur": True, "background": 1},
    "highlight": {"crop": False, "blur": False, "background": 0.1},
    "image": {"crop": False, "blur": False, "background": 1},
}
# Of images whose shorter side is the model's input: 64.
CASES = [((64, 64), (10, 20, 41, 33)), ((64, 90), (0, 3, 64, 88)), ((100, 64), (95, 60, 100, 64))]


@pytest.mark.parametrize("mode", VISUAL_MODES)
@pytest.mark.parametrize(("size", "box"), CASES)
def test_examples_are_prepared_as_the_original_does(
    mode: str, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image, mask = picture(*size), blob(*size, box)
    found = prepare_example(image, mask, PROCESSOR, mode)
    assert (found.shape, found.dtype) == ((3, 64, 64), torch.float32)
    expected = as_the_original(image, mask, 64, **STEPS[mode])  # type: ignore[arg-type]
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_examples_come_to_the_scale_of_the_input() -> None:
    image, mask = picture(128, 256), blob(128, 256, (20, 30, 90, 100))
    small = image.resize((128, 64), Image.Resampling.BILINEAR)
    found = prepare_example(image, mask, PROCESSOR, "crop_blur_highlight")
    expected = prepare_example(small, mask[::2, ::2], PROCESSOR, "crop_blur_highlight")
    assert torch.equal(found, expected)
    # No example is too long, too thin or too small to be shown.
    for size in ((1, 1000), (1000, 1), (1, 1), (4000, 4000)):
        dot = np.zeros(size, np.bool_)
        dot[-1, -1] = True
        pixels = prepare_example(picture(*size), dot, PROCESSOR, "crop_blur_highlight")
        assert (pixels.shape, bool(torch.isfinite(pixels).all())) == ((3, 64, 64), True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save(checkpoints.small_clipseg(), folder)
    checkpoints.write_vocabulary(folder)
    config = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def example(tmp_path: Path) -> Example:
    picture(80, 64).save(tmp_path / "a.png")
    Image.fromarray(blob(80, 64, (10, 10, 40, 50))).save(tmp_path / "m.png")
    return Example(file=f"{tmp_path}/a.png", mask=f"{tmp_path}/m.png")


def conditional(folder: Path, *prompts: Prompt) -> np.ndarray:
    return open_segmenter(str(folder), prompts).conditional


def test_the_embedding_is_transformers(checkpoint: Path, example: Example) -> None:
    model, _ = CLIPSeg.from_folder(checkpoint)
    processor = ImageProcessor.from_folder(checkpoint)
    pixels = prepare_example(*open_example(example, 10**6), processor, example.mode)[None]
    oracle = checkpoints.small_clipseg()
    with torch.inference_mode():
        expected = oracle.get_conditional_embeddings(1, conditional_pixel_values=pixels)
        query = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        logits = oracle(pixel_values=query, conditional_pixel_values=pixels).logits
        found = conditional(checkpoint, Prompt(name="x", examples=(example,)))
        ours = model(query, torch.from_numpy(found))
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert (ours.squeeze() - logits.squeeze()).abs().max() < 1e-4


def test_texts_and_examples_mix_by_weight(
    checkpoint: Path, example: Example, tmp_path: Path
) -> None:
    picture(64, 64, 5).save(tmp_path / "b.png")
    other = Example(file=f"{tmp_path}/b.png", mode="image", weight=3)
    texts = ("a cat", "a red dog")
    cat, dog, one, two, text, both, all_of_it = conditional(
        checkpoint,
        *(Prompt(name=t, texts=(t,)) for t in texts),
        Prompt(name="one", examples=(example,)),
        Prompt(name="two", examples=(other,)),
        Prompt(name="text", texts=texts),
        Prompt(name="both", examples=(example, other)),
        Prompt(name="all", texts=texts, examples=(example, other)),
    )
    assert (
        np.abs(cat - conditional(checkpoint, Prompt(name="a cat", texts=("a cat",)))).max() < 1e-6
    )
    assert text == pytest.approx((cat + dog) / 2, abs=1e-6)
    assert both == pytest.approx((one + 3 * two) / 4, abs=1e-6)
    assert all_of_it == pytest.approx((text + one + 3 * two) / 5, abs=1e-6)
    np.save(tmp_path / "e.npy", np.stack([one, two]))
    save_file({"x": two.astype(np.float16)}, tmp_path / "e.safetensors")
    mean, half = conditional(
        checkpoint,
        Prompt(name="mean", examples=(Example(embedding=f"{tmp_path}/e.npy"),)),
        Prompt(name="half", examples=(Example(embedding=f"{tmp_path}/e.safetensors"),)),
    )
    assert mean == pytest.approx((one + two) / 2, abs=1e-6)
    assert half == pytest.approx(two, rel=1e-2, abs=1e-3)


def test_a_box_is_a_mask(tmp_path: Path) -> None:
    picture(50, 40).save(tmp_path / "a.png")
    image, mask = open_example(Example(file=f"{tmp_path}/a.png", box=(30, 5, 100, 10)), 10**6)
    assert mask.shape == (image.height, image.width) == (50, 40)
    assert mask[5:15, 30:].all()
    assert mask.sum() == 100
    with pytest.raises(UsageError, match="lies outside the upright image of 50 x 40"):
        open_example(Example(file=f"{tmp_path}/a.png", box=(40, 5, 10, 10)), 10**6)


def test_examples_that_cannot_be_used_are_named(tmp_path: Path, example: Example) -> None:
    Image.new("L", (64, 80)).save(tmp_path / "black.png")
    Image.new("L", (80, 64), 255).save(tmp_path / "turned.png")
    (tmp_path / "text.png").write_text("hello")
    for mask, says in [
        ("black.png", "black.png: the mask is black everywhere"),
        ("turned.png", "turned.png: 64 x 80 pixels, but the upright image"),
        ("text.png", "text.png: not_an_image"),
        ("none.png", "none.png: cannot be read"),
    ]:
        with pytest.raises(UsageError, match=says):
            open_example(Example(file=example.file, mask=f"{tmp_path}/{mask}"), 10**6)
    with pytest.raises(UsageError, match="too_many_pixels"):
        open_example(example, 100)


def test_embeddings_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    for value, says in [
        (np.zeros(5), "embeddings of 5 numbers, the model's have 4"),
        (np.zeros((0, 4)), "needs floats"),
        (np.zeros((2, 2, 4)), "needs floats"),
        (np.zeros(4, np.int64), "needs floats"),
        (np.array([None] * 4), "not readable"),
    ]:
        np.save(tmp_path / "e.npy", value, allow_pickle=True)
        with pytest.raises(UsageError, match=says):
            read_embedding(f"{tmp_path}/e.npy", 4)
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<f4", "fortran_order": False, "shape": (10**15, 4)}
    )
    (tmp_path / "e.npy").write_bytes(huge.getvalue())
    with pytest.raises(UsageError, match="not readable"):
        read_embedding(f"{tmp_path}/e.npy", 4)
    save_file({"a": np.zeros(4), "b": np.zeros(4)}, tmp_path / "e.safetensors")
    with pytest.raises(UsageError, match="holds 2 tensors"):
        read_embedding(f"{tmp_path}/e.safetensors", 4)
    (tmp_path / "e.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UsageError, match="not readable"):
        read_embedding(f"{tmp_path}/e.safetensors", 4)
