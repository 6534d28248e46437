"""Embeddings of a run -> lengths, cosines and nearest neighbours, from a bounded sample.

Shapes: N vectors of the sample, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.annotations.choose import Parts, spread
from pipeline.errors import CredentialsError, PipelineError
from pipeline.write.parts import open_part

VECTORS = 2048
SHARDS = 64
IMAGES = 8  # with their neighbours
NEIGHBOURS = 3
PAIRS = 6
BINS = 60

_GROUPS = 4  # row groups of a part


class Neighbour(NamedTuple):
    """An image of the sample."""

    shard: str
    row: int
    key: str
    cosine: float
    """To the image that it stands beside, whose own is 1."""


@dataclass(frozen=True, kw_only=True)
class VectorSample:
    """Figures of the embeddings read from a bounded number of parts."""

    vectors: int
    dimension: int
    shards: int
    of_shards: int
    unread: list[str]
    bad: int
    """Vectors that are zero or not finite."""
    lengths: tuple[float, float, float]
    """Smallest, median and largest."""
    pairs: list[int]
    """Cosines of random pairs, in BINS bins over `span`."""
    nearest: list[int]
    """Cosines of each to its nearest other, in the same bins."""
    span: tuple[float, float]
    texts: list[int]
    """Cosines of each to its own text, in bins over `text_span`; empty without texts."""
    text_span: tuple[float, float]
    neighbours: list[list[Neighbour]]
    """Some images, each in front of its nearest others."""
    closest: list[list[Neighbour]]
    """The closest pairs of the sample."""


def read_vectors(parts: Parts, pictured: Sequence[str]) -> VectorSample | None:
    """Read some vectors of some shards: first of those with pictures, by id; None without any.

    Raises CredentialsError.
    """
    others = [id_ for id_ in spread(list(parts), SHARDS) if id_ not in pictured]
    ids = [id_ for id_ in pictured if id_ in parts] or others
    count = max(VECTORS // max(len(ids), 1), 1)
    ids_read, unread = 0, []
    names: list[tuple[str, int, str]] = []
    matrices, texts = [], []
    for id_ in ids:
        try:
            found, vectors, of_text = _read_part(parts[id_][0], count)
        except CredentialsError:
            raise
        except PipelineError as error:
            unread.append(str(error))
            continue
        ids_read += 1
        names += found
        matrices.append(vectors)
        texts.append(of_text)
    if not names:
        return None
    return _describe(
        names,
        np.concatenate(matrices),
        np.concatenate(texts),
        (ids_read, len(parts)),
        unread,
    )


def _read_part(uri: str, count: int) -> tuple[list[tuple[str, int, str]], np.ndarray, np.ndarray]:
    """Shard, row and key, vectors (n, D) and those of texts (n, D or 0), spread over row groups."""
    names, matrices, texts = [], [], []
    with open_part(uri) as parquet:
        groups = spread(range(parquet.num_row_groups), _GROUPS)
        each = -(-count // max(len(groups), 1))
        with_text = "text_vector" in parquet.schema_arrow.names
        columns = ["shard", "row", "key", "vector", *(["text_vector"] if with_text else [])]
        for group in groups:
            batches = parquet.iter_batches(
                each, row_groups=[group], columns=columns, use_threads=False
            )
            for batch in batches:
                some = batch.select(["shard", "row", "key"]).to_pylist()
                names += [(row["shard"], row["row"], row["key"]) for row in some]
                matrices.append(_matrix(batch["vector"], len(batch)))
                texts.append(_matrix(batch["text_vector"], len(batch)) if with_text else _NONE)
                break
    if not names:
        return [], np.empty((0, 0), np.float32), _NONE
    return names, np.concatenate(matrices), np.concatenate(texts)


_NONE = np.empty((0, 0), np.float32)


def _matrix(column: object, rows: int) -> np.ndarray:
    values = column.flatten().to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
    return np.asarray(values, np.float32).reshape(rows, -1)


def _unit(rows: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _describe(
    names: list[tuple[str, int, str]],
    vectors: np.ndarray,
    texts: np.ndarray,
    shards: tuple[int, int],
    unread: list[str],
) -> VectorSample:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    unit = _unit(vectors)
    own = np.empty(0)
    if len(texts) == len(vectors):
        own = (unit * _unit(texts)).sum(axis=1)
        own = own[np.isfinite(own)]
    at = np.flatnonzero(good)
    unit = unit[at]
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    random = np.random.default_rng(0)  # the same page every time
    i, j = random.integers(len(at), size=(2, 20_000)) if len(at) > 1 else np.empty((2, 0), int)
    pairs = cosines[i, j][i != j]
    nearest = cosines.max(axis=1) if len(at) > 1 else np.empty(0)
    span, text_span = _span(np.concatenate([pairs, nearest])), _span(own)

    def name(i: int, cosine: float) -> Neighbour:
        shard, row, key = names[at[i]]
        return Neighbour(shard, row, key, cosine)

    neighbours = []
    for first in spread(range(len(at)), IMAGES) if len(at) > 1 else []:
        some = np.argsort(-cosines[first], kind="stable")[: min(NEIGHBOURS, len(at) - 1)]
        near = [name(int(k), float(cosines[first, k])) for k in some]
        neighbours.append([name(first, 1.0), *near])
    return VectorSample(
        vectors=len(vectors),
        dimension=vectors.shape[1],
        shards=shards[0],
        of_shards=shards[1],
        unread=unread,
        bad=len(vectors) - len(at),
        lengths=_three(lengths[at]),
        pairs=_bins(pairs, span),
        nearest=_bins(nearest, span),
        span=span,
        texts=_bins(own, text_span) if len(own) else [],
        text_span=text_span,
        neighbours=neighbours,
        closest=[[name(a, 1.0), name(b, c)] for a, b, c in _closest(cosines)],
    )


def _closest(cosines: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs of rows, the nearest first; no row stands in two of them."""
    if len(cosines) < 2:
        return []
    best = cosines.argmax(axis=1)
    found: list[tuple[int, int, float]] = []
    seen: set[int] = set()
    for a in np.argsort(-cosines.max(axis=1), kind="stable").tolist():
        b = int(best[a])
        if not seen & {a, b}:
            seen |= {a, b}
            found.append((min(a, b), max(a, b), float(cosines[a, b])))
        if len(found) == PAIRS:
            break
    return found


def _span(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis over all values, in tenths."""
    if not len(values):
        return (0.0, 1.0)
    low = np.floor(10 * float(values.min())) / 10
    high = np.ceil(10 * float(values.max()) - 1e-4) / 10
    return (max(low, -1.0), min(max(high, low + 0.1), 1.0))


def _bins(values: np.ndarray, span: tuple[float, float]) -> list[int]:
    inside = np.clip(values, *span)
    counts: list[int] = np.histogram(inside, BINS, span)[0].tolist()
    return counts


def _three(values: np.ndarray) -> tuple[float, float, float]:
    if not len(values):
        return (float("nan"),) * 3
    return float(values.min()), float(np.median(values)), float(values.max())
