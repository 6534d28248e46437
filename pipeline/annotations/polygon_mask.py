"""Polygon -> the pixels with their centres inside it, edges included: as skimage.draw.polygon2mask.

Pixel centres are whole numbers here. pycocotools and Pillow have other conventions.
"""

from __future__ import annotations

import numpy as np


def polygon_mask(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, of the corners (N, 2) x, y of a polygon, even one crossing itself (even-odd)."""
    mask = np.zeros(size, np.bool_)
    if len(points) and np.isfinite(points).all():
        # A centre on an edge is inside of one of the four: edges hold either of their ends, and
        # either of their sides.
        for upper in (False, True):
            for right in (False, True):
                mask |= _inside(points, size, upper=upper, right=right)
        # Tips, which none of them holds.
        whole = points[(points == points.round()).all(1)].astype(np.int64)
        there = whole[((whole >= 0) & (whole < size[::-1])).all(1)]
        mask[there[:, 1], there[:, 0]] = True
    return mask


def _inside(points: np.ndarray, size: tuple[int, int], *, upper: bool, right: bool) -> np.ndarray:
    """The places in a row with an odd number of crossings to the left."""
    height, width = size
    flips = np.zeros((height, width + 1), np.bool_)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        low, high = min(y0, y1), max(y0, y1)
        if low == high:
            continue
        first, last = (
            (np.floor(low) + 1, np.floor(high)) if upper else (np.ceil(low), np.ceil(high) - 1)
        )
        rows = np.arange(max(int(first), 0), min(int(last), height - 1) + 1)
        at = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
        columns = np.floor(at) + 1 if right else np.ceil(at)
        flips[rows, columns.clip(0, width).astype(np.int64)] ^= True
    inside: np.ndarray = np.logical_xor.accumulate(flips[:, :-1], axis=1)
    return inside
