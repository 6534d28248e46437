"""Texts and images of queries -> vectors, by the model of the table.

Imports torch, slower than many a search: imported only for queries in need of a model.

Shapes: P texts or images, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pipeline import storage
from pipeline.embeddings.vectors import EmbeddingTable, check_weights, normalize
from pipeline.errors import (
    REASONS,
    CheckpointError,
    NotFoundError,
    RowError,
    StorageError,
    UsageError,
)
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.device import Device
from pipeline.model.clip import CLIP
from pipeline.model.encoders import ImageEncoder, TextEncoder
from pipeline.prepare.images import decode_image

MAX_PIXELS = 50_000_000  # of a query image

Encoder = CLIP | TextEncoder | ImageEncoder


def encode(
    texts: Sequence[str], images: Sequence[str], table: EmbeddingTable, model: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (P, D) of length 1 of texts, and of image files, by the table's model.

    The model is found under `model` if given. Images are read before it. Raises UsageError for an
    unusable image, an unloadable checkpoint, and other weights than the table's.
    """
    pictures = [read_image(image) for image in images]
    kind = CLIP if texts and images else TextEncoder if texts else ImageEncoder
    opened = _open(table, model, kind)
    return _encode_texts(opened, texts), _encode_images(opened, pictures)


def read_image(uri: str) -> Image.Image:
    """Read an image file as upright RGB. Raises UsageError with its fault."""
    try:
        data = storage.read_bytes(storage.check_uri(uri))
        return decode_image(data, max_pixels=MAX_PIXELS).image
    except NotFoundError as error:
        raise UsageError(f"--image {uri}: no such file") from error
    except RowError as error:
        raise UsageError(f"--image {uri}: {REASONS[error.reason]} ({error.detail})") from error
    except StorageError as error:
        raise UsageError(f"--image {uri}: cannot be read: {error}") from error


def _open(table: EmbeddingTable, model: str | None, kind: type[Encoder]) -> OpenModel[Encoder]:
    """The needed part of the table's model; UsageError if it is not the table's."""
    try:
        opened: OpenModel[Encoder] = OpenModel(
            model or table.model, kind.from_folder, Device("cpu")
        )
    except CheckpointError as error:
        hint = "" if model else "; --model says where the model of this table is"
        raise UsageError(f"{error}{hint}") from error
    check_weights(table, opened.name, opened.weights_hash)
    return opened


def _encode_texts(opened: OpenModel[Encoder], texts: Sequence[str]) -> np.ndarray:
    """Vectors (P, D) of length 1."""
    return normalize(opened.encode_texts(texts).numpy()) if texts else np.empty((0, 0))


def _encode_images(opened: OpenModel[Encoder], pictures: Sequence[Image.Image]) -> np.ndarray:
    """Vectors (P, D) of length 1."""
    if not pictures or isinstance(opened.model, TextEncoder):
        return np.empty((0, 0))
    processor = opened.processor
    pixels = (torch.from_numpy(processor.resize(picture))[None] for picture in pictures)
    vectors = opened.device.run(opened.model.encode_image, map(processor.normalize, pixels))
    return normalize(torch.cat(vectors).numpy())
