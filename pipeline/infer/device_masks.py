"""Logits on a device -> masks as run lengths, without a copy of anything as large as the logits.

Runs on any device of torch. The same masks as masks.masks_of_image, but for pixels at a float tie
with the threshold: there the last bit of an interpolated logit decides, and kernels differ in it.

Shapes: N pairs of image and prompt, (h, w) the model's grid, (H, W) the size of a mask. Grids and
masks are transposed on the device: run lengths go down the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.segment import MaskRule
from pipeline.infer.masks import logit, shrink_maps

PIXEL_BYTES = 24  # of a mask in the making


class Pair(NamedTuple):
    """The mask of a pair: see masks.Found."""

    finite: bool
    """Whether its logits are: if not, there is no mask."""
    counts: np.ndarray
    score_max: float
    score_mean: float | None


def masks_on_device(
    logits: Tensor, sizes: np.ndarray, rule: MaskRule, pixels_at_once: int
) -> list[Pair]:
    """The masks of logits (N, h, w) float32, each of the size in `sizes` (N, 2): height, width.

    Pairs without a cell above the threshold cost a look at their grid. Memory grows with
    `pixels_at_once`, of masks, by PIXEL_BYTES each.
    """
    level = logit(rule.threshold)
    ends = torch.stack(logits.flatten(1).aminmax(dim=1)).cpu()
    finite = ends.isfinite().all(0).numpy()
    best = ends[1].sigmoid().tolist()
    empty = [np.array([height * width]) for height, width in sizes.tolist()]
    found = [Pair(ok, e, b, None) for ok, e, b in zip(finite.tolist(), empty, best, strict=True)]
    above = np.flatnonzero(finite & (ends[1] > level).numpy())
    for size in np.unique(sizes[above], axis=0):
        same = above[(sizes[above] == size).all(1)]
        step = max(1, pixels_at_once // int(size.prod()))
        for i in range(0, len(same), step):
            some = same[i : i + step]
            grids = logits[torch.from_numpy(some).to(logits.device)]
            masks = _masks_of_a_size(grids, tuple(size.tolist()), level)
            for place, (counts, mean) in zip(some, masks, strict=True):
                found[place] = found[place]._replace(counts=counts, score_mean=mean)
    return found


def _masks_of_a_size(
    grids: Tensor, size: tuple[int, int], level: float
) -> Iterator[tuple[np.ndarray, float | None]]:
    """Run lengths, and mean probability inside or None, of masks of one size (H, W)."""
    turned = grids.transpose(1, 2)[None]
    wide = F.interpolate(turned, size=size[::-1], mode="bilinear")[0].flatten(1)  # (N, W H)
    inside = wide > level
    starts = inside.clone()  # of runs: a run of 0 comes first
    starts[:, 1:] ^= inside[:, :-1]
    sums = (wide.sigmoid_() * inside).sum(1, dtype=torch.float64)
    numbers = torch.stack([starts.sum(1).double(), inside.sum(1).double(), sums]).cpu().numpy()
    places = starts.flatten().nonzero()[:, 0].cpu().numpy()
    pixels, ends = size[0] * size[1], numbers[0].astype(np.int64).cumsum()
    begins = np.arange(len(grids) + 1) * pixels
    counts = np.diff(np.insert(places, [0, *ends], begins))
    each = np.split(counts, (ends + np.arange(1, len(ends) + 1))[:-1])
    for lengths, area, total in zip(each, *numbers[1:], strict=True):
        yield lengths, total / area if area else None


def maps_on_device(logits: Tensor, side: int) -> np.ndarray:
    """Maps (N, h', w') uint8 to keep, as masks.probability_map; (N, 0, 0) for side 0."""
    if not side:
        return np.zeros((len(logits), 0, 0), np.uint8)
    return shrink_maps(logits, side).cpu().numpy()
