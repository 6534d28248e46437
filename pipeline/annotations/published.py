"""Figures of CLIPSeg's paper, and the same measured here: score.py and metrics.py of its code.

Shapes: T thresholds (annotations.metrics), B bins.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pipeline.annotations import metrics
from pipeline.annotations.metrics import BINS, THRESHOLDS, Counts

_PAPER = "Lüddecke & Ecker, CVPR 2022"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of a table of the paper, in percent."""

    table: str
    model: str
    threshold: float
    second: str
    """Name of the second figure: IoU_FG or IoU_BIN."""
    figures: tuple[float, float, float]
    """mIoU and the second at the threshold, AP."""
    caution: str
    """Of the weights that it was measured with."""


_PASCAL = "the paper's weights never saw the classes of a fold; released weights have seen them all"
PUBLISHED = {
    ("phrasecut", "text"): Published(
        table=f"{_PAPER}, table 3",
        model="CLIPSeg (PC+)",
        threshold=0.3,
        second="IoU_FG",
        figures=(43.4, 54.7, 76.7),
        caution="its weights are CIDAS/clipseg-rd64; the refined ones are newer than the paper",
    ),
    ("pascal-5i", "image"): Published(
        table=f"{_PAPER}, table 5",
        model="CLIPSeg (PC+)",
        threshold=0.3,
        second="IoU_BIN",
        figures=(59.5, 75.0, 82.3),
        caution=_PASCAL,
    ),
    ("pascal-5i", "text"): Published(
        table=f"{_PAPER}, table 7",
        model="CLIPSeg (PC+)",
        threshold=0.3,
        second="IoU_BIN",
        figures=(72.4, 83.1, 93.5),
        caution=_PASCAL,
    ),
    ("coco-20i", "image"): Published(
        table=f"{_PAPER}, table 6",
        model="CLIPSeg (COCO+N)",
        threshold=0.1,
        second="IoU_BIN",
        figures=(33.3, 59.1, 41.7),
        caution="its weights are of COCO's other folds, and are not among the released ones",
    ),
}
"""By data set and kind of prompt."""


class Scores:
    """Counts of a fold. `apart`: each sample is a class of its own, as phrases are."""

    def __init__(self, *, apart: bool):
        self._apart = apart
        self.samples = 0
        self._ious = np.zeros(len(THRESHOLDS))
        self._of_class: dict[int, np.ndarray] = defaultdict(lambda: np.zeros((2, BINS), np.int64))

    def add(self, probability: np.ndarray, truth: np.ndarray, of_class: int) -> None:
        """Count a sample: float32 probabilities and bool truth of its pixels, void left out."""
        counts = metrics.count_bins(metrics.find_bins(probability), truth)
        self.samples += 1
        if self._apart:
            self._ious += metrics.foreground_iou(metrics.count_at_thresholds(*counts))
            of_class = 0
        self._of_class[of_class] += counts

    def value(self, threshold: float) -> dict[str, float]:
        """miou, fgiou and biniou at one of THRESHOLDS, and ap: 0..1."""
        at = int(np.abs(THRESHOLDS - threshold).argmin())
        all_ = _count(sum(self._of_class.values(), np.zeros((2, BINS), np.int64)))
        by_class = [metrics.foreground_iou(_count(each))[at] for each in self._of_class.values()]
        return {
            "miou": float(self._ious[at] / self.samples if self._apart else np.mean(by_class)),
            "fgiou": float(metrics.foreground_iou(all_)[at]),
            "biniou": float(metrics.binary_iou(all_)[at]),
            "ap": metrics.average_precision(all_),
        }


def _count(histograms: np.ndarray) -> Counts:
    return metrics.count_at_thresholds(*histograms)


def describe_figures(found: dict[str, float], published: Published | None) -> list[str]:
    """Lines of a table: what was found, in percent, beside what is published."""
    second = published.second if published else "IoU_BIN"
    key = "fgiou" if second == "IoU_FG" else "biniou"
    t = f"at {published.threshold if published else 0.5}"
    names = (f"mIoU {t}", f"{second} {t}", "AP")
    theirs = published.figures if published else (None,) * 3
    head = f"{published.model}, {published.table}" if published else "nothing published"
    lines = [f"  {'':16} {'here':>6}  published ({head})"]
    for name, ours, their in zip(
        names, (found["miou"], found[key], found["ap"]), theirs, strict=True
    ):
        lines.append(f"  {name:16} {100 * ours:6.1f}  {'-' if their is None else their}")
    return lines
