"""What every actor that holds a model does: pixels of a batch onto its device, rows that fail."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.errors import UsageError


def open_device(device: str, threads: int | None) -> torch.device:
    """The device "cpu" or "cuda" of a worker, with at most so many CPU threads (None: torch's own).

    Asking for "cuda" where there is none is a UsageError, never a slow run.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("a GPU was asked for, and torch sees none on this worker")
    if threads:
        torch.set_num_threads(threads)
    return torch.device(device)


def has_pixels(batch: pa.Table) -> np.ndarray:
    """Which records of schema.PIXELS hold an image: bool (N,)."""
    return np.array([len(pixels.as_buffer()) > 0 for pixels in batch["pixels"]], dtype=bool)


def stack_pixels(column: pa.ChunkedArray, size: tuple[int, int]) -> Tensor:
    """uint8 (N, H, W, 3) of the `pixels` of records that hold an image; `size` is (H, W)."""
    rows = [np.frombuffer(p.as_buffer(), np.uint8).reshape(*size, 3) for p in column]
    return torch.from_numpy(np.stack(rows))


def scale_to_unit(vectors: Tensor) -> Tensor:
    """Rows (N, E) at length 1, float32: zeros stay, what is not finite becomes NaN.

    In float64, where the length of a finite float32 vector is finite too.
    """
    return torch.nn.functional.normalize(vectors.double(), dim=-1).float()


def fail_rows(records: pa.Table, failed: np.ndarray, stage: str, detail: str) -> pa.Table:
    """The records, of which those where `failed` (N,) is true failed at `stage` by the model."""
    for name, value in (("stage", stage), ("reason", "model_failed"), ("detail", detail)):
        column = pc.if_else(pa.array(failed), value, records[name])
        records = records.set_column(records.schema.get_field_index(name), name, column)
    return records
