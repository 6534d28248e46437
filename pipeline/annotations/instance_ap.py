"""COCO's average precision of instances, image by image.

Each image is matched by pycocotools. Of a detection remain 12 bytes: memory does not grow with
images or masks. They are put together as COCOeval.accumulate does.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

MAX_DETECTIONS = 100  # of a class in an image: COCO's own limit
IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_ANY_AREA = [0, 1e10]


class InstanceAP:
    """Average precision of one class over all areas."""

    def __init__(self) -> None:
        self.truths = 0
        """Instances of the truth, without crowds."""
        self._scores = array("d")
        self._matched, self._ignored = array("H"), array("H")  # a bit for each of IOUS

    def add(self, found: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]]) -> None:
        """Match the instances of one image: dicts of rle, area and, found, score; truth, crowd."""
        evaluation = COCOeval(iouType="segm")
        evaluation._gts[0, 0] = [
            {
                "id": i,
                "segmentation": each["rle"],
                "area": each["area"],
                "iscrowd": int(each["crowd"]),
                "ignore": int(each["crowd"]),
            }
            for i, each in enumerate(truth, 1)
        ]
        evaluation._dts[0, 0] = [
            {"id": i, "segmentation": each["rle"], "area": each["area"], "score": each["score"]}
            for i, each in enumerate(found, 1)
        ]
        evaluation.ious = {(0, 0): evaluation.computeIoU(0, 0)}
        result = evaluation.evaluateImg(0, 0, _ANY_AREA, MAX_DETECTIONS)
        if result is None:
            return
        bits = 1 << np.arange(len(IOUS))
        self.truths += int(np.count_nonzero(np.asarray(result["gtIgnore"]) == 0))
        self._scores.extend(result["dtScores"])
        self._matched.extend(((result["dtMatches"] > 0).T @ bits).tolist())
        self._ignored.extend((np.asarray(result["dtIgnore"], bool).T @ bits).tolist())

    def value(self) -> np.ndarray:
        """(10,) at each of IOUS; NaN if the truth has no instance."""
        if not self.truths:
            return np.full(len(IOUS), np.nan)
        order = np.argsort(-np.asarray(self._scores), kind="mergesort")
        bits = np.arange(len(IOUS))[:, None]
        matched = np.asarray(self._matched, np.uint16)[order] >> bits & 1 > 0
        counted = np.asarray(self._ignored, np.uint16)[order] >> bits & 1 == 0
        tp = np.cumsum(matched & counted, axis=1)
        fp = np.cumsum(~matched & counted, axis=1)
        recall, precision = tp / self.truths, tp / (fp + tp + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        at_recalls = np.zeros((len(IOUS), len(_RECALLS)))
        for i, (r, p) in enumerate(zip(recall, precision, strict=True)):
            places = np.searchsorted(r, _RECALLS, side="left")
            there = places < len(p)
            at_recalls[i, there] = p[places[there]]
        return at_recalls.mean(1)
