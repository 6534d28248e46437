"""What the model gave -> rows of the output's tables, gathered by shard.

The stage between the model and the writer: every record becomes one row of `images` or one row of
`errors`, and every (image, prompt) one row of `masks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.config.segment import SegmentConfig
from pipeline.write.fragments import pack_tables


class MakeTables:
    """schema.LOGITS -> schema.FRAGMENTS: masks as the config wants them, counted and packed."""

    def __init__(
        self,
        config: SegmentConfig,
        tables: dict[str, schema.Table],
        prompts: list[str],
        first_prompt: int,
    ):
        self.embeddings = tables["embeddings"].schema if "embeddings" in tables else None
        self.prompts, self.first_prompt = prompts, first_prompt
        self.threshold, self.mask_size = config.threshold, config.mask_size
        kept = config.keep_probabilities
        self.probability_side = 0 if kept == "none" else int(kept)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return make_fragments(batch, self._tables)

    def _tables(self, batch: pa.Table) -> dict[str, pa.Table]:
        good = batch.filter(pc.greater(pc.binary_length(batch["logits"]), 0))
        # An image whose prompts came in several runs is counted with its first.
        images = good.filter(pc.equal(good["first_prompt"], 0))
        tables = {"images": image_rows(images), **self._per_prompt(good)}
        if self.embeddings is not None:
            tables["embeddings"] = embedding_rows(images, self.embeddings)
        return tables

    def _per_prompt(self, good: pa.Table) -> dict[str, pa.Table]:
        """Masks, and probability maps if wanted."""
        from pipeline.infer.masks import (  # torch: not for embeddings
            masks_of_image,
            probability_map,
        )

        masks: list[dict[str, Any]] = []
        maps: list[dict[str, Any]] = []
        for record, logits in _logits(good):
            found = masks_of_image(
                logits,
                size=(record["height"], record["width"]),
                threshold=self.threshold,
                mask_size=self.mask_size,
            )
            for i, mask in enumerate(found):
                row = record | {
                    "prompt_id": self.first_prompt + record["first_prompt"] + i,
                    "prompt": self.prompts[record["first_prompt"] + i],
                }
                masks.append(row | mask | {"threshold": self.threshold})
                if self.probability_side:
                    kept = probability_map(logits[i], self.probability_side)
                    maps.append(row | {"size": list(kept.shape), "map": kept.tobytes()})
        tables = {"masks": pa.Table.from_pylist(masks, schema=schema.MASKS)}
        if self.probability_side:
            tables["probabilities"] = pa.Table.from_pylist(maps, schema=schema.PROBABILITIES)
        return tables


class MakeEmbeddingTables:
    """schema.VECTORS -> schema.FRAGMENTS: rows of `images` and of `embeddings`."""

    def __init__(self, embeddings: pa.Schema):
        self.embeddings = embeddings

    def __call__(self, batch: pa.Table) -> pa.Table:
        return make_fragments(batch, self._tables)

    def _tables(self, batch: pa.Table) -> dict[str, pa.Table]:
        good = batch.filter(pc.greater(pc.binary_length(batch["vector"]), 0))
        rows = embedding_rows(good, self.embeddings)
        return {"images": image_rows(good), "embeddings": rows}


class MakeLabelTables:
    """schema.RANKED -> schema.FRAGMENTS: rows of `labels` and, if there are any, of `images`."""

    def __init__(self, tables: dict[str, schema.Table], labels: list[str]):
        self.images, self.columns = "images" in tables, tables["labels"].schema
        self.labels = pa.array(labels, pa.string())

    def __call__(self, batch: pa.Table) -> pa.Table:
        return make_fragments(batch, self._tables)

    def _tables(self, batch: pa.Table) -> dict[str, pa.Table]:
        good = batch.filter(pc.greater(pc.list_value_length(batch["label_id"]), 0))
        tables = {"images": image_rows(good)} if self.images else {}
        return tables | {"labels": self._rows(good)}

    def _rows(self, good: pa.Table) -> pa.Table:
        """A row of each label of each record."""
        records = good.combine_chunks()
        of = pc.list_parent_indices(records["label_id"])
        counts = pc.list_value_length(records["label_id"]).to_numpy()
        label_ids = pc.list_flatten(records["label_id"])
        known = {
            **{name: records[name].take(of) for name in ("shard", "row", "key")},
            "rank": np.concatenate([np.arange(n, dtype=np.int32) for n in [0, *counts]]),
            "label_id": label_ids,
            "label": self.labels.take(label_ids),
            **{name: pc.list_flatten(records[name]) for name in ("probability", "logit")},
        }
        return pa.table([known[name] for name in self.columns.names], schema=self.columns)


def embedding_rows(images: pa.Table, columns: pa.Schema) -> pa.Table:
    """Rows of the embeddings table, from records that came out well and have vectors."""
    arrays = [
        _vectors(images[f.name], f.type) if pa.types.is_fixed_size_list(f.type) else images[f.name]
        for f in columns
    ]
    return pa.table(arrays, schema=columns)


def _vectors(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """float32 bytes -> fixed_size_list of the wanted type."""
    data = b"".join(vector.as_buffer() for vector in column)
    floats = np.frombuffer(data, np.float32).astype(kind.value_type.to_pandas_dtype())
    return pa.FixedSizeListArray.from_arrays(pa.array(floats), type=kind)


def _logits(good: pa.Table) -> Iterable[tuple[dict[str, Any], np.ndarray]]:
    """Each record with its logits (P, h, w) float32."""
    names = ["shard", "row", "key", "height", "width", "first_prompt"]
    shapes = zip(good["logits_height"], good["logits_width"], good["logits"], strict=True)
    for record, (h, w, data) in zip(good.select(names).to_pylist(), shapes, strict=True):
        logits = np.frombuffer(data.as_buffer(), np.float32)
        yield record, logits.reshape(-1, h.as_py(), w.as_py())


def make_fragments(
    batch: pa.Table, tables_of: Callable[[pa.Table], dict[str, pa.Table]]
) -> pa.Table:
    """schema.FRAGMENTS of a batch that has a record's columns.

    `tables_of` makes the job's tables from the records of one shard, the first of them with rows
    of every image that came out well; those that failed become rows of `errors` here.
    """
    rows = []
    for shard in pc.unique(batch["shard"]).to_pylist():
        records = batch.filter(pc.equal(batch["shard"], shard))
        failed = records.filter(pc.not_equal(records["reason"], ""))
        ends = records.filter(pc.equal(records["row"], -1))
        tables = tables_of(records)
        first = next(iter(tables.values()))
        of_rows = failed.filter(pc.greater_equal(failed["row"], 0))
        rows.append(
            {
                "shard": shard,
                "images": len(pc.unique(first["row"])),
                "outputs": sum(len(t) for name, t in tables.items() if name != "images"),
                "errors": len(of_rows),
                "reason": _most_frequent(failed["reason"]),
                "total": ends["total"][0].as_py() if len(ends) else -1,
                "tables": pack_tables({**tables, "errors": _errors(failed)}),
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.FRAGMENTS)


def _most_frequent(values: pa.ChunkedArray) -> str:
    """The value that is there most often; "" where there is none."""
    return max(Counter(values.to_pylist()).items(), key=lambda item: item[1], default=("", 0))[0]


def image_rows(images: pa.Table) -> pa.Table:
    """Rows of the images table, from records that came out well."""
    return images.select(schema.IMAGES.names).cast(schema.IMAGES)


def _errors(failed: pa.Table) -> pa.Table:
    """Rows of the errors table; a shard's own failure has neither row nor key."""
    of_shard = pc.equal(failed["row"], -1)
    for name in ("row", "key"):
        null = pa.scalar(None, failed.schema.field(name).type)
        index = failed.schema.get_field_index(name)
        failed = failed.set_column(index, name, pc.if_else(of_shard, null, failed[name]))
    return failed.select(schema.ERRORS.names).cast(schema.ERRORS)
