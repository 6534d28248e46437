"""Run checkpoints over the same images in many ways; every float must have the same bits.

    python tests/same_bits.py CHECKPOINT ...

Exits with 1 and says what differs. A process of its own, because torch chooses its kernels by
environment variables at its start: see test_same_bits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import schema
from pipeline.config.classify import ClassifyConfig
from pipeline.config.fine import FineOptions
from pipeline.infer.classify import ClassifyImages, open_classifier
from pipeline.infer.embed import EmbedImages, open_embedder
from pipeline.infer.segment import SegmentImages, open_segmenter

PROMPTS = [f"a red {'star ' * (i % 4)}{'!' * (i % 3)} {i}" for i in range(20)]
# (threads, images, prompts): the image 0 alone, at the end of three and among sixteen. One of two
# actors on two CPUs has one thread.
RUNS = ((1, [0], 20), (2, [1, 2, 0], 3), (2, [3, 1, *range(4, 16), 0, 2], 1))

Values = Iterator[tuple[tuple[str | int, ...], np.ndarray]]


def records(size: tuple[int, int], images: list[int]) -> pa.Table:
    """schema.PIXELS of noise, with a prompt as each image's text."""
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in schema.PIXELS}
    rows = []
    for i in images:
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        values = {"row": i, "pixels": pixels.tobytes(), "text": PROMPTS[i], "retryable": False}
        rows.append(empty | values)
    return pa.Table.from_pylist(rows, schema=schema.PIXELS)


def segment(model: str) -> Values:
    """Prompts, logits of few images with many prompts and of many with few, embeddings."""
    all_prompts = open_segmenter(model, PROMPTS, embed=True)
    size = all_prompts.checkpoint.processor.image_size
    for count in (1, 3, 20):
        for i, vector in enumerate(open_segmenter(model, PROMPTS[:count]).conditional):
            yield ("prompt", i), vector
    for threads, images, count in RUNS:
        asked = all_prompts.only(PROMPTS[:count], embed=True)
        for table in SegmentImages(asked, "cpu", threads)(records(size, images)):
            for row in table.to_pylist():
                logits = np.frombuffer(row["logits"], np.float32)
                for i, of_prompt in enumerate(np.split(logits, count)):
                    yield ("logits", row["row"], row["first_prompt"] + i), of_prompt
                yield ("vector", row["row"]), np.frombuffer(row["vector"], np.float32)


def closely(model: str) -> Values:
    """Logits of two windows and the whole, with edges refined."""
    options = FineOptions(tile=True, refine=True)
    spec = open_segmenter(model, PROMPTS[:3], fine=options)
    assert spec.looks is not None
    height, width = spec.checkpoint.processor.image_size
    for threads, images, count in ((1, [0], 3), (2, [1, 0], 1)):
        asked = spec.only(PROMPTS[:count], embed=False)
        table = records((height, width + 8), images)
        pixels = [np.frombuffer(row, np.uint8) for row in table["pixels"].to_pylist()]
        looks = [
            spec.looks.fit(Image.fromarray(each.reshape(height, width + 8, 3))) for each in pixels
        ]
        for name, value in (("height", height), ("width", width + 8)):
            column = pa.array([value] * len(images), pa.int32())
            table = table.set_column(table.schema.get_field_index(name), name, column)
        column = pa.array([each.tobytes() for each in looks], pa.large_binary())
        table = table.set_column(table.schema.get_field_index("pixels"), "pixels", column)
        for part in SegmentImages(asked, "cpu", threads, block_bytes=threads)(table):
            for row in part.to_pylist():
                logits = np.frombuffer(row["logits"], np.float32)
                yield ("fine logits", row["row"], row["first_prompt"]), logits


def embed(model: str) -> Values:
    """Embeddings of images, which segment makes too, and of texts, which are prompts."""
    for (threads, images, _), text in zip(RUNS, (False, True, True), strict=True):
        embedder = open_embedder(model, text=text, normalize=not text, dtype="float32")
        size = embedder.checkpoint.processor.image_size
        for row in EmbedImages(embedder, "cpu", threads)(records(size, images)).to_pylist():
            name = "raw vector" if text else "vector"
            yield (name, row["row"]), np.frombuffer(row["vector"], np.float32)
            if text:
                yield ("prompt", row["row"]), np.frombuffer(row["text_vector"], np.float32)


def classify(model: str) -> Values:
    """Probabilities of labels."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(PROMPTS))
        file.flush()
        config = ClassifyConfig(input="in", output="out", labels=file.name, top=len(PROMPTS))
        classifier = open_classifier(model, config)
    for threads, images, _ in RUNS:
        table = records(classifier.checkpoint.processor.image_size, images)
        for row in ClassifyImages(classifier, "cpu", threads)(table).to_pylist():
            yield ("probability", row["row"]), np.array(row["probability"])


def compare(model: str) -> dict[str, int]:
    """How many values of each kind came out with other bits than at first."""
    found: dict[tuple[str | int, ...], np.ndarray] = {}
    wrong: dict[str, int] = {}
    for make in (segment, closely, embed, classify):
        for name, values in make(model):
            assert np.isfinite(values).all() and values.any(), name
            known = found.setdefault(name, values)
            if known.tobytes() != values.tobytes():
                kind = str(name[0])
                wrong[kind] = wrong.get(kind, 0) + int((known != values).sum())
    return wrong


if __name__ == "__main__":
    differing = {model: compare(model) for model in sys.argv[1:]}
    print("values that differ:", differing)
    sys.exit(any(differing.values()))
