"""Pixels or embeddings -> the best labels, with their probabilities.

Zero-shot, a label is as probable as the cosine of its embedding with the image's says (Radford et
al. 2021, section 3.1): a label's embedding is the mean over the prompt templates of normalised text
embeddings, normalised again, as in openai/CLIP's notebook Prompt_Engineering_for_ImageNet. The
driver makes them once per job. A checkpoint with a classification head has labels of its own, and
says whether they exclude each other.

Shapes: B images, C labels, T templates, E projection, K kept labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.config.classify import ClassifyConfig
from pipeline.errors import CheckpointError, UsageError
from pipeline.infer.checkpoint import Checkpoint, OpenModel
from pipeline.infer.device import Device, fail_rows, has_pixels, pixel_rows
from pipeline.infer.embed import IMAGES_AT_ONCE
from pipeline.infer.fetch import fetch
from pipeline.infer.texts import Progress, name_texts
from pipeline.model.check import read_config
from pipeline.model.clip import CLIP
from pipeline.model.encoders import (
    ImageClassifier,
    ImageEncoder,
    read_head_labels,
    read_logit_scale,
)

TEXTS_AT_ONCE = 1024  # of labels x templates; memory grows with it, not with their number

Function = Literal["softmax", "sigmoid", "none"]
"""Logits -> probabilities: of labels that exclude each other, or do not; none: as they are."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A checkpoint and what it can answer: the labels, and how their logits come about."""

    checkpoint: Checkpoint
    labels: list[str]
    templates: list[str]
    """Empty where the labels are those of the checkpoint's head."""
    vectors: np.ndarray
    """Embeddings of the labels (C, E), float64 of length 1; of no labels with a head."""
    scale: float
    """Factor of a cosine: exp(logit_scale)."""
    top: int
    """K, at most C."""
    function: Function = "softmax"
    notes: tuple[str, ...] = ()
    """Lines for the user about the labels."""

    @property
    def head(self) -> bool:
        """Whether the labels are those of the checkpoint's own head."""
        return not self.templates

    def fingerprint(self) -> dict[str, Any]:
        """Facts of the model and the labels deciding the results of a run."""
        asked = {"labels": self.labels, "templates": self.templates}
        return {**self.checkpoint.fingerprint(), **asked}

    def facts(self) -> dict[str, str]:
        """Facts of the model in every file of the labels table."""
        return {"model": self.checkpoint.name, "weights_hash": self.checkpoint.weights_hash}

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """Logits (B, C) of image embeddings (B, E), normalised or not, in float64.

        NaN for an embedding of zeros or not finite.
        """
        rows = vectors.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            # Not a BLAS product, whose last bits depend on how many rows there are.
            return self.scale * np.einsum("be,ce->bc", rows, self.vectors)


def open_classifier(
    name: str,
    config: ClassifyConfig,
    *,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> Classifier:
    """Load a checkpoint, encode the labels with it on `device`, and let its weights go again.

    Raises CheckpointError, and UsageError if labels and checkpoint do not go together.
    """
    folder = fetch(name)
    labels, own = config.all_labels(), read_head_labels(folder)
    notes: list[str] = []
    function: Function = "softmax"
    if own is not None:
        given = [o for o in ("label", "labels", "template") if getattr(config, o)]
        if given:
            raise UsageError(
                f"--{given[0]}: {name} classifies by a head with {len(own)} labels of its own"
            )
        checkpoint = OpenModel(name, ImageClassifier.from_folder, Device("cpu")).describe(
            config.precision, texts=False
        )
        templates, vectors, scale = [], np.empty((0, 0)), 1.0
        function = _head_function(folder, read_config(folder), len(own))
    else:
        if not labels:
            raise UsageError(f"nothing to choose from: {name} needs --labels FILE, one a line")
        opened = OpenModel(name, CLIP.from_folder, Device(device))
        checkpoint = opened.describe(config.precision, texts=True)
        templates, scale = config.templates(), read_logit_scale(folder)
        notes = _describe_labels(opened, labels, templates)
        vectors = encode_labels(opened, labels, templates, on_progress)
    names = labels if own is None else own
    return Classifier(
        checkpoint=checkpoint,
        labels=names,
        templates=templates,
        vectors=vectors,
        scale=scale,
        top=min(config.top, len(names)),
        function=function,
        notes=tuple(notes),
    )


def _head_function(folder: Path, config: dict[str, Any], labels: int) -> Function:
    """As transformers' pipelines/image_classification.py. Raises CheckpointError."""
    kind = config.get("problem_type")
    known = ("regression", "multi_label_classification", "single_label_classification", None)
    if kind not in known:
        raise CheckpointError(
            f"{folder / 'config.json'}: problem_type is {str(kind)[:80]!r}, not one of "
            f"{', '.join(map(str, known[:-1]))}"
        )
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or labels == 1 else "softmax"


def _describe_labels(opened: OpenModel[CLIP], labels: list[str], templates: list[str]) -> list[str]:
    """Lines for the user. Raises UsageError for different labels cut to the same tokens."""
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    notes = name_texts(repeated, "label", "given more than once, each with a label_id of its own")
    return notes + opened.describe_texts(labels, "label", templates)


def encode_labels(
    opened: OpenModel[CLIP],
    labels: list[str],
    templates: list[str],
    on_progress: Progress | None = None,
) -> np.ndarray:
    """Embeddings (C, E) of the labels, float64 of length 1: the mean over all templates.

    Runs on the model's device. Raises UsageError for a label without a direction in the model.
    """
    step = max(1, TEXTS_AT_ONCE // len(templates))
    parts = []
    for i in range(0, len(labels), step):
        some = labels[i : i + step]
        texts = [template.replace("{}", label) for label in some for template in templates]
        encoded = opened.encode_texts(texts)
        each = encoded.double().numpy().reshape(len(some), len(templates), -1)  # (., T, E)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (each / np.linalg.norm(each, axis=2, keepdims=True)).mean(axis=1)
            vectors = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        for label, vector in zip(some, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise UsageError(f"the label {label!r}: the model has no embedding of it")
        parts.append(vectors)
        if on_progress:
            on_progress(i + len(some), len(labels))
    return np.concatenate(parts)


def _loader(head: bool) -> Callable[[Path], tuple[ImageClassifier | ImageEncoder, str]]:
    """Loads the vision tower with the head, or with the projection."""
    return ImageClassifier.from_folder if head else ImageEncoder.from_folder


class ClassifyImages:
    """An actor of the classify stage: schema.PIXELS -> schema.RANKED.

    It holds the vision tower, and either its projection or the head. Refuses to start if the
    weights under the model's name differ from the driver's. `device` and `threads` as in Device.
    """

    def __init__(self, classifier: Classifier, device: str | Device, threads: int | None = None):
        self.device = Device.of(device, threads, classifier.checkpoint.precision)
        self.classifier = classifier
        load = _loader(classifier.head)
        self.model = OpenModel.on_worker(classifier.checkpoint, load, self.device).model

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = has_pixels(batch)
        logits = np.empty((0, len(self.classifier.labels)))
        if good.any():
            model, processor = self.model, self.classifier.checkpoint.processor
            pixels = pixel_rows(batch.filter(pa.array(good))["pixels"], processor)
            encode = model if isinstance(model, ImageClassifier) else model.encode_image
            group = self.device.group(model.vision_model, processor.image_size)

            def infer(some: slice) -> torch.Tensor:
                loaded = self.device.load_pixels(pixels[some], processor, group)
                return encode(loaded)[: len(pixels[some])].float().cpu()

            found = self.device.over(len(pixels), IMAGES_AT_ONCE, infer, group=group)
            out = torch.cat(list(found)).numpy()
            head = self.classifier.head
            logits = out.astype(np.float64) if head else self.classifier.logits(out)
        records, asked = batch.drop_columns(["pixels"]), self.classifier
        return rank_labels(records, good, logits, asked.top, asked.function)


class ClassifyVectors:
    """The classify stage over existing embeddings: schema.VECTORS -> schema.RANKED."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def __call__(self, batch: pa.Table) -> pa.Table:
        data = [vector.as_buffer() for vector in batch["vector"]]
        good = np.array([len(vector) > 0 for vector in data], dtype=bool)
        floats = np.frombuffer(b"".join(data), np.float32)
        logits = self.classifier.logits(floats.reshape(-1, self.classifier.vectors.shape[1]))
        records = batch.drop_columns(["vector", "text_vector"])
        return rank_labels(records, good, logits, self.classifier.top)


def rank_labels(
    records: pa.Table,
    good: np.ndarray,
    logits: np.ndarray,
    top: int,
    function: Function = "softmax",
) -> pa.Table:
    """Records with their best labels, schema.RANKED; those without usable logits fail.

    `good` (N,) bool: the records with a row in `logits` (B, C) float64. Logits equal as float32 are
    ranked by label_id.
    """
    usable = np.isfinite(logits).all(axis=1)
    failed = np.zeros(len(records), dtype=bool)
    failed[good] = ~usable
    logits = logits[usable]
    probabilities = _probabilities(logits, function)
    order = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")[:, :top]
    counts = np.where(good & ~failed, top, 0)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    values = (
        order.astype(np.int32),
        np.take_along_axis(probabilities, order, 1).astype(np.float32),
        np.take_along_axis(logits, order, 1).astype(np.float32),
    )
    lists = [pa.ListArray.from_arrays(offsets, pa.array(v.reshape(-1))) for v in values]
    records = fail_rows(records, failed, "classify", "the model's logits are not finite")
    return pa.table([*records.columns, *lists], schema=schema.RANKED)


def _probabilities(logits: np.ndarray, function: Function) -> np.ndarray:
    """Each label's, of logits (B, C): these sum to 1 with softmax alone."""
    if function == "none":
        return logits
    if function == "sigmoid":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-logits)))
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
