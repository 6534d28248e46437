"""The nearest rows of a table of embeddings to many queries, exactly, in one pass.

Every vector is compared with every query. Only the best `top` rows of each query are kept, so
memory does not grow with the table.

Shapes: B rows of a batch, M queries, D dimension.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.embeddings.vectors import (
    EmbeddingTable,
    Vectors,
    cosines,
    normalize,
    read_vectors,
    shares_of,
)
from pipeline.storage import FileInfo
from pipeline.write.parts import ROW_GROUP_ROWS

BATCH_ROWS = ROW_GROUP_ROWS  # 20 MB of vectors at 512 dimensions
QUERIES_AT_ONCE = 1024  # 40 MB of cosines with such a batch
# Up to so many queries are compared one by one: numpy's product of matrices starts threads that
# spin, and takes 2 s of CPU for one query and 3,000,000 rows of 128, where a sum takes 0.1.
QUERIES_ONE_BY_ONE = 4
THREADS = 8  # at most: each holds a part and a batch


class Hit(NamedTuple):
    """A row found by a search."""

    cosine: float
    """Rounded to float32."""
    shard: str
    row: int
    key: str

    @property
    def order(self) -> tuple[float, str, int]:
        """Sort key of hits: the largest cosine first, then by shard and row."""
        return -self.cosine, self.shard, self.row


class ExactSearch:
    """The best `top` hits of each of M queries (M, D) among the vectors added so far.

    The hits and their cosines depend neither on the order of the batches nor on their sizes. A zero
    or non-finite vector has no cosine and is never found.
    """

    def __init__(self, queries: np.ndarray, top: int):
        self.queries, self.top = normalize(queries), top
        self.hits: list[list[Hit]] = [[] for _ in queries]
        # A row enters when its cosine is above or at this: that of the last hit of a full list.
        self.floors = np.full(len(queries), -np.inf, np.float32)
        # How far the product of float32 matrices may be from the cosine: it rounds D times. What
        # is near enough to a floor is computed once more, exactly.
        self.margin = np.float32(queries.shape[1] * 2.0**-22)

    def add(self, vectors: Vectors) -> None:
        """Compare the rows of a batch with all queries."""
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors.matrix, vectors.matrix))
        unusable = ~(np.isfinite(lengths) & (lengths > 0))
        lengths[unusable] = 1
        for first in range(0, len(self.queries), QUERIES_AT_ONCE):
            near = _products(self.queries[first : first + QUERIES_AT_ONCE], vectors.matrix)
            near /= lengths
            near[:, unusable] = -np.inf
            enough = near >= self._floors(near, first)[:, None]
            for query in np.flatnonzero(enough.any(axis=1)):
                self._offer(first + int(query), vectors, np.flatnonzero(enough[query]))

    def merge(self, hits: Sequence[Iterable[Hit]]) -> None:
        """Take in the hits of another search, of the same queries among other rows."""
        for query, more in enumerate(hits):
            self._keep(query, more)

    def _floors(self, near: np.ndarray, first: int) -> np.ndarray:
        """The least approximate cosine (M,) possibly among a query's best."""
        floors = self.floors[first : first + len(near)] - self.margin
        fresh = np.isneginf(floors)
        if fresh.any() and near.shape[1] > self.top:
            # The batch alone has `top` rows at least as good as this, less twice the error.
            place = near.shape[1] - self.top
            floors[fresh] = np.partition(near[fresh], place, axis=1)[:, place] - 2 * self.margin
        return floors

    def _offer(self, query: int, vectors: Vectors, candidates: np.ndarray) -> None:
        """Let rows near enough compete for a place among a query's best."""
        exact = cosines(vectors.matrix[candidates], self.queries[query : query + 1])
        better = exact >= self.floors[query]  # never of a vector without a cosine: NaN
        if not better.any():
            return
        ids = vectors.ids.take(pa.array(candidates[better]))
        columns = (ids.column(name).to_pylist() for name in ("shard", "row", "key"))
        hits = [Hit(*values) for values in zip(exact[better].tolist(), *columns, strict=True)]
        self._keep(query, hits)

    def _keep(self, query: int, more: Iterable[Hit]) -> None:
        """The best of the hits so far and some more."""
        hits = heapq.nsmallest(self.top, [*self.hits[query], *more], key=lambda hit: hit.order)
        self.hits[query] = hits
        if len(hits) == self.top:
            self.floors[query] = hits[-1].cosine


def search_files(
    table: EmbeddingTable,
    files: Iterable[FileInfo],
    queries: np.ndarray,
    top: int,
    *,
    batch_rows: int = BATCH_ROWS,
    threads: int | None = None,
) -> list[list[Hit]]:
    """The best hits of each query (M, D), best first, among the rows of some of a table's parts.

    Each of `threads` (by default as many as CPUs, at most THREADS) holds what read_vectors holds,
    and the cosines of a batch. Raises UsageError, JobError, StorageError as read_vectors.
    """
    threads = threads or min(THREADS, os.cpu_count() or 1)
    pieces = ((file, share) for file in files for share in shares_of(file))
    lock = Lock()

    def take() -> tuple[FileInfo, tuple[int, int]] | None:
        with lock:
            return next(pieces, None)

    def search_some() -> list[list[Hit]]:
        some = ExactSearch(queries, top)
        while piece := take():
            for vectors in read_vectors(table, piece[0], batch_rows=batch_rows, share=piece[1]):
                some.add(vectors)
        return some.hits

    search = ExactSearch(queries, top)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for some in as_completed([pool.submit(search_some) for _ in range(threads)]):
                search.merge(some.result())
        finally:
            with lock:
                pieces.close()  # after an error, or Ctrl-C, threads end with the piece they are at
    return search.hits


def _products(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of each query (M, D) and each row (B, D): float32 (M, B)."""
    if len(queries) > QUERIES_ONE_BY_ONE:
        return queries @ rows.T
    return np.stack([np.einsum("ij,j->i", rows, query) for query in queries])
