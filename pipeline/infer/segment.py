"""Pixels x prompts -> mask logits, on the actors that hold the model.

Prompts are encoded once per job, by the driver; an actor gets their embeddings and runs only what
masks need: the vision blocks up to the last extract layer, once per image, and the decoder, once
per image and prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import schema
from pipeline.infer.checkpoint import Checkpoint, open_processor, open_tokenizer
from pipeline.infer.device import fail_rows, has_pixels, open_device, scale_to_unit, stack_pixels
from pipeline.infer.fetch import fetch
from pipeline.infer.texts import (
    describe_cut,
    describe_vocabulary,
    encode_texts,
    find_cut,
    longest_text,
)
from pipeline.model.clipseg import CLIPSeg

# Logits handed on at once: a block of Ray Data's, which lies in the object store as one piece.
BLOCK_BYTES = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class PromptedModel:
    """A checkpoint and what to ask it."""

    checkpoint: Checkpoint
    prompts: list[str]
    conditional: np.ndarray
    """(P, projection_dim) float32."""
    embed: bool
    """Whether images are embedded, too."""
    notes: tuple[str, ...] = ()
    """What the user should be told of the prompts, a line each."""

    def only(self, prompts: list[str], *, embed: bool) -> PromptedModel:
        """The same with some of the prompts."""
        where = [self.prompts.index(prompt) for prompt in prompts]
        return replace(self, prompts=prompts, conditional=self.conditional[where], embed=embed)


def encode_prompts(name: str, prompts: list[str], *, embed: bool = False) -> PromptedModel:
    """Load a checkpoint, encode the text prompts with it, and let its weights go again.

    Raises CheckpointError naming the file, field or tensor that is wrong, and UsageError for
    prompts that are one to the model.
    """
    folder = fetch(name)
    model, weights_hash = CLIPSeg.from_folder(folder)
    processor = open_processor(folder, model.clip.vision_model)
    tokenizer = open_tokenizer(folder, model.clip.text_model)
    tower = model.clip.text_model
    notes = describe_vocabulary(tower, tokenizer)
    cut = find_cut(tower, tokenizer, prompts, "prompt")
    notes += describe_cut(cut, "prompt", longest_text(tower))
    conditional = encode_texts(model.encode_text, tower, tokenizer, prompts)
    checkpoint = Checkpoint(
        name=name,
        config=model.config.to_dict(),
        weights_hash=weights_hash,
        processor=processor,
        tokenizer_hash=tokenizer.content_hash,
    )
    return PromptedModel(
        checkpoint=checkpoint,
        prompts=prompts,
        conditional=conditional.numpy(),
        embed=embed,
        notes=tuple(notes),
    )


class SegmentImages:
    """An actor of the segment stage: schema.PIXELS -> schema.LOGITS.

    An actor that finds other weights under the model's name than the driver did refuses to start.
    `device` and `threads` as in pixels.open_device.
    """

    def __init__(self, prompted: PromptedModel, device: str, threads: int | None = None):
        self.device = open_device(device, threads)
        model, weights_hash = CLIPSeg.from_folder(fetch(prompted.checkpoint.name))
        prompted.checkpoint.check_worker(weights_hash)
        self.model, self.prompted = model.to(self.device), prompted
        self.conditional = torch.from_numpy(prompted.conditional.copy()).to(self.device)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Records that failed pass first, then images in their order, prompts in runs."""
        good = has_pixels(batch)
        if not good.all():
            yield _with_logits(batch.filter(pa.array(~good)), None, 0, None)
        images = batch.filter(pa.array(good))
        if len(images):
            yield from self._segment(images)

    @torch.inference_mode()
    def _segment(self, images: pa.Table) -> Iterator[pa.Table]:
        """Logits of images that decoded, in blocks of about BLOCK_BYTES."""
        processor = self.prompted.checkpoint.processor
        stacked = stack_pixels(images["pixels"], processor.image_size)
        pixels = processor.normalize(stacked.to(self.device))
        activations, vectors = self._encode(pixels)
        grid = self.model.grid(pixels)
        patch = self.model.config.vision_config.patch_size
        pairs = max(1, BLOCK_BYTES // (4 * grid[0] * grid[1] * patch**2))
        prompts = min(len(self.conditional), pairs)
        step = max(1, pairs // prompts)
        for i in range(0, len(images), step):
            rows, some = images.slice(i, step), [a[i : i + step] for a in activations]
            vector = vectors[i : i + step]
            for first in range(0, len(self.conditional), prompts):
                conditional = self.conditional[first : first + prompts]
                logits = self.model.decode(some, conditional, grid).float().cpu()
                if first == 0:
                    # An image that overflows does so with every prompt: it fails here, as a whole.
                    masked = torch.isfinite(logits).flatten(1).all(1).numpy()
                    good = masked & np.isfinite(vector).all(axis=1)
                    if not good.all():
                        failed = fail_rows(rows, ~good, "embed", "the embedding is not finite")
                        failed = fail_rows(
                            failed, ~masked, "segment", "the model's logits are not finite"
                        )
                        yield _with_logits(failed.filter(pa.array(~good)), None, 0, None)
                    rows, where = rows.filter(pa.array(good)), torch.from_numpy(good)
                    some = [a[where.to(a.device)] for a in some]
                    logits, vector = logits[where], vector[good]
                yield _with_logits(rows, logits, first, vector if first == 0 else None)

    def _encode(self, pixels: Tensor) -> tuple[list[Tensor], np.ndarray]:
        """The activations that masks need, and embeddings (B, E) of length 1, or (B, 0)."""
        if not self.prompted.embed:
            return self.model.activations(pixels), np.zeros((len(pixels), 0), np.float32)
        tower = self.model.clip.vision_model
        wanted = self.model.config.extract_layers
        deepest = len(tower.encoder.layers) - 1
        layers = wanted if wanted[-1] == deepest else (*wanted, deepest)
        states = tower.activations(pixels, layers)
        vectors = self.model.clip.visual_projection(tower.pool(states[-1]))
        return states[: len(wanted)], scale_to_unit(vectors).cpu().numpy()


def _with_logits(
    records: pa.Table, logits: Tensor | None, first_prompt: int, vectors: np.ndarray | None
) -> pa.Table:
    """Records with their pixels exchanged for logits (B, P, h, w), or for nothing."""
    count = len(records)
    height, width = logits.shape[2:] if logits is not None else (0, 0)
    sizes = [pa.array(np.full(count, v, np.int32)) for v in (first_prompt, height, width)]
    values = (None if logits is None else logits.contiguous().numpy(), vectors)
    columns = [*records.drop_columns(["pixels"]).columns, *sizes]
    columns += [_binary(array, count) for array in values]
    return pa.table(columns, schema=schema.LOGITS)


def _binary(array: np.ndarray | None, count: int) -> pa.Array:
    """Each of the `count` rows of an array as bytes, without a copy; None: nothing in each."""
    data = pa.py_buffer(b"" if array is None else np.ascontiguousarray(array))
    offsets = np.arange(count + 1, dtype=np.int64) * (data.size // max(count, 1))
    buffers = [None, pa.py_buffer(offsets), data]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), count, buffers)
