"""The metrics of CLIPSeg's own evaluation (its metrics.py), from histograms of probabilities.

A pixel of probability p falls into the bin of the number of THRESHOLDS below p: counts at all
thresholds come from one pass and need no image twice. Letters: K classes, B bins, T thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.integrate import simpson

THRESHOLDS = np.linspace(0, 1, 51)[1:-1].round(2)
"""(T,) float64: 0.02 to 0.98; a pixel is of the class where its probability is above."""
BINS = len(THRESHOLDS) + 1
BOUNDARY = 0.02
"""Width of a boundary, as a share of the image's diagonal."""

_LEVELS = np.array([-1, *THRESHOLDS, 1], np.float32)


class Counts(NamedTuple):
    """Pixels (..., T) int64 at each threshold."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


def find_bins(probabilities: np.ndarray) -> np.ndarray:
    """The bin, 0 to B - 1, of each float32 probability, 0..1; uint8 of the same shape."""
    # By multiplication at most one too many, and never one too few, whatever is rounded.
    bins = (probabilities * np.float32(BINS)).astype(np.uint8)
    bins -= _LEVELS[bins] >= probabilities
    return bins


def count_bins(bins: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(2, B) int64: pixels in each bin, outside the class and of it (truth: bool)."""
    return np.bincount(bins + BINS * truth, minlength=2 * BINS).reshape(2, BINS)


def count_at_thresholds(off: np.ndarray, on: np.ndarray) -> Counts:
    """Histograms (..., B) of pixels outside the class and of it -> counts (..., T)."""
    fn, tn = on.cumsum(-1)[..., :-1], off.cumsum(-1)[..., :-1]
    return Counts(on.sum(-1)[..., None] - fn, off.sum(-1)[..., None] - tn, fn, tn)


def foreground_iou(counts: Counts) -> np.ndarray:
    """TP / (1 + TP + FP + FN)."""
    return counts.tp / (1 + counts.tp + counts.fp + counts.fn)


def binary_iou(counts: Counts) -> np.ndarray:
    """Half of the IoU of the foreground and half of the background's."""
    background = counts.tn / (1 + counts.tn + counts.fn + counts.fp)
    return 0.5 * foreground_iou(counts) + 0.5 * background


def precision_recall(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision, distinct pairs sorted, at thresholds (T,) passed by any pixel."""
    passed = counts.tp + counts.fp
    recall = counts.tp / (1 + counts.tp + counts.fn)
    precision = counts.tp / (1 + passed)
    pairs = np.unique(np.stack([recall, precision], 1)[passed > 0], axis=0)
    return pairs[:, 0], pairs[:, 1]


def average_precision(counts: Counts) -> float:
    """Simpson's integral of the precision over the recall; NaN if no pixel passes."""
    recall, precision = precision_recall(counts)
    return float(simpson(precision, x=recall)) if len(recall) else float("nan")


def find_boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask (n, m) bool within the boundary's width of its edge.

    Outside the image is no mask, as in the boundary IoU of Cheng et al. 2021.
    """
    width = max(1, round(BOUNDARY * float(np.hypot(*mask.shape))))
    edge = mask.copy()
    if mask.any():
        box = tuple(_extent(np.asarray(mask.any(axis))) for axis in (1, 0))
        edge[box] &= ~_erode(_erode(mask[box], width, 0), width, 1)
    return edge


def _extent(filled: np.ndarray) -> slice:
    places = np.flatnonzero(filled)
    return slice(places[0], places[-1] + 1)


def _erode(mask: np.ndarray, width: int, axis: int) -> np.ndarray:
    """Places of an array (n, m) set from `width` before to `width` behind; outside is nothing."""
    margins = [(0, 0), (0, 0)]
    margins[axis] = (width, width)
    run, length, wanted = np.pad(mask, margins), 1, 2 * width + 1
    while length < wanted:  # set for so long from here on: doubled, and the rest
        step = min(length, wanted - length)
        ahead, behind = [slice(None)] * 2, [slice(None)] * 2
        ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
        run = run[tuple(behind)] & run[tuple(ahead)]
        length += step
    return run


def calibration_error(off: np.ndarray, on: np.ndarray, sums: np.ndarray) -> float:
    """Expected calibration error: |share of the class - mean probability|, over pixels.

    off, on: (B,) pixels; sums: (B,) of their probabilities. NaN without pixels.
    """
    total = (off + on).sum()
    return float(np.abs(on - sums).sum() / total) if total else float("nan")
