"""Pixels and texts -> CLIP embeddings, on the actors with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.config.options import Precision
from pipeline.infer.checkpoint import Checkpoint, OpenModel
from pipeline.infer.device import Device, fail_rows, has_pixels, pixel_rows, scale_to_unit
from pipeline.model.clip import CLIP
from pipeline.model.encoders import ImageEncoder

IMAGES_AT_ONCE = 128  # on a GPU


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
    name: str,
    *,
    text: bool,
    normalize: bool,
    dtype: Literal["float32", "float16"],
    precision: Precision = "float32",
) -> EmbedSpec:
    """Load a checkpoint as the actors will, and let its weights go again. Raises CheckpointError.

    What it lacks, and what does not fit together in it, is found here, before anything is written.
    """
    opened = OpenModel(name, _loader(text), Device("cpu"))
    checkpoint = opened.describe(precision, texts=text)
    return EmbedSpec(checkpoint=checkpoint, text=text, normalize=normalize, dtype=dtype)


def _loader(text: bool) -> Callable[[Path], tuple[CLIP | ImageEncoder, str]]:
    """Loads a text tower only to embed texts."""
    return CLIP.from_folder if text else ImageEncoder.from_folder


class EmbedImages:
    """An actor of the embed stage: schema.PIXELS -> schema.VECTORS.

    Refuses to start if the weights under the model's name differ from the driver's. `device` and
    `threads` as in Device.
    """

    def __init__(self, spec: EmbedSpec, device: str | Device, threads: int | None = None):
        self.device = Device.of(device, threads, spec.checkpoint.precision)
        self.spec = spec
        self.opened = OpenModel.on_worker(spec.checkpoint, _loader(spec.text), self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = has_pixels(batch)
        rows = batch.filter(pa.array(good))
        vectors = texts = np.zeros((len(rows), 0), np.float32)
        if len(rows):
            model, processor = self.opened.model, self.spec.checkpoint.processor
            pixels = pixel_rows(rows["pixels"], processor)
            group = self.device.group(model.vision_model, processor.image_size)

            def encode(some: slice) -> torch.Tensor:
                loaded = self.device.load_pixels(pixels[some], processor, group)
                return self._scaled(model.encode_image(loaded))[: len(pixels[some])]

            found = self.device.over(len(rows), IMAGES_AT_ONCE, encode, group=group)
            vectors = torch.cat(list(found)).numpy()
            if self.spec.text:
                encoded = self.opened.encode_texts(rows["text"].to_pylist())
                scaled = self.device.run(self._scaled, encoded.split(1))
                texts = torch.cat(scaled).numpy()
        with np.errstate(over="ignore"):
            stored = np.concatenate([vectors, texts], axis=1).astype(self.spec.dtype)
        fits, failed = np.isfinite(stored).all(axis=1), good.copy()
        failed[good], good[good] = ~fits, fits
        detail = f"the embedding is not finite as {self.spec.dtype}"
        table = fail_rows(batch.drop_columns(["pixels"]), failed, "embed", detail)
        columns = [*table.columns, _spread(vectors[fits], good), _spread(texts[fits], good)]
        return pa.table(columns, schema=schema.VECTORS)

    def _scaled(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, E), of length 1 if wanted: float32 on the CPU."""
        return (scale_to_unit(vectors) if self.spec.normalize else vectors).float().cpu()


def _spread(vectors: np.ndarray, good: np.ndarray) -> pa.Array:
    """The bytes of the vectors at the good places, nothing at the others."""
    rest = iter(vectors)
    return pa.array([next(rest).tobytes() if g else b"" for g in good], pa.large_binary())
