"""Measure an index: the share found of the nearest rows, and the time of a query.

Some rows of the table are the queries. Each should find its nearest other rows by the exact search;
the row itself does not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.embeddings.index import VectorIndex, search_index
from pipeline.embeddings.search import Hit, search_files
from pipeline.embeddings.vectors import EmbeddingTable, count_rows, read_rows

TOP = 10
SEED = 0  # of the rows that are drawn


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Measured recall, and times."""

    queries: int
    recall: float
    """The share found of the nearest TOP rows, mean over the queries."""
    index_ms: float
    """Milliseconds a query, one after the other, by the index."""
    exact_ms: float
    """Milliseconds of a query alone, by the exact search."""
    exact_pass_ms: float
    """Milliseconds a query, all of them answered in one pass of the exact search."""


def measure_recall(index: VectorIndex, table: EmbeddingTable, count: int) -> Recall | None:
    """The recall of an index of `table`, with `count` of its rows as the queries.

    The same table gives the same queries. Reads the table twice. None if no drawn row has another
    one near it.
    """
    ids, queries = draw_rows(table, index.rows, count)
    started = time.perf_counter()
    found = search_index(index, queries, TOP + 1)
    index_s = time.perf_counter() - started
    started = time.perf_counter()
    wanted = search_files(table, table.files, queries, TOP + 1)
    pass_s = time.perf_counter() - started
    started = time.perf_counter()
    search_files(table, table.files, queries[:1], TOP + 1)
    exact_s = time.perf_counter() - started
    shares = [
        share_found(_others(hits, own), _others(best, own))
        for own, hits, best in zip(ids, found, wanted, strict=True)
        if _others(best, own)
    ]
    if not shares:
        return None
    return Recall(
        queries=len(shares),
        recall=float(np.mean(shares)),
        index_ms=1000 * index_s / len(queries),
        exact_ms=1000 * exact_s,
        exact_pass_ms=1000 * pass_s / len(queries),
    )


def share_found(found: Sequence[Hit], wanted: Sequence[Hit]) -> float:
    """The share of `wanted` among the hits; another row at the last one's cosine is as good."""
    return sum(hit.cosine >= wanted[-1].cosine for hit in found) / len(wanted)


def draw_rows(
    table: EmbeddingTable, rows: int, count: int
) -> tuple[list[tuple[str, int]], np.ndarray]:
    """Shard and row of `count` rows, or of all, of a table of `rows`, and their vectors."""
    numbers = np.random.default_rng(SEED).choice(rows, min(count, rows), replace=False)
    numbers.sort()
    ids: list[tuple[str, int]] = []
    pieces: list[np.ndarray] = []
    offset = 0
    for file in table.files:
        end = offset + count_rows(file)
        here = numbers[(numbers >= offset) & (numbers < end)] - offset
        if len(here):
            drawn = read_rows(table, file, here)
            pieces.append(drawn.matrix)
            shards, places = (drawn.ids[name].to_pylist() for name in ("shard", "row"))
            ids += zip(shards, places, strict=True)
        offset = end
    return ids, np.concatenate(pieces)


def _others(hits: Sequence[Hit], own: tuple[str, int]) -> list[Hit]:
    """The best TOP hits beside the query's own row."""
    return [hit for hit in hits if (hit.shard, hit.row) != own][:TOP]
