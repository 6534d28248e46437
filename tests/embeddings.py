"""Tables of embeddings made for tests, as the embed job leaves them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

FACTS = {"model": "some/model", "weights_hash": "ab" * 32, "normalized": "true"}


def random_vectors(count: int, dimension: int = 24, seed: int = 0) -> np.ndarray:
    """(count, dimension) float32 of length 1."""
    rows = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fixed_size(vectors: np.ndarray) -> pa.Array:
    """A non-null fixed_size_list column of float32 or float16 rows."""
    kind = pa.field("element", pa.from_numpy_dtype(vectors.dtype), nullable=False)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.reshape(-1)), type=pa.list_(kind, vectors.shape[1])
    )


def embedding_part(
    vectors: np.ndarray, shard: str, *, keys: list[str] | None = None, **columns: Any
) -> pa.Table:
    """The rows of one shard; keys are "key-0", ... by default."""
    keys = keys or [f"key-{row}" for row in range(len(vectors))]
    ids = {"shard": [shard] * len(vectors), "row": np.arange(len(vectors)), "key": keys}
    return pa.table({**ids, "vector": fixed_size(vectors), **columns})


def write_part(output: str, part: pa.Table, *, group_rows: int = 100, **facts: str) -> None:
    """Write a part under the name of its first shard; `facts` differ from FACTS."""
    dimension = str(part.schema.field("vector").type.list_size)
    metadata = {**FACTS, "dimension": dimension, "schema_version": "1", **facts}
    named = {f"clipseg_ray.{name}": value for name, value in metadata.items()}
    sink = io.BytesIO()
    pq.write_table(part.replace_schema_metadata(named), sink, row_group_size=group_rows)
    name = part["shard"][0].as_py().replace("/", "-") if len(part) else "_schema"
    storage.write_bytes(f"{output}/embeddings/{name}.parquet", sink.getvalue())


def write_table(output: str, vectors: np.ndarray, *, parts: int = 3, **facts: str) -> str:
    """Parts of about equal size (shards 00.tar, 01.tar, ...) and the empty part; returns `output`.

    Row i of `vectors` is the i-th in the order of (shard, row).
    """
    for i, some in enumerate(np.array_split(vectors, parts)):
        write_part(output, embedding_part(some, f"{i:02}.tar"), **facts)
    write_part(output, embedding_part(vectors[:0], ""), **facts)
    return output


def ids_of(count: int, parts: int = 3) -> list[tuple[str, int]]:
    """(shard, row) of each row of write_table's `vectors`."""
    return [
        (f"{i:02}.tar", row)
        for i, some in enumerate(np.array_split(np.arange(count), parts))
        for row in range(len(some))
    ]


def full_sort(
    vectors: np.ndarray, queries: np.ndarray, top: int, parts: int = 3
) -> list[list[tuple[str, int, np.float32]]]:
    """What the search must find: every cosine in float64, everything sorted."""
    rows, wanted = vectors.astype(np.float64), queries.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    ids = ids_of(len(vectors), parts)
    found = []
    for cosines in (wanted @ rows.T).astype(np.float32):
        order = np.argsort(-cosines, kind="stable")[:top]
        found.append([(*ids[i], cosines[i]) for i in order])
    return found
