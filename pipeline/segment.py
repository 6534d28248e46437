"""Pixels x prompts -> mask logits, on the actors that hold the model.

Prompts are encoded once per job, by the driver; an actor gets their embeddings and runs only what
masks need: the vision blocks up to the last extract layer, once per image, and the decoder, once
per image and prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import schema
from pipeline.errors import CheckpointError, JobError, UsageError
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.fetch import fetch
from pipeline.model.preprocess import ImageProcessor
from pipeline.model.tokenizer import Tokenizer

# Logits handed on at once: a block of Ray Data's, which lies in the object store as one piece.
BLOCK_BYTES = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class PromptedModel:
    """A checkpoint and what to ask it, as the driver hands it to the actors: no weights inside."""

    name: str
    """What the user called it: a folder, a hub id, an s3:// URI."""
    config: dict[str, Any]
    weights_hash: str
    processor: ImageProcessor
    prompts: list[str]
    conditional: np.ndarray
    """(P, projection_dim) float32."""

    def fingerprint(self) -> dict[str, Any]:
        """What of the model decides the results of a run."""
        return {
            "weights_hash": self.weights_hash,
            "model_config": self.config,
            "preprocessing": asdict(self.processor),
            "dtype": "float32",
        }


@torch.inference_mode()
def encode_prompts(name: str, prompts: list[str]) -> PromptedModel:
    """Load a checkpoint, encode the text prompts with it, and let its weights go again.

    Raises CheckpointError naming the file, field or tensor that is wrong.
    """
    folder = fetch(name)
    tokenizer, processor = Tokenizer.from_folder(folder), ImageProcessor.from_folder(folder)
    model, weights_hash = CLIPSeg.from_folder(folder)
    text = model.config.text_config
    if tokenizer.vocab_size > text.vocab_size:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {text.vocab_size}"
        )
    batches = [
        model.encode_text(*tokenizer(prompts[i : i + 256], max_length=text.max_position_embeddings))
        for i in range(0, len(prompts), 256)
    ]
    return PromptedModel(
        name=name,
        config=model.config.to_dict(),
        weights_hash=weights_hash,
        processor=processor,
        prompts=prompts,
        conditional=torch.cat(batches).numpy(),
    )


class SegmentImages:
    """An actor of the segment stage: schema.PIXELS -> schema.LOGITS.

    An actor that finds other weights under the model's name than the driver did refuses to start.
    `device` is "cpu" or "cuda"; asking for "cuda" where there is none is an error, never a slow
    run. `threads` bounds the CPU threads of the model.
    """

    def __init__(self, prompted: PromptedModel, device: str, threads: int | None = None):
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("a GPU was asked for, and torch sees none on this worker")
        if threads:
            torch.set_num_threads(threads)
        model, weights_hash = CLIPSeg.from_folder(fetch(prompted.name))
        if weights_hash != prompted.weights_hash:
            raise JobError(f"{prompted.name}: this worker finds other weights than the driver did")
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.processor = prompted.processor
        self.conditional = torch.from_numpy(prompted.conditional.copy()).to(self.device)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Records that failed pass first, then images in their order, prompts in runs."""
        sizes = batch["pixels"].combine_chunks()
        good = np.array([len(p.as_buffer()) > 0 for p in sizes], dtype=bool)
        if not good.all():
            yield _with_logits(batch.filter(pa.array(~good)), None, 0)
        images = batch.filter(pa.array(good))
        if len(images):
            yield from self._segment(images)

    @torch.inference_mode()
    def _segment(self, images: pa.Table) -> Iterator[pa.Table]:
        """Logits of images that decoded, in blocks of about BLOCK_BYTES."""
        pixels = self.processor.normalize(self._to_device(images["pixels"]))
        activations, grid = self.model.activations(pixels), self.model.grid(pixels)
        patch = self.model.config.vision_config.patch_size
        pairs = max(1, BLOCK_BYTES // (4 * grid[0] * grid[1] * patch**2))
        prompts = min(len(self.conditional), pairs)
        step = max(1, pairs // prompts)
        for i in range(0, len(images), step):
            rows, some = images.slice(i, step), [a[i : i + step] for a in activations]
            for first in range(0, len(self.conditional), prompts):
                conditional = self.conditional[first : first + prompts]
                logits = self.model.decode(some, conditional, grid).float().cpu()
                if first == 0:
                    # An image that overflows does so with every prompt: it fails here, as a whole.
                    good = torch.isfinite(logits).flatten(1).all(1)
                    yield _failed(rows.filter(pa.array(~good.numpy())))
                    rows = rows.filter(pa.array(good.numpy()))
                    some, logits = [a[good.to(a.device)] for a in some], logits[good]
                yield _with_logits(rows, logits, first)

    def _to_device(self, pixels: pa.ChunkedArray) -> Tensor:
        """uint8 (B, H, W, 3) on the model's device."""
        shape = (*self.processor.image_size, 3)
        rows = [np.frombuffer(p.as_buffer(), np.uint8).reshape(shape) for p in pixels]
        return torch.from_numpy(np.stack(rows)).to(self.device)


def _failed(rows: pa.Table) -> pa.Table:
    """The same records, failed at this stage."""
    for name, value in (
        ("stage", "segment"),
        ("reason", "model_failed"),
        ("detail", "the model's logits are not finite"),
    ):
        column = pa.repeat(pa.scalar(value), len(rows))
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return _with_logits(rows, None, 0)


def _with_logits(records: pa.Table, logits: Tensor | None, first_prompt: int) -> pa.Table:
    """Records with their pixels exchanged for logits (B, P, h, w), or for nothing."""
    count = len(records)
    height, width = logits.shape[2:] if logits is not None else (0, 0)
    data = pa.py_buffer(logits.contiguous().numpy() if logits is not None else b"")
    offsets = np.arange(count + 1, dtype=np.int64) * (data.size // max(count, 1))
    column = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), count, [None, pa.py_buffer(offsets), data]
    )
    sizes = [pa.array(np.full(count, v, np.int32)) for v in (first_prompt, height, width)]
    table = records.drop_columns(["pixels"])
    return pa.table([*table.columns, *sizes, column], schema=schema.LOGITS)
