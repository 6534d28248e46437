"""Vectors of rows of a table, found by key: for queries of the kind "more like this".

Of parts without a wanted key only the column of keys is read, of others a row group, too.

Shapes: K keys, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embeddings.index import VectorIndex, read_key
from pipeline.embeddings.vectors import EmbeddingTable, Vectors, open_checked, read_rows
from pipeline.errors import UsageError, one_line
from pipeline.storage import FileInfo

READS_AT_ONCE = 8
BATCH_ROWS = 2**16  # of keys
NAMED = 3  # rows of one key, in a message: more of them are not looked for


def find_like(source: EmbeddingTable | VectorIndex, keys: Sequence[str]) -> np.ndarray:
    """Vectors (K, D) float32, as stored, of the rows with at least one key.

    Raises UsageError for a key of no row, or of several; JobError, StorageError.
    """
    if isinstance(source, VectorIndex):
        found = [row for key in keys for row in _one_by_one(read_key(source, key, NAMED))]
    else:
        found = _find_in_table(source, keys)
    vectors = []
    for key in keys:
        rows = [(shard, row, vector) for shard, row, known, vector in found if known == key]
        if len(rows) != 1:
            named = ", ".join(f"{one_line(shard, 60)} row {row}" for shard, row, _ in rows[:NAMED])
            what = f"several rows have this key ({named}, ...)" if rows else "no row has this key"
            raise UsageError(f"--like {one_line(key)}: {what}; --image takes the image itself")
        vectors.append(rows[0][2])
    return np.stack(vectors)


_Row = tuple[str, int, str, np.ndarray]  # shard, row, key, vector


def _find_in_table(table: EmbeddingTable, keys: Sequence[str]) -> list[_Row]:
    """The rows with one of these keys, or at least NAMED of each."""
    wanted = pa.array(keys, pa.string())

    def find(file: FileInfo) -> list[_Row]:
        numbers = _find_in_part(table, file, wanted)
        return _one_by_one(read_rows(table, file, numbers)) if len(numbers) else []

    found: list[_Row] = []
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        for some in pool.map(find, table.files):
            found += some
            if len(found) >= NAMED * len(keys):  # some key has too many
                pool.shutdown(cancel_futures=True)
                break
    return found


def _find_in_part(table: EmbeddingTable, file: FileInfo, wanted: pa.Array) -> np.ndarray:
    """Numbers of rows with one of the `wanted` keys: int64, NAMED of each key at most."""
    found: dict[str, list[int]] = {}
    with open_checked(table, file) as parquet:
        offset = 0
        for batch in parquet.iter_batches(BATCH_ROWS, columns=["key"], use_threads=False):
            for place in np.flatnonzero(pc.is_in(batch["key"], wanted)):
                numbers = found.setdefault(batch["key"][place].as_py(), [])
                if len(numbers) < NAMED:
                    numbers.append(offset + int(place))
            offset += len(batch)
    return np.array(sorted(number for numbers in found.values() for number in numbers), np.int64)


def _one_by_one(rows: Vectors) -> list[_Row]:
    ids = (rows.ids.column(name).to_pylist() for name in ("shard", "row", "key"))
    return list(zip(*ids, rows.matrix, strict=True))
