"""Pixels and texts -> CLIP embeddings, on the actors that hold the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.checkpoint import Checkpoint
from pipeline.model.check import read_config
from pipeline.model.clip import CLIP
from pipeline.model.encoders import ImageEncoder
from pipeline.model.fetch import fetch
from pipeline.model.preprocess import ImageProcessor
from pipeline.model.tokenizer import Tokenizer
from pipeline.model.weights import hash_weights
from pipeline.pixels import has_pixels, open_device, stack_pixels


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A checkpoint and what to embed with it."""

    checkpoint: Checkpoint
    text: bool
    """Whether texts are embedded, too."""
    normalize: bool
    """Whether vectors are scaled to length 1."""


def open_embedder(name: str, *, text: bool, normalize: bool) -> Embedder:
    """Check a checkpoint without building its model. Raises CheckpointError."""
    folder = fetch(name)
    if text:
        Tokenizer.from_folder(folder)
    checkpoint = Checkpoint(
        name=name,
        config=read_config(folder),
        weights_hash=hash_weights(folder),
        processor=ImageProcessor.from_folder(folder),
    )
    return Embedder(checkpoint=checkpoint, text=text, normalize=normalize)


class EmbedImages:
    """An actor of the embed stage: schema.PIXELS -> schema.VECTORS.

    It holds the text tower only where texts are embedded. An actor that finds other weights under
    the model's name than the driver did refuses to start. `device` and `threads` as in
    pixels.open_device.
    """

    def __init__(self, embedder: Embedder, device: str, threads: int | None = None):
        self.device = open_device(device, threads)
        folder = fetch(embedder.checkpoint.name)
        kind = CLIP if embedder.text else ImageEncoder
        model, weights_hash = kind.from_folder(folder)
        embedder.checkpoint.check_worker(weights_hash)
        self.model, self.embedder = model.to(self.device), embedder
        self.tokenizer = Tokenizer.from_folder(folder) if embedder.text else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = has_pixels(batch)
        rows = batch.filter(pa.array(good))
        vectors, of_texts = (self._images(rows), self._texts(rows)) if len(rows) else ([], [])
        table = batch.drop_columns(["pixels"])
        columns = [*table.columns, _spread(vectors, good), _spread(of_texts, good)]
        return pa.table(columns, schema=schema.VECTORS)

    @torch.inference_mode()
    def _images(self, rows: pa.Table) -> list[bytes]:
        processor = self.embedder.checkpoint.processor
        pixels = stack_pixels(rows["pixels"], processor.image_size).to(self.device)
        return self._bytes(self.model.encode_image(processor.normalize(pixels)))

    @torch.inference_mode()
    def _texts(self, rows: pa.Table) -> list[bytes]:
        if self.tokenizer is None or not isinstance(self.model, CLIP):
            return [b""] * len(rows)
        longest = self.model.text_model.embeddings.position_embedding.num_embeddings
        ids, mask = self.tokenizer(rows["text"].to_pylist(), max_length=longest)
        return self._bytes(self.model.encode_text(ids.to(self.device), mask.to(self.device)))

    def _bytes(self, vectors: torch.Tensor) -> list[bytes]:
        """(N, E) -> float32 bytes of each, of length 1 if wanted."""
        vectors = vectors.float()
        if self.embedder.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return [vector.tobytes() for vector in vectors.cpu().numpy()]


def _spread(values: list[bytes], good: np.ndarray) -> pa.Array:
    """The values at the places that are good, nothing at the others."""
    rest = iter(values)
    return pa.array([next(rest) if g else b"" for g in good], pa.large_binary())
