"""Predictions and ground truth -> figures, in one pass: histograms whatever the number of images.

Every image with ground truth counts with every class known to both, present or not. An image with
ground truth of another shape is left out and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco

from pipeline.annotations import metrics
from pipeline.annotations.instance_ap import InstanceAP
from pipeline.annotations.metrics import BINS
from pipeline.annotations.predicted import Found, Predicted, Predictions
from pipeline.annotations.truth import Matcher, Truth, TruthImage
from pipeline.errors import UsageError, one_line

_ASPECT = 0.03  # how much the aspect ratios of image and truth may differ
_SHOWN = 3


@dataclass(kw_only=True)
class ClassCounts:
    """Counts of all images for one class."""

    name: str
    threshold: float | None
    off: np.ndarray = field(default_factory=lambda: np.zeros((2, BINS), np.int64))
    """Pixels that are not of the class by bin: in images without it, and with it."""
    on: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """Pixels of the class by bin."""
    sums: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    """Of the probabilities in each bin."""
    tp: int = 0
    """Pixels at the class's own threshold, as fp, fp_absent (in images without it) and fn."""
    fp: int = 0
    fp_absent: int = 0
    fn: int = 0
    pixels_absent: int = 0
    boundary: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    """Pixels in both boundaries, and in either."""
    images: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    """By the truth and by what was found: absent, present."""
    instances: InstanceAP = field(default_factory=InstanceAP)

    def add(self, found: Found, truth: np.ndarray, void: np.ndarray | None) -> None:
        """Count one image; truth and void (W, H) bool."""
        inside = found.inside
        if void is not None:
            inside, truth = inside & ~void, truth & ~void
        there = bool(truth.any())
        self.images[int(there), int(inside.any())] += 1
        both, either = int((inside & truth).sum()), int((inside | truth).sum())
        extra = int(inside.sum()) - both
        self.tp += both
        self.fp += extra
        self.fn += either - both - extra
        if not there:
            self.fp_absent += extra
            self.pixels_absent += truth.size if void is None else int((~void).sum())
        edges = [metrics.find_boundary(mask) for mask in (inside, truth)]
        self.boundary += (int((edges[0] & edges[1]).sum()), int((edges[0] | edges[1]).sum()))
        if found.probability is not None:
            counted = slice(None) if void is None else ~void.ravel()
            p, of_truth = found.probability.ravel()[counted], truth.ravel()[counted]
            bins = metrics.find_bins(p)
            off, on = metrics.count_bins(bins, of_truth)
            self.off[int(there)] += off
            self.on += on
            self.sums += np.bincount(bins, p, minlength=BINS)


@dataclass(kw_only=True)
class Evaluation:
    """Counts of a pass."""

    classes: list[ClassCounts]
    maps: bool
    """Whether probabilities are known, and not masks alone."""
    apart: bool
    """Whether both sides tell instances apart."""
    images: int = 0
    lines: list[str] = field(default_factory=list)
    """On what was left out."""


def evaluate_run(
    predictions: Predictions, truth: Truth, on_image: Callable[[], None] = lambda: None
) -> Evaluation:
    """Count every image with ground truth. Raises UsageError if none has any, JobError."""
    class_ids = shared_classes(predictions, truth)
    result = Evaluation(
        classes=[
            ClassCounts(name=predictions.classes[i], threshold=predictions.thresholds[i])
            for i in class_ids
        ],
        maps=not predictions.masks_alone,
        apart=predictions.instances and truth.instances,
    )
    matched = Matched(predictions, truth)
    for image, of_truth, size in matched:
        for class_id, counts in zip(class_ids, result.classes, strict=True):
            mask = of_truth.mask_at(counts.name, size)
            counts.add(image.find(class_id, size), mask, of_truth.void)
            if result.apart:
                _add_instances(counts.instances, image, of_truth, class_id, counts.name)
        result.images += 1
        on_image()
    result.lines = [*predictions.notes, *truth.notes, *matched.lines()]
    result.lines += _unknown_classes(predictions, truth)
    if not result.images:
        raise UsageError(
            f"{truth.source}: no image of {predictions.source} has ground truth; "
            + "; ".join(result.lines)
        )
    return result


def _add_instances(
    to: InstanceAP, image: Predicted, truth: TruthImage, class_id: int, name: str
) -> None:
    found = [each for each in image.instances if each["class_id"] == class_id]
    wanted = [
        {"rle": each.rle, "area": float(coco.area(each.rle)), "crowd": each.crowd}
        for each in truth.instances
        if each.name == name
    ]
    to.add(found, wanted)


def shared_classes(predictions: Predictions, truth: Truth) -> list[int]:
    """The indices of the classes shared with the truth. Raises UsageError without any."""
    known = set(truth.classes)
    found = [i for i, name in enumerate(predictions.classes) if name in known]
    if not found:
        one, other = (_some(names) for names in (predictions.classes, truth.classes))
        raise UsageError(
            f"{truth.source}: has none of the classes {one}, but {other}; name them alike, or "
            "give --ontology"
        )
    return found


def _unknown_classes(predictions: Predictions, truth: Truth) -> list[str]:
    only = [n for n in predictions.classes if n not in truth.classes]
    lacking = [n for n in truth.classes if n not in predictions.classes]
    lines = [f"without ground truth, not evaluated: {_some(only)}"] if only else []
    return lines + ([f"in the ground truth alone: {_some(lacking)}"] if lacking else [])


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(one_line(name, 60)) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


class Matched:
    """Images of a run with their truth and its size, and the account of the others."""

    def __init__(self, predictions: Predictions, truth: Truth):
        self._predictions, self._truth = predictions, truth
        self._matcher = Matcher(truth)
        self._other: list[str] = []
        self._others = 0

    def __iter__(self) -> Iterator[tuple[Predicted, TruthImage, tuple[int, int]]]:
        for image in self._predictions.images():
            index = self._matcher.find(image.shard, image.row, image.names)
            if index is None:
                continue
            truth = self._truth.read(index)
            size = truth.size if all(truth.size) else image.size
            ratio = size[0] * image.size[1] / (size[1] * image.size[0])
            exact = self._predictions.masks_alone
            if size != image.size if exact else abs(np.log(ratio)) > _ASPECT:
                self._others += 1
                if len(self._other) < _SHOWN:
                    of = f"{image.size[0]} x {image.size[1]} and {size[0]} x {size[1]} px"
                    self._other.append(f"{one_line(image.names[0], 80)} ({of})")
                continue
            yield image, truth, size

    def lines(self) -> list[str]:
        """Files left out; complete once the iteration is."""
        lines = self._matcher.describe()
        if self._others:
            lines.append(
                f"{self._others:,} images have another size or shape than their ground truth "
                f"(turned by EXIF?) and are left out: {', '.join(self._other)}"
            )
        return lines


def summarize(result: Evaluation) -> list[dict[str, Any]]:
    """A row for each class, then one over all, with class None; NaN for an unknown figure."""
    rows = [_describe(counts, result) for counts in result.classes]
    total = ClassCounts(name="", threshold=None)
    for counts in result.classes:
        for name in ("off", "on", "sums", "boundary", "images"):
            getattr(total, name)[...] += getattr(counts, name)
        for name in ("tp", "fp", "fp_absent", "fn", "pixels_absent"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
    present = [i for i, counts in enumerate(result.classes) if counts.images[1].any()]
    overall = _describe(total, result) | {"class": None}
    for name in ("coco_ap", "coco_ap50", "coco_ap75"):
        overall[name] = _mean([row[name] for row in rows])
    overall["miou"] = _mean([rows[i]["iou"] for i in present])
    for name in ("iou_0.1", "iou_0.3", "iou_0.5"):
        overall[f"m{name}"] = _mean([rows[i][name] for i in present])
    curve = np.mean([rows[i]["iou_at"] for i in present], axis=0) if present else np.zeros(0)
    known = result.maps and len(curve) > 0
    overall["miou_best"] = float(curve.max()) if known else np.nan
    at = metrics.THRESHOLDS[int(curve.argmax())] if known else np.nan
    overall["miou_best_threshold"] = float(at)
    return [*rows, overall]


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _describe(of: ClassCounts, result: Evaluation) -> dict[str, Any]:
    images = of.images
    row: dict[str, Any] = {
        "class": of.name,
        "threshold": of.threshold,
        "images": int(images.sum()),
        "images_present": int(images[1].sum()),
        "iou": of.tp / (1 + of.tp + of.fp + of.fn),
        "iou_present": of.tp / (1 + of.tp + of.fp - of.fp_absent + of.fn),
        "boundary_iou": _ratio(*of.boundary),
        "presence_precision": _ratio(images[1, 1], images[:, 1].sum()),
        "presence_recall": _ratio(images[1, 1], images[1].sum()),
        "absent_found": int(images[0, 1]),
        "absent_found_share": _ratio(images[0, 1], images[0].sum()),
        "absent_pixel_share": _ratio(of.fp_absent, of.pixels_absent),
    }
    return row | _describe_maps(of, result.maps) | _describe_instances(of, result.apart)


def _describe_maps(of: ClassCounts, known: bool) -> dict[str, Any]:
    counts = metrics.count_at_thresholds(of.off.sum(0), of.on)
    iou, both = metrics.foreground_iou(counts), metrics.binary_iou(counts)
    nothing = float("nan")

    def at(values: np.ndarray, threshold: float) -> float:
        return float(values[round(threshold * BINS) - 1]) if known else nothing

    recall, precision = metrics.precision_recall(counts)
    return {
        "ap": metrics.average_precision(counts) if known else nothing,
        **{f"iou_{t}": at(iou, t) for t in (0.1, 0.3, 0.5)},
        "iou_best": float(iou.max()) if known else nothing,
        "iou_best_threshold": float(metrics.THRESHOLDS[int(iou.argmax())]) if known else nothing,
        "biniou_0.5": at(both, 0.5),
        "biniou_best": float(both.max()) if known else nothing,
        "calibration_error": metrics.calibration_error(of.off.sum(0), of.on, of.sums)
        if known
        else nothing,
        "iou_at": iou.tolist() if known else [],
        **{n: (v.tolist() if known else []) for n, v in counts._asdict().items()},
        "recall": recall.tolist() if known else [],
        "precision": precision.tolist() if known else [],
        "bin_pixels": (of.off.sum(0) + of.on).tolist() if known else [],
        "bin_pixels_of_class": of.on.tolist() if known else [],
        "bin_probabilities": of.sums.tolist() if known else [],
    }


def _describe_instances(of: ClassCounts, known: bool) -> dict[str, float]:
    values = of.instances.value() if known else np.full(10, np.nan)
    names = {"coco_ap": values.mean(), "coco_ap50": values[0], "coco_ap75": values[5]}
    return {name: float(value) for name, value in names.items()}
