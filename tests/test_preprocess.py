"""Pixels equal transformers' image processors (PIL backend), whatever the size of the photo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline.errors import CheckpointError
from pipeline.prepare import resize
from pipeline.prepare.processor import ImageProcessor

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
ORACLES = {
    "clip": CLIPImageProcessorPil(),
    "clip-336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
    "clip-small": CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=(45, 33)),
    "clip-box": CLIPImageProcessorPil(size={"height": 21, "width": 50}, do_center_crop=False),
    "clip-crop-only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 64, "width": 99}),
    "clipseg": ViTImageProcessorPil(size={"height": 352, "width": 352}, **IMAGENET),
    "clipseg-no-rescale": ViTImageProcessorPil(size=32, do_rescale=False, **IMAGENET),
    "clipseg-no-normalize": ViTImageProcessorPil(size=32, do_normalize=False),
    "clipseg-raw": ViTImageProcessorPil(size=32, do_rescale=False, do_normalize=False),
    "vit-lanczos": ViTImageProcessorPil(size=57, resample=1, rescale_factor=0.01),
    "vit-nearest": ViTImageProcessorPil(size=57, resample=0),
    "vit-crop": ViTImageProcessorPil(size=57, do_center_crop=True, crop_size=40),
}


def config_of(oracle: Any) -> dict[str, Any]:
    return json.loads(oracle.to_json_string())


def ours(processor: ImageProcessor, image: Image.Image) -> np.ndarray:
    return processor.normalize(torch.from_numpy(processor.resize(image))[None]).numpy()


def assert_equal_to_oracle(oracle: Any, image: Image.Image) -> None:
    expected = oracle(image, return_tensors="np")["pixel_values"].astype(np.float32)
    actual = ours(ImageProcessor.from_dict(config_of(oracle)), image)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    # Without the rescale the values reach 1,000, where float32 itself steps by 6e-5.
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("photo", ["astronaut", "coffee", "chelsea", "rocket"])
def test_photos_equal_the_oracle(name: str, photo: str) -> None:
    assert_equal_to_oracle(ORACLES[name], Image.fromarray(getattr(skimage.data, photo)()))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ORACLES)), st.integers(1, 200), st.integers(1, 200), st.integers(0, 9)
)
@example("clip", 1, 1, 0)
@example("clip", 1, 300, 0)
@example("clip", 300, 1, 0)
@example("clip", 2, 1999, 0)
@example("clip", 223, 225, 0)
@example("clip", 224, 224, 0)
@example("clipseg", 1, 1, 0)
@example("clipseg", 1, 300, 0)
@example("clipseg", 3000, 2, 0)
@example("clipseg", 352, 352, 0)
@example("clip-crop-only", 63, 100, 0)
@example("clip-crop-only", 1, 1, 0)
def test_any_size_equals_the_oracle(name: str, height: int, width: int, seed: int) -> None:
    assert_equal_to_oracle(ORACLES[name], random_image(height, width, seed))


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    resized=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    crop=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    resample=st.integers(0, 5),
    piece=st.sampled_from([1, 700, 5000]),
)
@example((1, 1000), (21, 21000), (21, 21), 3, 1 << 15)
@example((1000, 1), (21000, 21), (21, 21), 1, 1 << 15)
@example((1000, 2), (33, 1), (40, 40), 3, 1)
@example((50, 40), (60, 9), (33, 33), 1, 1)
def test_what_is_kept_of_a_large_result_is_pillows(
    size: tuple[int, int],
    resized: tuple[int, int],
    crop: tuple[int, int],
    resample: int,
    piece: int,
) -> None:
    image = random_image(*size)
    whole = image.resize(resized[::-1], Image.Resampling(resample))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize, "PIECE_PX", piece)
        patch.setattr(resize, "LEAST_LINES", 1)
        kept = resize.resize_and_crop(image, resized, crop, resample)
    assert np.array_equal(kept, resize.crop_center(whole, crop))


def test_a_batch_is_normalised_like_its_images() -> None:
    processor = ImageProcessor.from_dict(config_of(ORACLES["clipseg"]))
    batch = torch.from_numpy(np.stack([processor.resize(random_image(40, 50, s)) for s in (1, 2)]))
    before = batch.clone()
    together = processor.normalize(batch)
    assert together.shape == (2, 3, 352, 352)
    assert together.is_contiguous()
    assert torch.equal(together[1:], processor.normalize(batch[1:]))
    assert torch.equal(batch, before)


def test_the_half_that_travels_is_uint8() -> None:
    pixels = ImageProcessor.from_dict(config_of(ORACLES["clip"])).resize(random_image(50, 60))
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_other_modes_are_converted_only_where_the_config_says_so(mode: str) -> None:
    image = random_image(30, 40).convert(mode)
    clip = ImageProcessor.from_dict(config_of(ORACLES["clip"]))
    expected = ORACLES["clip"](image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(clip, image), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=f"mode {mode}"):
        ImageProcessor.from_dict(config_of(ORACLES["clipseg"])).resize(image)


OPTIONS: list[dict[str, Any]] = [
    {"do_resize": False},
    {"do_resize": False, "do_center_crop": False},
    {"size": {"shortest_edge": 97}},
    {"size": {"height": 230, "width": 301}},
    *({"resample": resample} for resample in range(6)),
    {"do_center_crop": False},
    {"crop_size": {"height": 50, "width": 260}},
    {"crop_size": 111},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5},
    {"do_normalize": False},
    {"image_mean": [0.1, 0.5, 0.9]},
    {"image_std": [0.2, 0.7, 3.0]},
    {"image_mean": 0.5, "image_std": 0.25},
    {"do_convert_rgb": False},
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_equals_the_oracle(option: dict[str, Any]) -> None:
    for size in ((120, 333), (260, 241)):
        assert_equal_to_oracle(CLIPImageProcessorPil(**option), random_image(*size))


@pytest.mark.parametrize("name", ORACLES)
def test_batches_of_differing_sizes_equal_the_oracle(name: str) -> None:
    images = [random_image(*size) for size in ((40, 90), (90, 40), (64, 64), (300, 20))]
    processor = ImageProcessor.from_dict(config_of(ORACLES[name]))
    expected = ORACLES[name](images, return_tensors="np")["pixel_values"]
    pixels = processor(images)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("do_resize", [True, False])
def test_images_without_a_common_size_are_grouped_by_it(do_resize: bool) -> None:
    oracle = CLIPImageProcessorPil(
        do_resize=do_resize, size={"shortest_edge": 60}, do_center_crop=False
    )
    processor = ImageProcessor.from_dict(config_of(oracle))
    images = [random_image(*size, i) for i, size in enumerate([(60, 90), (60, 70), (60, 90)])]
    groups = processor.group_by_size(images)
    assert {size: indices for size, (indices, _) in groups.items()} == {
        (60, 90): [0, 2],
        (60, 70): [1],
    }
    expected = oracle(images)["pixel_values"]
    for indices, pixels in groups.values():
        for i, image in zip(indices, pixels, strict=True):
            np.testing.assert_allclose(image, expected[i], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="one size, found 60 x 90, 60 x 70"):
        processor(images)
    with pytest.raises(ValueError, match="found no images"):
        processor([])


# ---- configs ----


@pytest.mark.parametrize("name", ["clip", "clipseg"])
def test_folders_the_oracle_saved(tmp_path: Path, name: str) -> None:
    ORACLES[name].save_pretrained(tmp_path)
    assert ImageProcessor.from_folder(tmp_path) == ImageProcessor.from_dict(
        config_of(ORACLES[name])
    )


def test_nested_processor_config_goes_first(tmp_path: Path) -> None:
    nested = {"image_processor": config_of(ORACLES["clip-336"]), "processor_class": "CLIPProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config_of(ORACLES["clip"])))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert ImageProcessor.from_folder(tmp_path).image_size == (224, 224)
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert ImageProcessor.from_folder(tmp_path).image_size == (336, 336)


def test_ints_in_old_files_mean_what_they_meant() -> None:
    clip = ImageProcessor.from_dict(
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 96, "crop_size": 64}
    )
    assert (clip.size, clip.crop_size, clip.image_size) == (96, (64, 64), (64, 64))
    vit = ImageProcessor.from_dict({"feature_extractor_type": "ViTFeatureExtractor", "size": 352})
    assert (vit.size, vit.image_size) == ((352, 352), (352, 352))


@pytest.mark.parametrize("kind", ["CLIP", "ViT"])
@pytest.mark.parametrize("value", [None, "absent"])
def test_absent_and_null_fields_take_the_defaults_of_the_class(kind: str, value: object) -> None:
    oracle = CLIPImageProcessorPil() if kind == "CLIP" else ViTImageProcessorPil()
    config: dict[str, Any] = {"image_processor_type": f"{kind}ImageProcessorFast"}
    if value is None:
        config |= dict.fromkeys(("size", "resample", "image_mean", "image_std", "do_rescale"))
    image = random_image(31, 47)
    expected = oracle(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours(ImageProcessor.from_dict(config), image), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_resize", "yes"),
        ("do_center_crop", 1),
        ("size", {"width": 3}),
        ("size", {"longest_edge": 3}),
        ("size", {"height": 0, "width": 3}),
        ("size", 10**12),
        ("size", [352, 352]),
        ("size", True),
        ("crop_size", {"shortest_edge": 224}),
        ("crop_size", -1),
        ("resample", 6),
        ("resample", "bicubic"),
        ("rescale_factor", "1/255"),
        ("rescale_factor", float("nan")),
        ("image_mean", True),
        ("image_std", 0),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [0.5, 10**400, 0.5]),
        ("do_pad", True),
        ("image_processor_type", "ConvNextImageProcessor"),
    ],
)
def test_malformed_fields_are_named(tmp_path: Path, field: str, value: object) -> None:
    config = config_of(ORACLES["clip"]) | {field: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        ImageProcessor.from_folder(tmp_path)
    assert "preprocessor_config.json" in str(caught.value)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\xff", "[" * 100_000])
def test_unreadable_files_are_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_folder(tmp_path)


@pytest.mark.parametrize("change", [{"do_resize": False}, {"size": {"shortest_edge": 32}}])
def test_without_a_common_size_image_size_says_so(change: dict[str, Any]) -> None:
    processor = ImageProcessor.from_dict(config_of(ORACLES["clipseg"]) | change)
    assert processor.resize(random_image(64, 64)).shape[2] == 3
    with pytest.raises(CheckpointError, match="no common size"):
        _ = processor.image_size
