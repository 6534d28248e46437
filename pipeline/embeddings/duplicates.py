"""Near-duplicates in a table of embeddings: connected components of pairs above a cosine.

All pairs are compared, a block of rows with a tile of rows at a time, so the N x N matrix never
exists. HELD_BYTES of rows are held while the rest of the table passes by: a smaller table is read
once. For each row of any table one integer stays: its parent in the component.

Shapes: N rows of the table, I rows of a block, J of a tile, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import numpy as np
import pyarrow as pa

from pipeline.embeddings.vectors import (
    EmbeddingTable,
    Vectors,
    cosines,
    count_rows,
    normalize,
    read_vectors,
)

HELD_BYTES = 2**30  # of float32 vectors: half a million rows at 512 dimensions
BLOCK_ROWS = 16384  # of those, compared at once with
TILE_ROWS = 256  # rows that pass by: 16 MB of cosines
BATCH_ROWS = 8192
# Of the groups that are gathered in one pass over the table: 64 MB of first members, and their ids.
GROUPS_AT_ONCE = 2**15
MEMBERS_AT_ONCE = 2**20
# A product of float32 matrices may be off by so much: of exact copies, too, whose cosine is 1.
ROUNDING = 1e-6

DUPLICATES = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),  # from 0, by the group's first member
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("cosine", pa.float32(), nullable=False),  # to the first member, whose own is 1
    ]
)


class Forest:
    """Disjoint sets of the rows 0..N-1: each row hangs on a smaller one of its set, or is its root.

    So the root of a set is its first row.
    """

    def __init__(self, count: int):
        self.parents = np.arange(count, dtype=np.int64)

    def roots(self, rows: np.ndarray) -> np.ndarray:
        """The first row of the set of each, int64 (n,)."""
        found = self.parents[rows]
        while True:
            higher = self.parents[found]
            if np.array_equal(higher, found):
                break
            found = higher
        self.parents[rows] = found  # the next walk is short
        return found

    def join(self, some: np.ndarray, others: np.ndarray) -> None:
        """Make one set of the sets of each pair, int64 (n,) each."""
        while True:
            a, b = self.roots(some), self.roots(others)
            differs = a != b
            if not differs.any():
                return
            a, b, some, others = a[differs], b[differs], some[differs], others[differs]
            # Of several rows that a root is to hang on, one is kept; the next round joins the rest.
            np.minimum.at(self.parents, np.maximum(a, b), np.minimum(a, b))


class Duplicates:
    """The groups of near-duplicates of a table; made by find_duplicates.

    The order of rows is the table's: by part, then by place in it.
    """

    def __init__(self, table: EmbeddingTable, ends: list[int], roots: np.ndarray):
        sizes = np.bincount(roots, minlength=len(roots))
        self.table, self.ends, self.roots = table, ends, roots
        self.firsts = np.flatnonzero(sizes > 1)
        self.sizes = sizes[self.firsts]

    @property
    def rows(self) -> int:
        """How many rows are in a group."""
        return int(self.sizes.sum())

    @property
    def kept(self) -> int:
        """How many rows are left when of each group only the first is kept."""
        return len(self.roots) - self.rows + len(self.sizes)

    def read(self) -> Iterator[pa.Table]:
        """The groups as tables of DUPLICATES, sorted by group and row of the table.

        Each takes one pass over the table, and holds at most GROUPS_AT_ONCE groups, and
        MEMBERS_AT_ONCE rows or a single group.
        """
        start = 0
        before = np.concatenate([[0], np.cumsum(self.sizes)])
        while start < len(self.firsts):
            limit = before[start] + MEMBERS_AT_ONCE
            end = max(start + 1, int(np.searchsorted(before, limit, side="right")) - 1)
            end = min(end, start + GROUPS_AT_ONCE)
            yield self._gather(start, end)
            start = end

    def _gather(self, start: int, end: int) -> pa.Table:
        """The groups start..end-1."""
        firsts = self.firsts[start:end]
        vectors = np.empty((len(firsts), self.table.dimension), np.float32)
        pieces = [DUPLICATES.empty_table()]
        for offset, batch in _read_rows(self.table, self.ends, batch_rows=BATCH_ROWS):
            roots = self.roots[offset : offset + len(batch.matrix)]
            groups = np.minimum(np.searchsorted(firsts, roots), len(firsts) - 1)
            members = np.flatnonzero(firsts[groups] == roots)
            groups, rows = groups[members], batch.matrix[members]
            new = roots[members] == offset + members
            vectors[groups[new]] = rows[new]
            ids = batch.ids.take(pa.array(members))
            columns = [pa.array(groups + start), *ids.columns, cosines(rows, vectors[groups])]
            pieces.append(pa.table(columns, schema=DUPLICATES))
        # Stable, so that rows of a group stay in the table's order.
        table = pa.concat_tables(pieces)
        return table.take(pa.array(np.argsort(table["group"].to_numpy(), kind="stable")))


def find_duplicates(
    table: EmbeddingTable,
    cosine: float,
    *,
    held_bytes: int = HELD_BYTES,
    block_rows: int = BLOCK_ROWS,
    tile_rows: int = TILE_ROWS,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Duplicates:
    """Find the connected components of pairs of at least this cosine.

    Takes N^2 / 2 products of D terms, and reads the table N D 4 / `held_bytes` times, rounded up;
    each time without the rows held before. A zero or non-finite vector is in no group.
    `on_progress` is called with the share of the work done. Raises UsageError, JobError,
    StorageError as read_vectors.
    """
    ends = list(accumulate(count_rows(file) for file in table.files))
    rows, pairs = ends[-1], 0
    forest = Forest(rows)
    held_rows = max(1, held_bytes // (4 * table.dimension))
    for start in range(0, rows, held_rows):
        held = np.empty((min(held_rows, rows - start), table.dimension), np.float32)
        batches = _read_rows(table, ends, start=start, batch_rows=BATCH_ROWS)
        for offset, batch in batches:
            passing, end = normalize(batch.matrix), offset - start + len(batch.matrix)
            if (room := len(held) - (offset - start)) > 0:
                held[offset - start : end] = passing[:room]
            known = held[:end]  # with the rows that pass by, as far as they are held
            for i in range(0, len(known), block_rows):
                block = known[i : i + block_rows]
                _join_near(forest, start + i, block, offset, passing, cosine, tile_rows)
            pairs += len(known) * len(passing)
            on_progress(min(1.0, pairs / (rows * rows / 2)))
    return Duplicates(table, ends, forest.roots(np.arange(rows)))


def _join_near(
    forest: Forest,
    start: int,
    block: np.ndarray,
    offset: int,
    passing: np.ndarray,
    cosine: float,
    tile_rows: int,
) -> None:
    """Join the pairs of a block (I, D) and passing rows (B, D), a tile at a time.

    `start` and `offset` are the numbers of their first rows.
    """
    rows = np.arange(start, start + len(block))
    for first in range(0, len(passing), tile_rows):
        tile = passing[first : first + tile_rows]
        others = np.arange(offset + first, offset + first + len(tile))
        i, j = np.nonzero(block @ tile.T >= cosine - ROUNDING)
        a, b = forest.roots(rows)[i], forest.roots(others)[j]
        apart = a != b  # few, once a large group hangs together
        forest.join(a[apart], b[apart])


def _read_rows(
    table: EmbeddingTable,
    ends: list[int],
    *,
    start: int = 0,
    batch_rows: int,
) -> Iterator[tuple[int, Vectors]]:
    """The table from row `start` on, each batch with the number of its first row.

    `ends` holds, for each part, the number of the row behind its last one.
    """
    for file, begin, end in zip(table.files, [0, *ends], ends, strict=False):
        offset = max(begin, start)
        if offset >= end:
            continue
        skip = offset - begin
        for batch in read_vectors(table, file, batch_rows=batch_rows, skip_rows=skip):
            yield offset, batch
            offset += len(batch.matrix)
