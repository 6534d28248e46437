"""Bilinear interpolation of the wanted outputs alone, one axis at a time.

Needs no torch: labels are cut from kept maps in processes without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Output `start + i` lies between the cells low[i] and high[i] of the grid, weight[i] of the
    way (int64, int64, float32; all of one length)."""

    start: int
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @staticmethod
    @lru_cache(maxsize=256)
    def between(cells: int, outputs: int) -> Axis:
        """The whole axis, as in F.interpolate(mode="bilinear", align_corners=False) but for the
        last bits of the weights: those depend on how torch was compiled."""
        position = (np.arange(outputs) + 0.5) * (cells / outputs) - 0.5
        position = position.clip(0, cells - 1)
        low = np.floor(position).astype(np.int64)
        high = np.minimum(low + 1, cells - 1)
        return Axis(start=0, low=low, high=high, weight=(position - low).astype(np.float32))

    def __getitem__(self, part: slice) -> Axis:
        return Axis(
            start=self.start + (part.start or 0),
            low=self.low[part],
            high=self.high[part],
            weight=self.weight[part],
        )

    def __len__(self) -> int:
        return len(self.low)

    def touching(self, cells: np.ndarray) -> Axis:
        """The outputs depending on a cell between the first and the last of `cells` (sorted)."""
        outputs = np.flatnonzero((self.high >= cells[0]) & (self.low <= cells[-1]))
        return self[outputs[0] : outputs[-1] + 1] if len(outputs) else self[:0]

    def lerp(self, grid: np.ndarray) -> np.ndarray:
        """(cells, K) -> (outputs, K) float32."""
        low, between = grid[self.low], grid[self.high]
        between -= low
        between *= self.weight[:, None]
        between += low
        return between
