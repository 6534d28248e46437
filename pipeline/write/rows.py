"""Records from a model -> rows of the output's tables.

Each maker is called with records of one shard (see fragments.WriteFragments). Failed records have
no rows here.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.config.segment import SegmentConfig
from pipeline.infer.runs import mask_columns
from pipeline.read.shard import parse_phrases


class MakeMaskRows:
    """schema.LOGITS or schema.RUNS -> rows of `images` and `masks`, and of optional tables."""

    def __init__(
        self,
        config: SegmentConfig,
        tables: dict[str, schema.Table],
        prompts: list[str],
        first_prompt: int,
    ):
        self.embeddings = tables["embeddings"].schema if "embeddings" in tables else None
        self.prompts, self.first_prompt = prompts, first_prompt
        self.rule, self.per_row = config.rule, config.prompt_column is not None

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
        if "logits" in good.column_names:
            from pipeline.infer.masks import finish_logits  # torch: not for embeddings

            good = finish_logits(good, self.rule)
        good = good.combine_chunks()
        per_record = pc.list_value_length(good["counts"]).to_numpy()
        of = np.repeat(np.arange(len(good)), per_record)
        once = [
            "shard",
            "row",
            "key",
            "height",
            "width",
            "first_prompt",
            "mask_height",
            "mask_width",
        ]
        pairs = good.select(once).take(pa.array(of))
        place = np.arange(len(of)) - np.repeat(per_record.cumsum() - per_record, per_record)
        number = pairs["first_prompt"].to_numpy() + place
        sizes = np.stack([pairs["mask_height"].to_numpy(), pairs["mask_width"].to_numpy()], axis=1)
        counts = pc.list_flatten(good["counts"]).combine_chunks()
        known = {
            **{name: pairs[name] for name in ("shard", "row", "key", "height", "width")},
            "prompt_id": pa.array(self.first_prompt + number, pa.int32()),
            "prompt": self._names(good, number),
            **mask_columns(counts, sizes),
            **{name: pc.list_flatten(good[name]) for name in ("score_max", "score_mean")},
            "threshold": np.full(len(of), self.rule.threshold, np.float32),
        }
        masks = pa.table([known[n] for n in schema.MASKS.names], schema=schema.MASKS)
        if not self.rule.kept_side:
            return {"masks": masks}
        return {"masks": masks, "probabilities": map_rows(masks, good)}

    def _names(self, good: pa.Table, number: np.ndarray) -> pa.Array:
        """The prompt of each mask: of a record's own phrases, or by its number."""
        if self.per_row:
            texts, firsts = good["text"].to_pylist(), good["first_prompt"].to_pylist()
            counts = pc.list_value_length(good["counts"]).to_pylist()
            of_record = zip(texts, firsts, counts, strict=True)
            own = [parse_phrases(text)[first : first + n] for text, first, n in of_record]
            return pa.array([phrase for some in own for phrase in some], pa.string())
        return pa.array(self.prompts, pa.string()).take(pa.array(number))


def map_rows(masks: pa.Table, records: pa.Table) -> pa.Table:
    """Rows of `probabilities` of the same pairs as `masks`, from the maps of schema.RUNS."""
    sizes, maps = [], []
    shapes = zip(records["map_height"].to_pylist(), records["map_width"].to_pylist(), strict=True)
    for (height, width), data in zip(shapes, records["maps"], strict=True):
        every = np.frombuffer(data.as_buffer(), np.uint8)
        for part in every.reshape(-1, max(1, height * width)):
            sizes.append([height, width])
            maps.append(part.tobytes())
    known = {name: masks[name] for name in ("shard", "row", "key", "prompt_id", "prompt")}
    return pa.table({**known, "size": sizes, "map": maps}, schema=schema.PROBABILITIES)


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


def image_rows(images: pa.Table) -> pa.Table:
    """Records without a reason -> rows of the images table."""
    return images.select(schema.IMAGES.names).cast(schema.IMAGES)
