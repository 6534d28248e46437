"""Pixels and texts -> CLIP embeddings, on the actors that hold the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.infer.checkpoint import Checkpoint, encode_texts, open_processor, open_tokenizer
from pipeline.infer.device import Device, fail_rows, has_pixels, scale_to_unit
from pipeline.infer.fetch import fetch
from pipeline.model.check import read_config
from pipeline.model.clip import CLIP
from pipeline.model.encoders import ImageEncoder


@dataclass(frozen=True, kw_only=True)
class Embedder:
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
) -> Embedder:
    """Load a checkpoint as the actors will, and let its weights go again. Raises CheckpointError.

    What it lacks, and what does not fit together in it, is found here, before anything is written.
    """
    folder = fetch(name)
    model, weights_hash = _load_model(folder, text)
    tokenizer = open_tokenizer(folder, model.text_model) if isinstance(model, CLIP) else None
    checkpoint = Checkpoint(
        name=name,
        config=read_config(folder),
        weights_hash=weights_hash,
        processor=open_processor(folder, model.vision_model),
        tokenizer_hash=tokenizer.content_hash if tokenizer else "",
    )
    return Embedder(checkpoint=checkpoint, text=text, normalize=normalize, dtype=dtype)


def _load_model(folder: Path, text: bool) -> tuple[CLIP | ImageEncoder, str]:
    """The model, which has a text tower only where texts are embedded, and its weights hash."""
    return CLIP.from_folder(folder) if text else ImageEncoder.from_folder(folder)


class EmbedImages:
    """An actor of the embed stage: schema.PIXELS -> schema.VECTORS.

    An actor that finds other weights under the model's name than the driver did refuses to start.
    `device` and `threads` as in Device.
    """

    def __init__(self, embedder: Embedder, device: str, threads: int | None = None):
        self.device = Device(device, threads)
        folder = fetch(embedder.checkpoint.name)
        model, weights_hash = _load_model(folder, embedder.text)
        embedder.checkpoint.check_worker(weights_hash)
        self.model, self.embedder = model.to(self.device.torch), embedder
        self.tokenizer = (
            open_tokenizer(folder, model.text_model) if isinstance(model, CLIP) else None
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = has_pixels(batch)
        rows = batch.filter(pa.array(good))
        vectors = texts = np.zeros((len(rows), 0), np.float32)
        if len(rows):
            pixels = self.device.load_pixels(rows["pixels"], self.embedder.checkpoint.processor)
            vectors = self._scaled(self.device.run(self.model.encode_image, pixels))
            texts = self._texts(rows)
        with np.errstate(over="ignore"):
            stored = np.concatenate([vectors, texts], axis=1).astype(self.embedder.dtype)
        fits, failed = np.isfinite(stored).all(axis=1), good.copy()
        failed[good], good[good] = ~fits, fits
        detail = f"the embedding is not finite as {self.embedder.dtype}"
        table = fail_rows(batch.drop_columns(["pixels"]), failed, "embed", detail)
        columns = [*table.columns, _spread(vectors[fits], good), _spread(texts[fits], good)]
        return pa.table(columns, schema=schema.VECTORS)

    def _texts(self, rows: pa.Table) -> np.ndarray:
        model = self.model
        if self.tokenizer is None or not isinstance(model, CLIP):
            return np.zeros((len(rows), 0), np.float32)
        texts = rows["text"].to_pylist()
        tower, tokenizer = model.text_model, self.tokenizer
        vectors = encode_texts(model.encode_text, tower, tokenizer, texts, self.device)
        return self._scaled(list(vectors.split(1)))

    def _scaled(self, vectors: list[torch.Tensor]) -> np.ndarray:
        """(N, E) float32 of vectors (B, E) each, of length 1 if wanted."""
        scaled = self.device.run(scale_to_unit, vectors) if self.embedder.normalize else vectors
        return torch.cat(scaled).float().cpu().numpy()


def _spread(vectors: np.ndarray, good: np.ndarray) -> pa.Array:
    """The bytes of the vectors at the places that are good, nothing at the others."""
    rest = iter(vectors)
    return pa.array([next(rest).tobytes() if g else b"" for g in good], pa.large_binary())
