"""Rows of a batch through a model on a device: the one way there, for pixels and for texts.

Shapes: N records, B rows in one call of the model, (H, W) image size, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from pipeline.config import log
from pipeline.config.options import Precision, check_cpu_precision
from pipeline.errors import JobError, UsageError
from pipeline.model.clip import MLP, Attention, VisionTower
from pipeline.prepare.processor import ImageProcessor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LANES = 2  # slices in flight on a GPU: one copies and is looked at while the other computes
_SHARE = 16  # of the free memory of a GPU, for the rows that one lane computes at once
# Images of at most GROUP_TOKENS tokens run on a CPU in groups of always GROUP_ROWS, filled up if
# need be: alone each would read all weights for few products, and a CLIP B/32 takes 40 % more of a
# core. An image has the same bits at every place of a group and beside all others: measured, see
# benchmarks/NOTES.md, where for rows alone it is certain.
GROUP_ROWS, GROUP_TOKENS = 4, 64

T = TypeVar("T")


class Device:
    """ "cpu" or "cuda" of a worker, and how rows of a batch are run there.

    A CPU computes every row alone: on one thread, from tensors of its own at the start of a
    64-byte aligned allocation. Kernels are chosen by shape and split work by the number of
    threads, and both change the last bits; here neither can depend on the batch, on the slice, on
    the row's neighbours or on how many threads and actors there are. Rows run on `threads` threads
    beside each other and share the weights. Images of few tokens run in groups: see GROUP_ROWS.

    A GPU takes many rows together, and its last bits depend on how many. Whether it takes TF32 for
    float32 is a setting of the process, made here: torch's own is yes, but in convolutions alone.
    """

    def __init__(
        self,
        kind: str,
        threads: int | None = None,
        *,
        precision: Precision = "float32",
        together: bool | None = None,
    ):
        """Raises UsageError for "cuda" without a GPU, and for TF32 on a CPU.

        `threads` by default as many as torch's; `precision` of the models put here by `place`;
        `together`: whether it takes rows as a GPU does, by default if it is one.
        """
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError("a GPU was asked for, and torch sees none on this worker")
        if kind == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            torch.backends.cudnn.allow_tf32 = precision != "float32"
        else:
            check_cpu_precision(precision)
        self.dtype = _DTYPES.get(precision, torch.float32)
        """Of the weights and products of the image model: see _convert."""
        self.torch = torch.device(kind)
        self.alone = not (kind == "cuda" if together is None else together)
        """Whether every row is run on its own."""
        self._most: int | None = None
        self._one = Lock()
        if self.alone:
            self._threads = ThreadPoolExecutor(
                threads or torch.get_num_threads(),
                initializer=torch.set_num_threads,  # of the thread that calls it
                initargs=(1,),
            )
        else:
            self._threads = ThreadPoolExecutor(_LANES, initializer=self._open_lane)

    @classmethod
    def of(cls, device: str | Device, threads: int | None, precision: Precision) -> Device:
        """The device of an actor: an existing one, or one by its name."""
        if isinstance(device, Device):
            return device
        return cls(device, threads, precision=precision)

    def place(self, model: nn.Module) -> None:
        """Move a model here, and convert its weights once, as far as they are converted."""
        model.to(self.torch)
        if self.dtype != torch.float32:
            _convert(model, self.dtype)

    def split(self, count: int, at_once: int) -> list[slice]:
        """Slices of `count` rows to run at once: one row on a CPU, at most `at_once` on a GPU."""
        step = 1 if self.alone else at_once
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def run(self, function: Callable[..., Any], *inputs: Iterable[Any]) -> list[Any]:
        """`function` of the first of each of the `inputs`, of the second, ..., in their order."""
        inferred = torch.inference_mode()(function)
        # On a GPU by the thread that asks, and on its stream.
        return list((self._threads.map if self.alone else map)(inferred, *inputs))

    def group(self, tower: VisionTower, size: tuple[int, int]) -> int:
        """Images of a size that a CPU takes at once: see GROUP_ROWS. On a GPU always 1."""
        few = tower.count_tokens(*size) <= GROUP_TOKENS
        return GROUP_ROWS if self.alone and few else 1

    def over(
        self, count: int, at_once: int, function: Callable[[slice], T], *, group: int = 1
    ) -> Iterator[T]:
        """`function` of slices of `count` rows, in their order; its results lie on the host.

        A CPU takes a `group` at a time, the last of them perhaps smaller. On a GPU two slices are
        in flight, each on a thread and a stream of its own; one without enough memory is halved,
        and later calls take no larger ones. Raises JobError if memory lacks for a single row.
        """
        if self.alone:
            starts = range(0, count, group)
            yield from self.run(function, [slice(i, min(i + group, count)) for i in starts])
            return
        slices = self.split(count, min(at_once, self._most or at_once))
        for results in self._threads.map(lambda some: self._in_lane(function, some), slices):
            yield from results

    def _open_lane(self) -> None:
        """Give a thread a stream of its own."""
        if self.torch.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())

    @torch.inference_mode()
    def _in_lane(self, function: Callable[[slice], T], some: slice) -> list[T]:
        """The result of a slice, or those of its halves."""
        if self.torch.type == "cuda":  # what the actor has put there: weights, prompts
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        try:
            return [function(some)]
        except torch.OutOfMemoryError:
            pass  # out of here the error no longer holds what lies in the memory
        count = some.stop - some.start
        if count == 1:
            raise JobError("the GPU has too little memory for one image and its prompts")
        half = count // 2
        with self._one:
            if self._most is None:
                said = f"the GPU has too little memory for {count} images at once; halving"
                log.say("note", said)
            self._most = min(self._most or half, half)
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()
        middle = some.start + half
        parts = (slice(some.start, middle), slice(middle, some.stop))
        return [result for part in parts for result in self._in_lane(function, part)]

    def fit(self, row_bytes: int, most: int) -> int:
        """Rows of so many bytes for a lane to compute at once: at least one, at most `most`."""
        if self.torch.type != "cuda":
            return most
        free, _ = torch.cuda.mem_get_info()
        return max(1, min(most, free // _SHARE // max(1, row_bytes)))

    def load_pixels(
        self, rows: Sequence[np.ndarray], processor: ImageProcessor, group: int = 1
    ) -> Tensor:
        """Normalised (B, 3, H, W) float32 on the device, of images of pixel_rows.

        The first fills up a `group`, for the caller to leave out again. To a GPU by way of pinned
        memory, kept by torch until the copy is over.
        """
        rows = [*rows, *[rows[0]] * (group - len(rows))]
        pinned = self.torch.type == "cuda"
        pixels = torch.empty((len(rows), *rows[0].shape), dtype=torch.uint8, pin_memory=pinned)
        np.stack(rows, out=pixels.numpy())
        return processor.normalize(pixels.to(self.torch, non_blocking=pinned))


def _convert(part: nn.Module, dtype: torch.dtype) -> None:
    """Convert attention and MLPs of images: 99 % of the products.

    Patch embedding, sums, norms, FiLM, projections and logits stay in float32, as do the few texts.
    """
    for name, child in part.named_children():
        if isinstance(child, Attention | MLP):
            child.to(dtype)
        elif name != "text_model":
            _convert(child, dtype)


def pixel_rows(column: pa.ChunkedArray, processor: ImageProcessor) -> list[np.ndarray]:
    """The `pixels` of N records: (H, W, 3) uint8 each, without a copy."""
    shape = (*processor.image_size, 3)
    return [np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape) for pixels in column]


def has_pixels(batch: pa.Table) -> np.ndarray:
    """Whether each record of schema.PIXELS holds an image: bool (N,)."""
    return np.array([len(pixels.as_buffer()) > 0 for pixels in batch["pixels"]], dtype=bool)


def scale_to_unit(vectors: Tensor) -> Tensor:
    """Rows (N, E) at length 1, float32: zeros stay, what is not finite becomes NaN.

    In float64: there the length of a finite float32 vector is finite too.
    """
    return torch.nn.functional.normalize(vectors.double(), dim=-1).float()


def fail_images(records: pa.Table, masked: np.ndarray, embedded: np.ndarray) -> pa.Table:
    """Fail records not `masked` (finite logits) or not `embedded` (finite embedding): bool (N,)."""
    failed = fail_rows(records, ~embedded, "embed", "the embedding is not finite")
    return fail_rows(failed, ~masked, "segment", "the model's logits are not finite")


def fail_rows(records: pa.Table, failed: np.ndarray, stage: str, detail: str) -> pa.Table:
    """Fail the records marked in `failed` (N,): at `stage`, by the model."""
    for name, value in (("stage", stage), ("reason", "model_failed"), ("detail", detail)):
        column = pc.if_else(pa.array(failed), value, records[name])
        records = records.set_column(records.schema.get_field_index(name), name, column)
    return records
