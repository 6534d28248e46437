"""Looks at an image: the plain one of the checkpoint's own size, and a finer one as a whole or
through overlapping windows.

The decode stage hands on the pixels of the looks, the actor with the model cuts the windows: both
find the same from the size of the image alone. Blended again in infer/blend.py.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.config.fine import MAX_LOOK_PX, FineOptions
from pipeline.errors import CheckpointError, UsageError
from pipeline.prepare.images import PrepareImages
from pipeline.prepare.processor import ImageProcessor
from pipeline.prepare.resize import Box

PX_AT_ONCE = 64 * 352**2  # that a GPU looks at: of a batch, and through the vision tower
LEAST_IMAGES = 4  # in a batch: of the largest images 200 MB, and as much again of activations
OVERLAP = 0.25  # of neighbouring windows, at least: share of their side


class Pixels(NamedTuple):
    """Looks at one image, (h, w, 3) uint8 each."""

    plain: np.ndarray | None
    fine: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Looks:
    """The looks at an image in a run."""

    processor: ImageProcessor
    """Of the plain look."""
    patch: int
    """Side of the model's patches, in pixels."""
    options: FineOptions
    embed: bool = False
    """Whether the plain look is wanted for an embedding, too."""

    def __post_init__(self) -> None:
        if self.processor.do_center_crop and (self.options.size or self.options.tile):
            raise CheckpointError("--size, --tile: this checkpoint crops images to their centre")
        height, width = self.options.sides() if self.options.size else (0, 0)
        if self.options.size and not (self.options.tile or self.options.keeps_aspect):
            whole = self.whole_patches(height, width)
            if whole != (height, width):
                raise UsageError(
                    f"--size {self.options.size}: not whole patches of {self.patch} px; the "
                    f"nearest is {whole[0]}x{whole[1]}"
                )

    @property
    def window(self) -> tuple[int, int]:
        """Size of a window, and of the plain look's logits."""
        height, width = self.processor.image_size
        return height // self.patch * self.patch, width // self.patch * self.patch

    @property
    def images_at_once(self) -> int:
        """Images in a batch of the model, at most: fewer, the more there may be to see in each."""
        options, most_px = self.options, math.prod(self.window)
        if options.size or options.tile:
            most_px = math.prod(options.sides()) if options.size else MAX_LOOK_PX
        return max(LEAST_IMAGES, PX_AT_ONCE // most_px)

    def whole_patches(self, height: float, width: float) -> tuple[int, int]:
        """The nearest size of whole patches, at least one."""
        sides = (max(1, round(side / self.patch)) * self.patch for side in (height, width))
        return next(sides), next(sides)

    def fine_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Size of the finer look at an image; None if the plain one is all.

        Whole patches without windows. With windows at least one window, and at most MAX_LOOK_PX
        pixels: a larger image is made smaller, aspect kept.
        """
        options = self.options
        if not options.size and not options.tile:
            return None
        scale = 1.0
        if options.keeps_aspect:
            scale = options.sides()[0] / max(height, width)
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        elif options.size:
            height, width = options.sides()
        if not options.tile:
            size = self.whole_patches(height, width)
        else:
            size = self._with_windows(height, width)
        return None if size == self.processor.image_size else size

    def _with_windows(self, height: int, width: int) -> tuple[int, int]:
        least = self.window
        scale = min(1.0, math.sqrt(MAX_LOOK_PX / (height * width)))
        height, width = max(least[0], int(height * scale)), max(least[1], int(width * scale))
        # Where one side is a window's, the other may be too long now.
        if height * width > MAX_LOOK_PX:
            height = max(least[0], min(height, MAX_LOOK_PX // width))
            width = max(least[1], min(width, MAX_LOOK_PX // height))
        return height, width

    def has_plain(self, fine_size: tuple[int, int] | None) -> bool:
        """Whether the plain look is among the looks."""
        return fine_size is None or self.options.tile or self.embed

    @property
    def least_size(self) -> None:
        """No size: a look needs every pixel of the image."""

    def fit(
        self, image: Image.Image, whole: tuple[int, int] | None = None, box: Box | None = None
    ) -> np.ndarray:
        """The pixels of an RGB image's looks, one after the other: (n,) uint8."""
        fine = self.fine_size(image.height, image.width)
        looks = [self.processor.resize(image)] if self.has_plain(fine) else []
        if fine is not None:
            looks.append(replace(self.processor, do_resize=True, size=fine).resize(image))
        return np.concatenate([look.reshape(-1) for look in looks])

    def open(self, pixels: np.ndarray, height: int, width: int) -> Pixels:
        """The looks in what `fit` gave for an image of this size."""
        fine = self.fine_size(height, width)
        plain = self.processor.image_size if self.has_plain(fine) else (0, 0)
        end = 3 * plain[0] * plain[1]
        return Pixels(
            pixels[:end].reshape(*plain, 3) if end else None,
            pixels[end:].reshape(*fine, 3) if fine is not None else None,
        )

    def windows(self, fine_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """First rows, and first columns, of the windows over a finer look, increasing.

        Both of one window if it is seen as a whole.
        """
        if not self.options.tile:
            return np.zeros(1, np.int64), np.zeros(1, np.int64)
        rows, columns = (
            window_starts(n, side) for n, side in zip(fine_size, self.window, strict=True)
        )
        return rows, columns


def window_starts(length: int, side: int) -> np.ndarray:
    """Starts of the fewest windows of a side covering a length with an overlap of OVERLAP."""
    count = 1 + math.ceil(max(0, length - side) / (side * (1 - OVERLAP)))
    return np.round(np.linspace(0, length - side, count)).astype(np.int64)


class PrepareLooks:
    """The decode stage for a closer look at images: schema.RECORDS -> schema.PIXELS.

    Each record in a table of its own: its pixels may be nearly as large as a block.
    """

    def __init__(self, looks: Looks, max_pixels: int):
        self.prepare = PrepareImages(looks, max_pixels)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for i in range(len(batch)):
            yield self.prepare(batch.slice(i, 1))
