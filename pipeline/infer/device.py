"""Rows of a batch through a model on a device: the one way there, for pixels and for texts.

Shapes: N records, B rows that the model takes at once, (H, W) image size, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.model.clip import VisionTower
from pipeline.prepare.processor import ImageProcessor

# Images of at most GROUP_TOKENS tokens run on a CPU in groups of always GROUP_ROWS, filled up if
# need be: alone each would read all weights for few products, and a CLIP B/32 takes 40 % more of a
# core. An image has the same bits at every place of a group and beside all others: measured, see
# benchmarks/NOTES.md, where for rows alone it is certain.
GROUP_ROWS, GROUP_TOKENS = 4, 64


class Device:
    """ "cpu" or "cuda" of a worker, and how rows of a batch are run there.

    A CPU computes every row alone: on one thread, from tensors of its own at the start of a
    64-byte aligned allocation. Kernels are chosen by shape and split work by the number of
    threads, and both change the last bits; here neither can depend on the batch, on the slice, on
    the row's neighbours or on how many threads and actors there are. Rows run on `threads` threads
    beside each other and share the weights. Images of few tokens run in groups: see GROUP_ROWS.

    A GPU takes many rows at once, and its last bits depend on how many.
    """

    def __init__(self, kind: str, threads: int | None = None):
        """Raises UsageError for "cuda" without a GPU. `threads` by default as many as torch's."""
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError("a GPU was asked for, and torch sees none on this worker")
        self.torch = torch.device(kind)
        self._threads = None
        if kind == "cpu":
            self._threads = ThreadPoolExecutor(
                threads or torch.get_num_threads(),
                initializer=torch.set_num_threads,  # of the thread that calls it
                initargs=(1,),
            )

    @property
    def alone(self) -> bool:
        """Whether every row is run on its own."""
        return self._threads is not None

    def split(self, count: int, at_once: int) -> list[slice]:
        """Slices of `count` rows that run at once: one row on a CPU, at most `at_once` on a GPU."""
        step = 1 if self.alone else at_once
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def run(self, function: Callable[..., Any], *inputs: Iterable[Any]) -> list[Any]:
        """`function` of the first of each of the `inputs`, of the second, ..., in their order."""
        inferred = torch.inference_mode()(function)
        # CUDA kernels are queued by one thread.
        return list((self._threads.map if self._threads else map)(inferred, *inputs))

    def load_pixels(
        self, column: pa.ChunkedArray, processor: ImageProcessor, tower: VisionTower
    ) -> Iterator[Tensor]:
        """Normalised (B, 3, H, W) float32 on the device of N records' `pixels`, as `tower` runs.

        N rows or more in all: those that fill up the last group are for the caller to leave out.
        """
        height, width = processor.image_size
        rows = [np.frombuffer(p.as_buffer(), np.uint8).reshape(height, width, 3) for p in column]
        step = (
            (GROUP_ROWS if tower.count_tokens(height, width) <= GROUP_TOKENS else 1)
            if self.alone
            else len(rows)
        )
        for i in range(0, len(rows), step):
            some = rows[i : i + step]
            some += some[:1] * (step - len(some))
            yield processor.normalize(torch.from_numpy(np.stack(some)).to(self.torch))


def has_pixels(batch: pa.Table) -> np.ndarray:
    """Which records of schema.PIXELS hold an image: bool (N,)."""
    return np.array([len(pixels.as_buffer()) > 0 for pixels in batch["pixels"]], dtype=bool)


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
