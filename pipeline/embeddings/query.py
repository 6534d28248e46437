"""Texts and images -> one vector a query, by the model of the table.

A query is the sum of the normalised vectors of its texts and images, less those to subtract,
normalised again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import storage
from pipeline.config.search import SearchConfig
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


@dataclass(frozen=True, kw_only=True)
class Query:
    """Parts of one query; texts and images that stand twice count twice."""

    texts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    """URIs as the user gave them."""
    minus: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The query in words."""
        images = [Path(image).name for image in self.images]
        return " - ".join([" + ".join([*self.texts, *images]), *self.minus])


def queries_of(config: SearchConfig) -> list[Query]:
    """The query that the options make together, if any, then one for each line of --queries."""
    lines = [Query(texts=(line,)) for line in config.lines()]
    if not config.text and not config.image:
        return lines
    return [Query(texts=config.text, images=config.image, minus=config.minus), *lines]


def encode_queries(
    queries: list[Query], table: EmbeddingTable, model: str | None = None
) -> np.ndarray:
    """Vectors (M, D) float32 of length 1, by the table's model, found under `model` if given.

    Images are read before the model. Raises UsageError for an image that cannot be used, a
    checkpoint that cannot be loaded, other weights than the table's, and a query that cancels out.
    """
    texts = list(dict.fromkeys(text for q in queries for text in (*q.texts, *q.minus)))
    images = list(dict.fromkeys(image for q in queries for image in q.images))
    pictures = [read_image(image) for image in images]
    kind = CLIP if texts and images else TextEncoder if texts else ImageEncoder
    opened = _open(table, model, kind)
    of_text = dict(zip(texts, _encode_texts(opened, texts), strict=True))
    of_image = dict(zip(images, _encode_images(opened, pictures), strict=True))
    vectors = np.zeros((len(queries), table.dimension), np.float32)
    for query, vector in zip(queries, vectors, strict=True):
        for added in (*(of_text[t] for t in query.texts), *(of_image[i] for i in query.images)):
            vector += added
        for text in query.minus:
            vector -= of_text[text]
        if not np.linalg.norm(vector) > 1e-5:  # or not finite
            raise UsageError(f"the query {query.name!r} cancels out: nothing is left to look for")
    return normalize(vectors)


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


def _encode_texts(opened: OpenModel[Encoder], texts: list[str]) -> np.ndarray:
    """Vectors (P, D) of length 1."""
    return normalize(opened.encode_texts(texts).numpy()) if texts else np.empty((0, 0))


def _encode_images(opened: OpenModel[Encoder], pictures: list[Image.Image]) -> np.ndarray:
    """Vectors (P, D) of length 1."""
    if not pictures or isinstance(opened.model, TextEncoder):
        return np.empty((0, 0))
    processor = opened.processor
    pixels = (torch.from_numpy(processor.resize(picture))[None] for picture in pictures)
    vectors = opened.device.run(opened.model.encode_image, map(processor.normalize, pixels))
    return normalize(torch.cat(vectors).numpy())
