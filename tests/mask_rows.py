"""Masks as rows of the table, by the functions that a job calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.segment import MaskRule
from pipeline.infer.masks import Found, masks_of_image
from pipeline.infer.runs import mask_columns


def masks_of(
    logits: Any, *, size: tuple[int, int], threshold: float, mask_size: Any = "image"
) -> list[dict[str, Any]]:
    """Columns of schema.MASKS of one image."""
    return as_rows(masks_of_image(logits, size, MaskRule(threshold, mask_size)))


def as_rows(found: Found) -> list[dict[str, Any]]:
    """Columns of schema.MASKS."""
    counts = pa.array([c.tolist() for c in found.counts], pa.list_(pa.int32()))
    columns = mask_columns(counts, np.tile(found.size, (len(found.counts), 1)))
    scores = {"score_max": found.score_max, "score_mean": found.score_mean}
    return pa.table({**columns, **scores}).to_pylist() if len(counts) else []
