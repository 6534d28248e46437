"""Looks at an image -> logits on one finer grid.

Every look runs through the model as an image of its own, in the same batches. Windows are blended
with weights falling smoothly to 0 at their borders and summing to 1 in every pixel. The plain look
sees things larger than a window. A pixel has the logarithm of the mean exponential of window and
plain look: the larger of the two but for log 2, and their value if they agree.

Shapes: N looks, P prompts, K pairs, L tokens, R reduce_dim, E projection, (s, t) logits of a look,
(h, w) the finer grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.fine import FineOptions
from pipeline.infer.bilinear import Axis
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.device import Device
from pipeline.infer.refine import refine
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.windows import OVERLAP, PX_AT_ONCE, Looks

PAIR_PX_AT_ONCE = 16 * 352**2  # of looks and prompts, on a GPU
_SLICES_KEPT = 64  # whose logits wait for being added

Encoded = tuple[list[Tensor], Tensor]
Encode = Callable[[Tensor], Encoded]


def open_looks(opened: OpenModel[CLIPSeg], fine: FineOptions, *, embed: bool) -> Looks:
    """The looks of a model at images. Raises UsageError for an unsupported size."""
    patch = opened.model.config.vision_config.patch_size
    return Looks(processor=opened.processor, patch=patch, options=fine, embed=embed)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Looks of one size, after the vision tower."""

    steps: list[Tensor]
    """(N, L, R) each."""
    side: tuple[int, int]
    """(s, t)."""
    guide: Tensor | None
    """(N, s, t, 3) uint8, where edges are refined."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """An image after the vision tower."""

    size: tuple[int, int]
    """(h, w)."""
    plain: _Part | None
    """None where it gives no logits."""
    fine: _Part | None
    """Windows, row by row, or one finer look; None without."""
    rows: np.ndarray
    """First row of each row of windows."""
    columns: np.ndarray
    vector: np.ndarray
    """The embedding, (E,), or (0,)."""


class BlendLooks:
    """The model over looks: `look` at images, then their `logits`, image by image.

    `encode`, if images are embedded: normalised pixels (B, 3, H, W) of plain looks -> steps of the
    decoder, embeddings.
    """

    def __init__(self, looks: Looks, model: CLIPSeg, device: Device, encode: Encode | None = None):
        self.looks, self.model, self.device = looks, model, device
        self.encode = encode or self._steps

    def look(self, images: Sequence[tuple[np.ndarray, int, int]]) -> list[Looked]:
        """Encode every look at images: what Looks.fit gave of each, its height and width."""
        opened = [self.looks.open(*image) for image in images]
        pictures = [picture for plain, fine in opened for picture in self._cut(plain, fine)]
        found = iter(self._encode(pictures))
        return [self._looked(plain, fine, found) for plain, fine in opened]

    def logits(self, looked: Looked, conditional: Tensor) -> Tensor:
        """(P, h, w) float32 on the CPU of one image with prompts (P, E)."""
        if looked.plain is None or looked.fine is None:
            part = looked.plain or looked.fine
            assert part is not None
            return self._whole(part, conditional).cpu()
        fine, plain = looked.fine, self._whole(looked.plain, conditional)
        grid = Grid(looked.size, looked.plain.side, (looked.rows, looked.columns), fine.side)
        grid.to(self.device.torch)
        out = torch.zeros(len(conditional), *looked.size, device=self.device.torch)
        counts = (len(conditional), len(fine.steps[0]))
        prompt, look = torch.cartesian_prod(*(torch.arange(n) for n in counts)).T

        def blend(some: slice) -> Tensor:
            x = self._decode(fine, look[some], conditional[prompt[some]])
            return grid.weigh(x, plain[prompt[some]], look[some])

        slices = self._pairs(len(prompt), fine)
        for first in range(0, len(slices), _SLICES_KEPT):
            some = slices[first : first + _SLICES_KEPT]
            for pairs, tiles in zip(some, self.device.run(blend, some), strict=True):
                for p, i, tile in zip(prompt[pairs], look[pairs], tiles, strict=True):
                    grid.window(out[int(p)], int(i)).add_(tile)
        return out.cpu()

    def _cut(
        self, plain: np.ndarray | None, fine: np.ndarray | None
    ) -> list[tuple[np.ndarray, bool]]:
        """The looks at an image, and whether each is the plain one."""
        found = [] if plain is None else [(plain, True)]
        if fine is None:
            return found
        (h, w), corners = self._side(fine), itertools.product(*self.looks.windows(fine.shape[:2]))
        return [*found, *((fine[y : y + h, x : x + w], False) for y, x in corners)]

    def _side(self, fine: np.ndarray) -> tuple[int, int]:
        """Size of the windows over a finer look; without tiles, of the whole look."""
        return self.looks.window if self.looks.options.tile else (fine.shape[0], fine.shape[1])

    def _encode(self, pictures: list[tuple[np.ndarray, bool]]) -> list[Encoded]:
        """Steps (1, L, R) and the embedding of each look, those of one size at once."""
        # Only the plain look runs through the blocks that embeddings alone need.
        kinds = [(picture.shape, plain and self.looks.embed) for picture, plain in pictures]
        found: dict[int, Encoded] = {}
        order = sorted(range(len(pictures)), key=lambda i: kinds[i])
        for ((height, width, _), embed), of_kind in itertools.groupby(order, lambda i: kinds[i]):
            same = list(of_kind)
            group = self.device.group(self.model.vision_model, (height, width))
            at_once = group if self.device.alone else max(1, PX_AT_ONCE // (height * width))
            slices = [slice(i, i + at_once) for i in range(0, len(same), at_once)]
            ways = self.encode if embed else self._steps

            def encode(
                some: slice, same: list[int] = same, group: int = group, ways: Encode = ways
            ) -> Encoded:
                rows = [pictures[i][0] for i in same[some]]
                return ways(self.device.load_pixels(rows, self.looks.processor, group))

            for some, (steps, vectors) in zip(slices, self.device.run(encode, slices), strict=True):
                for k, i in enumerate(same[some]):
                    found[i] = ([step[k : k + 1] for step in steps], vectors[k])
        return [found[i] for i in range(len(pictures))]

    def _steps(self, pixels: Tensor) -> Encoded:
        steps = self.model.decoder.reduce(self.model.activations(pixels))
        return steps, torch.zeros(len(pixels), 0)

    def _looked(
        self, plain: np.ndarray | None, fine: np.ndarray | None, found: Iterator[Encoded]
    ) -> Looked:
        """An image, its looks taken from the next of `found`."""
        vector, window, parts = torch.zeros(0), self.looks.window, []
        if plain is not None:
            steps, vector = next(found)
            if fine is None or self.looks.options.tile:
                parts.append(_Part(steps=steps, side=window, guide=self._guide([plain], window)))
        if fine is None:
            nothing = np.zeros(0, np.int64)
            return Looked(
                size=window,
                plain=parts[0],
                fine=None,
                rows=nothing,
                columns=nothing,
                vector=vector.numpy(),
            )
        size, side = (fine.shape[0], fine.shape[1]), self._side(fine)
        rows, columns = self.looks.windows(size)
        cut = [picture for picture, is_plain in self._cut(None, fine)]
        encoded = [next(found)[0] for _ in cut]
        steps = [torch.cat(step) for step in zip(*encoded, strict=True)]
        return Looked(
            size=size,
            plain=parts[0] if parts else None,
            fine=_Part(steps=steps, side=side, guide=self._guide(cut, side)),
            rows=rows,
            columns=columns,
            vector=vector.numpy(),
        )

    def _guide(self, looks: list[np.ndarray], side: tuple[int, int]) -> Tensor | None:
        if not self.looks.options.refine:
            return None
        return torch.from_numpy(np.stack([look[: side[0], : side[1]] for look in looks]))

    def _whole(self, part: _Part, conditional: Tensor) -> Tensor:
        """(P, s, t) on the device of the first look of a part."""
        look = torch.zeros(len(conditional), dtype=torch.int64)

        def decode(some: slice) -> Tensor:
            return self._decode(part, look[some], conditional[some].clone())

        found = self.device.run(decode, self._pairs(len(conditional), part))
        return torch.cat([torch.zeros(0, *part.side, device=self.device.torch), *found])

    def _pairs(self, count: int, part: _Part) -> list[slice]:
        return self.device.split(count, max(1, PAIR_PX_AT_ONCE // math.prod(part.side)))

    def _decode(self, part: _Part, look: Tensor, conditional: Tensor) -> Tensor:
        """(K, s, t) float32 of looks with these indices (K,), and prompts (K, E)."""
        patch = self.looks.patch
        states = [step[look] for step in part.steps]  # indexing copies
        grid = (part.side[0] // patch, part.side[1] // patch)
        logits = self.model.decoder(states, conditional, grid).float()
        if part.guide is None:
            return logits
        return refine(logits, part.guide[look].to(self.device.torch), patch // 2)


class Grid:
    """Windows over a finer grid, and the plain look under it.

    size: (h, w); plain: size of the plain look's logits; starts: first rows and first columns of
    the windows, in all combinations; side: (s, t) of each.
    """

    def __init__(
        self,
        size: tuple[int, int],
        plain: tuple[int, int],
        starts: tuple[np.ndarray, np.ndarray],
        side: tuple[int, int],
    ):
        self.starts, self.side = starts, side
        self.axes = [_axis(*each) for each in zip(plain, size, starts, side, strict=True)]

    def to(self, device: torch.device) -> None:
        """Move what is computed with to a device."""
        self.axes = [tuple(each.to(device) for each in axis) for axis in self.axes]

    def window(self, grid: Tensor, look: int) -> Tensor:
        """The part (s, t) of a grid (h, w) under a window."""
        i, j = divmod(look, len(self.starts[1]))
        y, x = int(self.starts[0][i]), int(self.starts[1][j])
        return grid[y : y + self.side[0], x : x + self.side[1]]

    def weigh(self, x: Tensor, plain: Tensor, look: Tensor) -> Tensor:
        """The shares (K, s, t) in the finer grid of windows with logits x (K, s, t).

        plain: (K, ...) logits of the plain look with the same prompts; look: (K,) indices.
        """
        at = (look // len(self.starts[1]), look % len(self.starts[1]))
        for dim, (index, axis) in enumerate(zip(at, self.axes, strict=True), start=1):
            low, high, weight, _ = (each[index.to(each.device)] for each in axis)
            plain = _lerp(plain, low, high, weight, dim)
        mean = torch.logaddexp(x, plain) - math.log(2)
        # The larger of the two hides what is not finite.
        mean = torch.where(x.isfinite() & plain.isfinite(), mean, torch.nan)
        (rows, columns) = (
            axis[3][i.to(axis[3].device)] for i, axis in zip(at, self.axes, strict=True)
        )
        return mean * rows[:, :, None] * columns[:, None, :]


def _axis(cells: int, length: int, starts: np.ndarray, side: int) -> tuple[Tensor, ...]:
    """Of each window, (n, side) each: the two cells of the plain look around an output, its way
    from one to the other, and the window's share in it."""
    axis = Axis.between(cells, length)
    outputs = starts[:, None] + np.arange(side)
    known = [part[outputs] for part in (axis.low, axis.high, axis.weight)]
    return tuple(map(torch.from_numpy, [*known, shares(length, starts, side)]))


def shares(length: int, starts: np.ndarray, side: int) -> np.ndarray:
    """The share (n, side) float32 of each window in each output under it; they sum to 1.

    A window's weight rises from its border as sin^2 over the OVERLAP of neighbours.
    """
    inside = np.minimum(np.arange(side) + 0.5, side - np.arange(side) - 0.5)
    weight = np.sin(np.pi / 2 * np.minimum(inside / (side * OVERLAP), 1)) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + side] += weight
    outputs = starts[:, None] + np.arange(side)
    return (weight / total[outputs]).astype(np.float32)


def _lerp(grid: Tensor, low: Tensor, high: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Between the cells low and high (K, n) of (K, ...) along a dimension, `weight` of the way."""
    shape = [len(grid), 1, 1]
    shape[dim] = low.shape[1]
    whole = [len(grid), *grid.shape[1:]]
    whole[dim] = low.shape[1]
    first, last = (grid.gather(dim, at.view(shape).expand(whole)) for at in (low, high))
    return first + (last - first) * weight.view(shape)
