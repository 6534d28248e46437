"""Images x prompts -> finished masks on a GPU, many pairs at once: schema.PIXELS -> schema.RUNS.

Only run lengths, scores and kept maps leave the device. While one slice of images is copied, looked
at and made into columns, another one computes (see device.Device.over).

Shapes: B images of a slice, P prompts, N pairs, L tokens, R reduce_dim, E projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import schema
from pipeline.config.segment import MaskRule
from pipeline.infer.device import Device, fail_images, pixel_rows
from pipeline.infer.device_masks import PIXEL_BYTES, Pair, maps_on_device, masks_on_device
from pipeline.infer.masks import Found, with_runs
from pipeline.infer.phrases import PhraseVectors
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.processor import ImageProcessor
from pipeline.read.shard import parse_phrases

IMAGES_AT_ONCE = 64
PAIRS_OF_A_SLICE = 4096  # whose run lengths are held at once
PAIRS_AT_ONCE = 256  # in the decoder, at most
PIXELS_AT_ONCE = 2**25  # of masks, at most
_NOTHING = Found((0, 0), (), (), (), np.zeros((0, 0, 0), np.uint8))


class _Asked(NamedTuple):
    """The prompts of a batch: for all its images, or each image's own, one after the other."""

    conditional: Tensor
    """(P, E) on the device, or on the CPU of each image's own."""
    ends: np.ndarray | None
    """(B,) where each image's own end; None: every image has them all."""


@dataclass(frozen=True, kw_only=True)
class SegmentTogether:
    """The route of SegmentImages for rows computed together."""

    device: Device
    model: CLIPSeg
    encode: Callable[[Tensor], tuple[list[Tensor], Tensor]]
    """Normalised pixels (B, 3, H, W) -> steps of the decoder, embeddings (B, E) on the CPU."""
    processor: ImageProcessor
    rule: MaskRule
    conditional: Tensor
    """(P, E) on the device."""
    phrases: PhraseVectors | None
    """Where each image has phrases of its own, instead."""

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.processor.image_size
        patch = self.model.config.vision_config.patch_size
        return height // patch, width // patch

    @cached_property
    def pairs(self) -> int:
        """Pairs in one call of the decoder."""
        config, (rows, columns) = self.model.config, self.grid
        width = config.decoder_intermediate_size + 8 * config.reduce_dim
        # The hidden layer, before and after; logits, and a copy of those above the threshold.
        pair_bytes = 8 * (rows * columns + 1) * width
        pair_bytes += 12 * rows * columns * config.vision_config.patch_size**2
        return self.device.fit(pair_bytes, PAIRS_AT_ONCE)

    @cached_property
    def pixels(self) -> int:
        """Pixels of masks in the making at once."""
        return self.device.fit(PIXEL_BYTES, PIXELS_AT_ONCE)

    def __call__(self, batch: pa.Table, good: np.ndarray) -> Iterator[pa.Table]:
        """Failed records pass first, then images (bool `good`) in their order."""
        if not good.all():
            failed = batch.filter(pa.array(~good)).drop_columns(["pixels"])
            yield _table(failed, [_NOTHING] * len(failed), [b""] * len(failed))
        images = batch.filter(pa.array(good))
        if not len(images):
            return
        pixels = pixel_rows(images["pixels"], self.processor)
        asked, records = self._asked(images), images.drop_columns(["pixels"])

        @torch.inference_mode()
        def segment(some: slice) -> pa.Table:
            loaded = self.device.load_pixels(pixels[some], self.processor)
            steps, vectors = self.encode(loaded)
            rows = records.slice(some.start, some.stop - some.start)
            return self._finish(rows, *self._pairs(rows, steps, asked, some), vectors.numpy())

        most = len(asked.conditional)
        if asked.ends is not None:
            most = int(np.diff(asked.ends, prepend=0).max())
        at_once = max(1, min(IMAGES_AT_ONCE, PAIRS_OF_A_SLICE // max(1, most)))
        yield from self.device.over(len(images), at_once, segment)

    def _asked(self, images: pa.Table) -> _Asked:
        """The prompts of the images."""
        if self.phrases is None:
            return _Asked(self.conditional, None)
        own = [parse_phrases(text) for text in images["text"].to_pylist()]
        phrases = [phrase for some in own for phrase in some]
        conditional = self.phrases.encode(phrases) if phrases else self.conditional[:0]
        return _Asked(conditional, np.cumsum([len(some) for some in own]))

    def _pairs(
        self, rows: pa.Table, steps: list[Tensor], asked: _Asked, some: slice
    ) -> tuple[list[Pair], np.ndarray, np.ndarray]:
        """Every pair of the images `some`, its map to keep, and how many pairs an image has."""
        sizes = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], axis=1)
        found: list[Pair] = []
        maps: list[np.ndarray] = []
        if asked.ends is None:
            counts = np.full(len(rows), len(asked.conditional))
            logits = self._of_all(steps, asked.conditional)
        else:
            begins = np.concatenate([[0], asked.ends])
            counts = np.diff(begins)[some]
            own = asked.conditional[begins[some.start] : begins[some.stop]]
            logits = self._of_own(
                steps, own.to(self.device.torch), np.repeat(range(len(rows)), counts)
            )
        sizes = np.repeat(sizes, counts, axis=0)
        for part in logits:
            of_part = sizes[len(found) : len(found) + len(part)]
            if self.rule.mask_size == "model":
                of_part = np.tile(part.shape[1:], (len(part), 1))
            found += masks_on_device(part, of_part, self.rule, self.pixels)
            maps.append(maps_on_device(part, self.rule.kept_side))
        return found, np.concatenate(maps) if maps else _NOTHING.maps, counts

    def _of_all(self, steps: list[Tensor], conditional: Tensor) -> Iterator[Tensor]:
        """Logits (N, h, w) of all images with all prompts, slice after slice, image after image."""
        decoder, grid = self.model.decoder, self.grid
        images = max(1, self.pairs // max(1, len(conditional)))
        for i in range(0, len(steps[0]), images):
            some = [step[i : i + images, None] for step in steps]
            for prompts in conditional.split(self.pairs):
                yield decoder(some, prompts[None], grid).flatten(0, 1)

    def _of_own(self, steps: list[Tensor], conditional: Tensor, of: np.ndarray) -> Iterator[Tensor]:
        """Logits (N, h, w) of N pairs: prompts (N, E) and the images they are `of`."""
        image = torch.from_numpy(of).to(self.device.torch)
        for some in range(0, len(of), self.pairs):
            part = slice(some, some + self.pairs)
            states = [step[image[part]] for step in steps]
            yield self.model.decoder(states, conditional[part], self.grid)

    def _finish(
        self,
        records: pa.Table,
        pairs: list[Pair],
        maps: np.ndarray,
        counts: np.ndarray,
        vectors: np.ndarray,
    ) -> pa.Table:
        """schema.RUNS of images, of their pairs and vectors; a non-finite one fails whole."""
        ends = counts.cumsum()
        of_image = [pairs[end - n : end] for end, n in zip(ends, counts, strict=True)]
        masked = np.array([all(pair.finite for pair in some) for some in of_image], bool)
        embedded = np.isfinite(vectors).all(axis=1)
        good = masked & embedded
        patch = self.model.config.vision_config.patch_size
        grid = (self.grid[0] * patch, self.grid[1] * patch)
        sizes = zip(records["height"].to_pylist(), records["width"].to_pylist(), strict=True)
        found = [_NOTHING] * len(records)
        for i, (some, size) in enumerate(zip(of_image, sizes, strict=True)):
            if good[i]:
                _, lengths, best, means = zip(*some, strict=True) if some else ((),) * 4
                kept = maps[ends[i] - counts[i] : ends[i]]
                found[i] = Found(self.rule.target(size, grid), lengths, best, means, kept)
        kept_vectors = [v.tobytes() if ok else b"" for v, ok in zip(vectors, good, strict=True)]
        return _table(fail_images(records, masked, embedded), found, kept_vectors)


def _table(records: pa.Table, found: list[Found], vectors: list[bytes]) -> pa.Table:
    """schema.RUNS: all prompts of an image are one run, from the first on."""
    first = pa.array(np.zeros(len(records), np.int32))
    with_first = records.append_column(schema.RUNS.field("first_prompt"), first)
    return with_runs(with_first, found, pa.array(vectors, pa.large_binary()))
