"""Pixels and texts -> CLIP embeddings, on the actors that hold the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.infer.checkpoint import Checkpoint, OpenModel
from pipeline.infer.device import Device, fail_rows, has_pixels, scale_to_unit
from pipeline.model.clip import CLIP
from pipeline.model.encoders import ImageEncoder


@dataclass(frozen=True, kw_only=True)
class EmbedSpec:
    """A checkpoint and what to embed with it."""

    checkpoint: Checkpoint
    text: bool
    """Whether texts are embedded, too."""
    normalize: bool
    """Whether vectors are scaled to length 1."""
    dtype: Literal["float32", "float16"]
    """Of the vectors in the table: what is too large for it is no embedding."""


def open_embedder(
    name: str, *, text: bool, normalize: bool, dtype: Literal["float32", "float16"]
) -> EmbedSpec:
    """Load a checkpoint as the actors will, and let its weights go again. Raises CheckpointError.

    What it lacks, and what does not fit together in it, is found here, before anything is written.
    """
    opened = OpenModel(name, _loader(text), Device("cpu"))
    checkpoint = opened.describe(texts=text)
    return EmbedSpec(checkpoint=checkpoint, text=text, normalize=normalize, dtype=dtype)


def _loader(text: bool) -> Callable[[Path], tuple[CLIP | ImageEncoder, str]]:
    """Loads a text tower only where texts are embedded."""
    return CLIP.from_folder if text else ImageEncoder.from_folder


class EmbedImages:
    """An actor of the embed stage: schema.PIXELS -> schema.VECTORS.

    An actor that finds other weights under the model's name than the driver did refuses to start.
    `device` and `threads` as in Device.
    """

    def __init__(self, spec: EmbedSpec, device: str, threads: int | None = None):
        self.device, self.spec = Device(device, threads), spec
        self.opened = OpenModel.on_worker(spec.checkpoint, _loader(spec.text), self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = has_pixels(batch)
        rows = batch.filter(pa.array(good))
        vectors = texts = np.zeros((len(rows), 0), np.float32)
        if len(rows):
            model, processor = self.opened.model, self.spec.checkpoint.processor
            pixels = self.device.load_pixels(rows["pixels"], processor, model.vision_model)
            vectors = self._scaled(self.device.run(model.encode_image, pixels))[: len(rows)]
            if self.spec.text:
                encoded = self.opened.encode_texts(rows["text"].to_pylist())
                texts = self._scaled(list(encoded.split(1)))
        with np.errstate(over="ignore"):
            stored = np.concatenate([vectors, texts], axis=1).astype(self.spec.dtype)
        fits, failed = np.isfinite(stored).all(axis=1), good.copy()
        failed[good], good[good] = ~fits, fits
        detail = f"the embedding is not finite as {self.spec.dtype}"
        table = fail_rows(batch.drop_columns(["pixels"]), failed, "embed", detail)
        columns = [*table.columns, _spread(vectors[fits], good), _spread(texts[fits], good)]
        return pa.table(columns, schema=schema.VECTORS)

    def _scaled(self, vectors: list[torch.Tensor]) -> np.ndarray:
        """(N, E) float32 of vectors (B, E) each, of length 1 if wanted."""
        scaled = self.device.run(scale_to_unit, vectors) if self.spec.normalize else vectors
        return torch.cat(scaled).float().cpu().numpy()


def _spread(vectors: np.ndarray, good: np.ndarray) -> pa.Array:
    """The bytes of the vectors at the places that are good, nothing at the others."""
    rest = iter(vectors)
    return pa.array([next(rest).tobytes() if g else b"" for g in good], pa.large_binary())
