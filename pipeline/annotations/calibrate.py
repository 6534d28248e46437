"""Thresholds and presence gates of classes, chosen by ground truth on one half of the images.

The other half says what they gain, with the spread of the gain over images drawn anew. Letters:
K classes, G gates (0, then THRESHOLDS), B bins, T thresholds, N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.annotations import metrics
from pipeline.annotations.metrics import BINS, THRESHOLDS
from pipeline.annotations.predicted import Found
from pipeline.config.ontology import OntologyClass

GATES = np.concatenate([[0.0], THRESHOLDS])
NEAR = 0.005
"""IoU that is given up for fewer images in which an absent class is found."""
_DRAWS = 1000
_HALF = int(np.flatnonzero(THRESHOLDS == 0.5)[0])
SETTINGS = ("0.5 everywhere", "as given", "chosen")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Choice for one class."""

    threshold: float
    presence: float
    iou: float
    """On the half that it was chosen on."""
    images: int
    """With the class, in that half; 0: nothing was chosen."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A figure of the other half at each of SETTINGS, and its change to the chosen one."""

    values: tuple[float, ...]
    low: tuple[float, ...]
    """2.5 % of the changes over images drawn anew, from each setting to the last."""
    high: tuple[float, ...]
    """97.5 %."""


def is_chosen_on(shard: str, key: str) -> bool:
    """Whether an image is of the half for choosing thresholds."""
    digest = hashlib.sha256(f"{shard}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return digest[0] < 128


class Calibration:
    """Counts of both halves. Of an image of the other half 426 bytes a class are held."""

    def __init__(self, classes: list[OntologyClass]):
        self.classes = classes
        shape = (len(classes), len(GATES), BINS)
        self._pixels = np.zeros((2, *shape), np.int64)  # off, on; by the image's gate and bin
        self._absent = np.zeros(shape, np.int64)  # images without the class, by their top bin
        self._present = np.zeros(len(classes), np.int64)
        self.chosen_on = 0
        """Images of the half on which is chosen."""
        self._held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def held_out(self) -> int:
        """Images of the other half."""
        return len(self._held)

    def add(
        self,
        half: bool,
        find: Callable[[int], Found],
        truth: Callable[[int], np.ndarray],
        void: np.ndarray | None = None,
    ) -> None:
        """Count one image; `half` as is_chosen_on says, `find` with every gate open, truth and
        void (W, H) bool."""
        pixels = np.zeros((len(self.classes), 2, BINS), np.int32)
        gates = np.zeros(len(self.classes), np.int16)
        given = np.zeros((len(self.classes), 3), np.int64)
        for k, each in enumerate(self.classes):
            found, mask = find(k), truth(k).ravel()
            assert found.probability is not None
            counted = slice(None) if void is None else ~void.ravel()
            bins = metrics.find_bins(found.probability.ravel()[counted])
            pixels[k] = metrics.count_bins(bins, mask[counted])
            gates[k] = np.searchsorted(THRESHOLDS, found.presence, side="right")
            inside = found.inside.ravel()[counted] & (found.presence >= each.presence)
            both = int((inside & mask[counted]).sum())
            given[k] = both, int(inside.sum()) - both, int(mask[counted].sum()) - both
        if not half:
            self._held.append((pixels, gates, given))
            return
        self.chosen_on += 1
        rows = np.arange(len(self.classes))
        self._pixels[:, rows, gates] += pixels.swapaxes(0, 1)
        there = pixels[:, 1].any(1)
        self._present += there
        top = _top_bin(pixels)
        self._absent[rows[~there], gates[~there], top[~there]] += 1

    def choose(self) -> list[Choice]:
        """For each class the threshold and gate of the best IoU, summed over images.

        Among those within NEAR of it: fewest images with the absent class found, then best, then
        lowest gate. A class present in no image keeps its values.
        """
        tp, fp = (_above(self._pixels[i]) for i in (1, 0))  # (K, G, T)
        total = self._pixels[1].sum((1, 2))[:, None, None]
        iou = tp / (1 + total + fp)
        false = _above(self._absent)
        choices = []
        for k, each in enumerate(self.classes):
            if not self._present[k]:
                choices.append(
                    Choice(threshold=each.threshold, presence=each.presence, iou=0.0, images=0)
                )
                continue
            near = iou[k] >= iou[k].max() - NEAR
            fewest = near & (false[k] == false[k][near].min())
            gate, at = np.argwhere(fewest & (iou[k] == iou[k][fewest].max()))[0]
            choices.append(
                Choice(
                    threshold=float(THRESHOLDS[at]),
                    presence=float(GATES[gate]),
                    iou=float(iou[k, gate, at]),
                    images=int(self._present[k]),
                )
            )
        return choices

    def gains(self, choices: list[Choice]) -> dict[str, Gain]:
        """Mean IoU over the classes present, and the share of images with an absent class found, on
        the other half."""
        counts, absent = self._held_counts(choices)
        there = (counts[0, :, :, 0] + counts[0, :, :, 2] > 0).any(0)
        counts, images = counts[:, :, there], counts.shape[1]
        # The sample itself first, then samples drawn from it.
        drawn = np.random.default_rng(0).multinomial(images, [1 / images] * images, _DRAWS)
        weights = np.concatenate([np.ones((1, images)), drawn])
        tp, fp, fn = (np.einsum("dn,snk->sdk", weights, counts[..., i]) for i in range(3))
        iou = (tp / (1 + tp + fp + fn)).mean(2) if there.any() else np.zeros(tp.shape[:2])
        found, of = (np.einsum("dn,snk->sd", weights, absent[..., i]) for i in range(2))
        return {"mean IoU": _gain(iou), "found where absent": _gain(found / np.maximum(of, 1))}

    def _held_counts(self, choices: list[Choice]) -> tuple[np.ndarray, np.ndarray]:
        """Pixels tp, fp, fn (S, N, K, 3) at each of SETTINGS, and images (S, N, K, 2): found
        though absent, and absent."""
        pixels = np.stack([each[0] for each in self._held]).astype(np.float64)
        gates = np.stack([each[1] for each in self._held])
        given = np.stack([each[2] for each in self._held]).astype(np.float64)
        at = np.array([np.abs(THRESHOLDS - c.threshold).argmin() for c in choices])
        gate = np.array([np.abs(GATES - c.presence).argmin() for c in choices])
        chosen = _counts_at(pixels, at, gates >= gate)
        for k, choice in enumerate(choices):
            if not choice.images:
                chosen[:, k] = given[:, k]
        half = _counts_at(pixels, np.full(len(choices), _HALF), np.ones(gates.shape, np.bool_))
        counts = np.stack([half, given, chosen])
        nowhere = np.broadcast_to(~pixels[:, :, 1].any(2), counts.shape[:3])
        return counts, np.stack([nowhere & (counts[..., 1] > 0), nowhere], -1).astype(np.float64)


def _counts_at(pixels: np.ndarray, at: np.ndarray, passed: np.ndarray) -> np.ndarray:
    """tp, fp, fn (N, K, 3) of histograms (N, K, 2, B) at a threshold each, (K,), if the gate is
    passed, (N, K)."""
    above = np.arange(BINS) > at[:, None]  # (K, B)
    fp, tp = ((pixels[:, :, i] * above).sum(-1) * passed for i in (0, 1))
    return np.stack([tp, fp, pixels[:, :, 1].sum(-1) - tp], -1)


def _above(values: np.ndarray) -> np.ndarray:
    """(K, G, B) -> (K, G, T): sums over gates of at least each, and bins above each threshold."""
    gated = values[:, ::-1].cumsum(1)[:, ::-1]
    return gated[..., ::-1].cumsum(-1)[..., -2::-1]


def _top_bin(pixels: np.ndarray) -> np.ndarray:
    """The highest bin with a pixel, (K,), of histograms (K, 2, B)."""
    filled = np.asarray(pixels.any(1))
    return BINS - 1 - filled[:, ::-1].argmax(1)


def _gain(values: np.ndarray) -> Gain:
    """Of figures (S, 1 + draws)."""
    changes = values[-1] - values
    low, high = np.percentile(changes[:, 1:], [2.5, 97.5], axis=1)
    return Gain(
        values=tuple(values[:, 0].tolist()), low=tuple(low.tolist()), high=tuple(high.tolist())
    )


def describe_gains(gains: dict[str, Gain]) -> list[str]:
    """A line for each figure."""
    lines = []
    for name, gain in gains.items():
        shown = [f"{s} {v:.4f}" for s, v in zip(SETTINGS, gain.values, strict=True)]
        change = gain.values[-1] - gain.values[0]
        lines.append(
            f"{name}: {', '.join(shown)}; change from 0.5 {change:+.4f} "
            f"(95 %: {gain.low[0]:+.4f} to {gain.high[0]:+.4f})"
        )
    return lines
