"""Texts, images and rows of the table -> one vector a query.

A query is the sum of the normalised vectors of its texts, images and rows, less those to subtract,
normalised again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config.search import SearchConfig
from pipeline.embeddings.index import VectorIndex
from pipeline.embeddings.like import find_like
from pipeline.embeddings.vectors import EmbeddingTable, normalize
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Query:
    """Parts of one query; what stands twice counts twice."""

    texts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    """URIs as the user gave them."""
    like: tuple[str, ...] = ()
    """Keys of rows of the table."""
    minus: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The query in words."""
        images = [Path(image).name for image in self.images]
        return " - ".join([" + ".join([*self.texts, *images, *self.like]), *self.minus])


def queries_of(config: SearchConfig) -> list[Query]:
    """The query of the options together, if any, then one for each line of --queries."""
    lines = [Query(texts=(line,)) for line in config.lines()]
    if not config.text and not config.image and not config.like:
        return lines
    options = Query(texts=config.text, images=config.image, like=config.like, minus=config.minus)
    return [options, *lines]


def make_vectors(
    queries: list[Query], source: EmbeddingTable | VectorIndex, model: str | None = None
) -> np.ndarray:
    """Vectors (M, D) float32 of length 1 of queries, by the model of a table or of an index.

    The model is found under `model` if given, and loaded only for texts and images. Raises
    UsageError as encode.encode and like.find_like do, and for a query cancelling out.
    """
    table = source.table if isinstance(source, VectorIndex) else source
    texts = list(dict.fromkeys(text for q in queries for text in (*q.texts, *q.minus)))
    images = list(dict.fromkeys(image for q in queries for image in q.images))
    like = list(dict.fromkeys(key for q in queries for key in q.like))
    of_text: dict[str, np.ndarray]
    of_text, of_image, of_row = {}, {}, {}
    if texts or images:
        from pipeline.embeddings.encode import encode  # torch: more than a second

        encoded = encode(texts, images, table, model)
        of_text, of_image = (
            dict(zip(names, vectors, strict=True))
            for names, vectors in zip((texts, images), encoded, strict=True)
        )
    if like:
        of_row = dict(zip(like, normalize(find_like(source, like)), strict=True))
    found = np.zeros((len(queries), table.dimension), np.float32)
    for query, vector in zip(queries, found, strict=True):
        for known, names in (
            (of_text, query.texts),
            (of_image, query.images),
            (of_row, query.like),
        ):
            for name in names:
                vector += known[name]
        for text in query.minus:
            vector -= of_text[text]
        if not np.linalg.norm(vector) > 1e-5:  # or not finite
            raise UsageError(f"the query {query.name!r} cancels out: nothing is left to look for")
    return normalize(found)
