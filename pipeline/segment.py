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
from pipeline.errors import CheckpointError, JobError
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.fetch import fetch
from pipeline.model.preprocess import ImageProcessor
from pipeline.model.tokenizer import Tokenizer
from pipeline.pixels import has_pixels, open_device, stack_pixels

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
    embed: bool
    """Whether images are embedded, too."""

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.conditional.shape[1])

    def fingerprint(self) -> dict[str, Any]:
        """What of the model decides the results of a run."""
        return {
            "weights_hash": self.weights_hash,
            "model_config": self.config,
            "preprocessing": asdict(self.processor),
            "dtype": "float32",
        }


@torch.inference_mode()
def encode_prompts(name: str, prompts: list[str], *, embed: bool = False) -> PromptedModel:
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
        embed=embed,
    )


class SegmentImages:
    """An actor of the segment stage: schema.PIXELS -> schema.LOGITS.

    An actor that finds other weights under the model's name than the driver did refuses to start.
    `device` and `threads` as in pixels.open_device.
    """

    def __init__(self, prompted: PromptedModel, device: str, threads: int | None = None):
        self.device = open_device(device, threads)
        model, weights_hash = CLIPSeg.from_folder(fetch(prompted.name))
        if weights_hash != prompted.weights_hash:
            raise JobError(f"{prompted.name}: this worker finds other weights than the driver did")
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
        stacked = stack_pixels(images["pixels"], self.prompted.processor.image_size)
        pixels = self.prompted.processor.normalize(stacked.to(self.device))
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
                    good = torch.isfinite(logits).flatten(1).all(1)
                    if not bool(good.all()):
                        yield _failed(rows.filter(pa.array(~good.numpy())))
                    rows, logits = rows.filter(pa.array(good.numpy())), logits[good]
                    some, vector = [a[good.to(a.device)] for a in some], vector[good.numpy()]
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
        vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
        return states[: len(wanted)], vectors.cpu().numpy()


def _failed(rows: pa.Table) -> pa.Table:
    """The same records, failed at this stage."""
    for name, value in (
        ("stage", "segment"),
        ("reason", "model_failed"),
        ("detail", "the model's logits are not finite"),
    ):
        column = pa.repeat(pa.scalar(value), len(rows))
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return _with_logits(rows, None, 0, None)


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
