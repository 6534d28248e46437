"""Records from a model -> rows of the output's tables.

Each maker is called with records of one shard (see fragments.WriteFragments). Records that failed
have no rows here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.config.segment import SegmentConfig
from pipeline.read.shard import parse_phrases


class MakeMaskRows:
    """schema.LOGITS -> rows of `images` and `masks`, and of optional tables."""

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
        self.per_row = config.prompt_column is not None
        kept = config.keep_probabilities
        self.probability_side = 0 if kept == "none" else int(kept)

    def __call__(self, batch: pa.Table) -> dict[str, pa.Table]:
        fine = pc.and_(pc.equal(batch["reason"], ""), pc.greater_equal(batch["row"], 0))
        good = batch.filter(fine)
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
            text = record.pop("text")
            own = parse_phrases(text) if self.per_row else self.prompts
            if not len(logits):  # an image without phrases of its own
                continue
            found = masks_of_image(
                logits,
                size=(record["height"], record["width"]),
                threshold=self.threshold,
                mask_size=self.mask_size,
            )
            for i, mask in enumerate(found):
                row = record | {
                    "prompt_id": self.first_prompt + record["first_prompt"] + i,
                    "prompt": own[record["first_prompt"] + i],
                }
                masks.append(row | mask | {"threshold": self.threshold})
                if self.probability_side:
                    kept = probability_map(logits[i], self.probability_side)
                    maps.append(row | {"size": list(kept.shape), "map": kept.tobytes()})
        tables = {"masks": pa.Table.from_pylist(masks, schema=schema.MASKS)}
        if self.probability_side:
            tables["probabilities"] = pa.Table.from_pylist(maps, schema=schema.PROBABILITIES)
        return tables


class MakeEmbeddingRows:
    """schema.VECTORS -> rows of `images` and of `embeddings`."""

    def __init__(self, embeddings: pa.Schema):
        self.embeddings = embeddings

    def __call__(self, batch: pa.Table) -> dict[str, pa.Table]:
        good = batch.filter(pc.greater(pc.binary_length(batch["vector"]), 0))
        rows = embedding_rows(good, self.embeddings)
        return {"images": image_rows(good), "embeddings": rows}


class MakeLabelRows:
    """schema.RANKED -> rows of `labels` and, if there are any, of `images`."""

    def __init__(self, tables: dict[str, schema.Table], labels: list[str]):
        self.images, self.columns = "images" in tables, tables["labels"].schema
        self.labels = pa.array(labels, pa.string())

    def __call__(self, batch: pa.Table) -> dict[str, pa.Table]:
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
    """Records with vectors -> rows of the embeddings table."""
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
    names = ["shard", "row", "key", "height", "width", "first_prompt", "text"]
    shapes = zip(good["logits_height"], good["logits_width"], good["logits"], strict=True)
    for record, (h, w, data) in zip(good.select(names).to_pylist(), shapes, strict=True):
        logits = np.frombuffer(data.as_buffer(), np.float32)
        yield record, logits.reshape(-1, h.as_py(), w.as_py())


def image_rows(images: pa.Table) -> pa.Table:
    """Records without a reason -> rows of the images table."""
    return images.select(schema.IMAGES.names).cast(schema.IMAGES)
