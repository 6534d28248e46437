"""Texts of any number and length: the reference's embeddings, the same bits, within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import transformers

from pipeline.demo import MODEL
from pipeline.errors import UsageError
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.classify import TEXTS_AT_ONCE, encode_labels
from pipeline.infer.device import Device
from pipeline.infer.segment import open_segmenter
from pipeline.infer.texts import describe_cut, describe_vocabulary, encode_texts, find_cut
from pipeline.model.clip import CLIP
from pipeline.model.tokenizer import Tokenizer

LONGEST = 40
TEXTS = ["a cat", "the red star", "", "a dog !!", "12", "a photo of a cat", "red " * 20, "猫 " * 99]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = checkpoints.TEXT | {"max_position_embeddings": LONGEST}
    model = checkpoints.small_clip(text_config=text)
    return checkpoints.write_vocabulary(
        checkpoints.save(model, tmp_path_factory.mktemp("clip") / "clip")
    )


@pytest.fixture(scope="module")
def clip(folder: Path) -> tuple[CLIP, Tokenizer]:
    return CLIP.from_folder(folder)[0], Tokenizer.from_folder(folder)


def encode(clip: tuple[CLIP, Tokenizer], texts: Sequence[str], **more: Any) -> torch.Tensor:
    model, tokenizer = clip
    device = more.pop("device", None) or Device("cpu")
    return encode_texts(model.encode_text, model.text_model, tokenizer, texts, device, **more)


def batching() -> Device:
    """A CPU that takes rows together, as a GPU does."""
    return Device("cpu", together=True)


@torch.inference_mode()
def reference(folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """Each text alone, without padding."""
    oracle = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    rows = [
        tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt") for text in texts
    ]
    return torch.cat([oracle.get_text_features(**row).pooler_output for row in rows])


def test_embeddings_equal_the_reference(folder: Path, clip: tuple[CLIP, Tokenizer]) -> None:
    found = encode(clip, TEXTS)
    torch.testing.assert_close(found, reference(folder, TEXTS), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("batches", [False, True])
def test_what_stands_beside_a_text_changes_no_bit(
    clip: tuple[CLIP, Tokenizer], batches: bool
) -> None:
    """One alone, all together, in another order, twice, and between a hundred others."""
    device = batching() if batches else Device("cpu")
    alone = torch.cat([encode(clip, [text], device=device) for text in TEXTS])
    assert torch.equal(encode(clip, TEXTS, device=device), alone)
    assert torch.equal(encode(clip, TEXTS[::-1], device=device), alone.flip(0))
    assert torch.equal(encode(clip, TEXTS * 2, device=device), alone.repeat(2, 1))
    others = [f"star {i} {'red ' * (i % 37)}" for i in range(100)]
    assert torch.equal(encode(clip, [*others, *TEXTS], device=device)[100:], alone)


def test_slices_have_one_shape_and_tell_how_far_they_are(clip: tuple[CLIP, Tokenizer]) -> None:
    model, tokenizer = clip
    shapes, told = [], []

    def counted(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return model.encode_text(ids, mask)

    texts = [f"{i} {'red ' * (i % 3 * 15)}" for i in range(300)]
    encode_texts(
        counted,
        model.text_model,
        tokenizer,
        texts,
        batching(),
        lambda done, total: told.append((done, total)),
    )
    assert {rows for rows, _ in shapes} == {32}
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)
    assert {length for _, length in shapes} == {16, 24, 40}
    assert told == [(256, 300), (300, 300)]


def test_labels_are_encoded_a_bounded_number_at_once(folder: Path) -> None:
    """Whatever their number, and each the same as alone."""
    counts, told = [], []

    class Counting(OpenModel[CLIP]):
        def encode_texts(self, texts: Sequence[str], on_progress: Any = None) -> torch.Tensor:
            counts.append(len(texts))
            return super().encode_texts(texts, on_progress)

    opened = Counting(str(folder), CLIP.from_folder, Device("cpu"))
    labels = [f"star {i}" for i in range(120)]
    templates = [f"{'a ' * i}photo of {{}}" for i in range(10)]
    vectors = encode_labels(opened, labels, templates, lambda *done: told.append(done))
    assert max(counts) <= TEXTS_AT_ONCE
    assert sum(counts) == 1200
    assert told == [(102, 120), (120, 120)]
    assert np.array_equal(vectors[100:101], encode_labels(opened, ["star 100"], templates))


def test_texts_that_are_cut_are_named(clip: tuple[CLIP, Tokenizer]) -> None:
    model, tokenizer = clip
    fits, long = "red " * (LONGEST - 2), "blue " * LONGEST
    tower = model.text_model
    assert find_cut(tower, tokenizer, [fits, long, "a", long], "prompt") == [long]
    (line,) = describe_cut([long, "b"], "prompt", LONGEST)
    assert line.startswith("2 prompts are longer than the 38 tokens that the model reads: 'blue ")
    assert len(line) < 200
    assert describe_cut([], "prompt", LONGEST) == []
    for others in ([fits, fits + "star"], [fits + "star", fits], [long + "a", long + "b"]):
        with pytest.raises(UsageError, match="do not differ in the 38 tokens that the model reads"):
            find_cut(tower, tokenizer, others, "prompt")
    # Equal to the model, but for no reason of length.
    assert find_cut(tower, tokenizer, [fits, fits.upper()], "prompt") == []
    # With a template that leaves room, the labels differ.
    some = [fits[:-4] + "cat", fits[:-4] + "dog"]
    with pytest.raises(UsageError, match="the labels"):
        find_cut(tower, tokenizer, some, "label", ["a {}"])
    assert find_cut(tower, tokenizer, some, "label", ["a {}", "{}"]) == some


def test_prompts_tell_what_was_cut(tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.small_clipseg(), tmp_path / "clipseg")
    checkpoints.write_vocabulary(folder)
    size = {"height": 64, "width": 64}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size}
    folder = checkpoints.copy_with(folder, tmp_path / "all", preprocessor_config=processor)
    assert open_segmenter(str(folder), ["a cat"]).notes == ()
    (note,) = open_segmenter(str(folder), ["a cat", "red " * 20]).notes
    assert note.startswith("1 prompt is longer than the 14 tokens that the model reads: 'red red")
    with pytest.raises(UsageError, match="the prompts 'red red"):
        open_segmenter(str(folder), ["red " * 20, "red " * 30])


def test_a_tokenizer_with_fewer_tokens_than_the_model(
    tmp_path: Path, clip: tuple[CLIP, Tokenizer]
) -> None:
    model, tokenizer = clip
    assert describe_vocabulary(model.text_model, tokenizer) == []
    text = checkpoints.TEXT | {"vocab_size": 560}
    checkpoints.save(checkpoints.small_clip(text_config=text), tmp_path)
    larger = CLIP.from_folder(tmp_path)[0].text_model
    (line,) = describe_vocabulary(larger, tokenizer)
    assert "the tokenizer has 557 tokens and the model 560" in line


def test_words_that_the_bundled_model_never_saw_are_named() -> None:
    """It finds something for every word; a folder's own name is nobody's."""
    words = ["a purple star", "cat", "small dog"]
    (note,) = open_segmenter("demo", words).notes
    vocabulary = "not in the bundled model's vocabulary, of coloured shapes"
    assert note == f"2 prompts are {vocabulary}: 'cat', 'small dog'"
    assert open_segmenter("demo", words[:1]).notes == ()
    assert open_segmenter(str(MODEL), words).notes == ()
