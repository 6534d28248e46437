"""Kept probability maps of an image and an ontology -> annotations. No model, no torch.

For each class: the largest of its prompts' maps, resized to the image; the pixels above its
threshold and its negatives; of these, the pixels left by other classes; small holes filled;
connected parts, each an annotation. Logits are interpolated, as the masks' own were.

Shapes: K prompts of a class, h and w the map, H and W the image, n and m a window of the image.
Arrays of the image are transposed, (W, H): COCO's RLE goes down the columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco
from scipy import ndimage

from pipeline.config.ontology import Ontology, OntologyClass
from pipeline.infer.bilinear import Axis

# Pixels of windows, over all classes, that are not interpolated a second time: 6 bytes each.
_KEPT_PX = 1 << 24
_EIGHT_CONNECTED = np.ones((3, 3), np.int8)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A class and the prompt_ids, in the run, of its prompts and of its negatives."""

    class_id: int
    of: OntologyClass
    prompt_ids: tuple[int, ...]
    negative_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Region of a class in an image, before other classes have their share."""

    window: tuple[slice, slice]
    """Columns and rows of the image."""
    inside: np.ndarray
    """(n, m) bool: above the threshold, and not a negative's."""
    logits: np.ndarray
    """(n, m) float32."""
    winner: np.ndarray
    """(n, m) uint8: the index of the prompt with the largest probability."""


def ask(ontology: Ontology, prompt_ids: Mapping[str, int]) -> list[Asked]:
    """The classes with their prompts' ids in a run; KeyError for a missing prompt."""
    return [
        Asked(
            class_id=class_id,
            of=each,
            prompt_ids=tuple(prompt_ids[prompt.name] for prompt in each.prompts),
            negative_ids=tuple(prompt_ids[text] for text in each.negatives),
        )
        for class_id, each in enumerate(ontology.classes)
    ]


def cut_image(
    maps: Mapping[int, np.ndarray], size: tuple[int, int], asked: list[Asked], ontology: Ontology
) -> list[dict[str, Any]]:
    """The annotations of one image, in the order of the classes and, in a class, of the columns.

    maps: by prompt_id, (h, w) uint8, round(255 * probability); size: of the image; asked: the
    classes of the ontology, without absent ones. Each dict has the columns of schema.ANNOTATIONS
    but for the ids of the row. Peak memory is 36 bytes a pixel, whatever the number of classes.
    """
    rows: list[dict[str, Any]] = []
    found: dict[int, _Found] = {}
    owner = None
    if ontology.overlap != "multilabel":
        owner, found = _share(asked, maps, size, by_priority=ontology.overlap == "priority")
    for each in asked:
        one = found.pop(each.class_id, None) or _find(each, maps, size)
        if one is not None:
            rows += _annotations(each, one, maps, size, owner, ontology.instances)
    return [row | {"instance": i} for i, row in enumerate(rows)]


def presence_of(each: Asked, maps: Mapping[int, np.ndarray]) -> float:
    """The largest probability of a class in an image."""
    return max(float(maps[i].max()) for i in each.prompt_ids) / 255


def _find(each: Asked, maps: Mapping[int, np.ndarray], size: tuple[int, int]) -> _Found | None:
    """Region of the class, or None if it is nowhere."""
    if presence_of(each, maps) < each.of.presence:
        return None
    level = logit(each.of.threshold)
    grids = [to_logits(maps[i]) for i in each.prompt_ids]
    above = np.logical_or.reduce([grid > level for grid in grids])
    if not above.any():
        return None
    height, width = size
    rows = Axis.between(above.shape[0], height).touching(np.flatnonzero(above.any(1)))
    columns = Axis.between(above.shape[1], width).touching(np.flatnonzero(above.any(0)))
    if not len(rows) or not len(columns):  # an image smaller than its map may pass over a cell
        return None

    def resize(grid: np.ndarray) -> np.ndarray:
        return columns.lerp(np.ascontiguousarray(rows.lerp(grid).T))

    logits = resize(grids[0])
    winner = np.zeros(logits.shape, np.uint8)
    for k, grid in enumerate(grids[1:], start=1):
        other = resize(grid)
        winner[other > logits] = k
        np.maximum(logits, other, out=logits)
    inside = logits > level
    for i in each.negative_ids:
        inside &= logits > resize(to_logits(maps[i]))
    if not inside.any():
        return None
    window = tuple(slice(a.start, a.start + len(a)) for a in (columns, rows))
    return _Found(window=window, inside=inside, logits=logits, winner=winner)  # type: ignore[arg-type]


def _share(
    asked: list[Asked], maps: Mapping[int, np.ndarray], size: tuple[int, int], *, by_priority: bool
) -> tuple[np.ndarray, dict[int, _Found]]:
    """(W, H) int16: the class of each pixel, -1 for the background.

    Of the classes passing there, the one of the highest priority, of these the most probable, of
    these the first. With it, by class_id, what was found of the classes, as far as _KEPT_PX go.
    """
    owner = np.full(size[::-1], -1, np.int16)
    best = np.full(size[::-1], -np.inf, np.float32)
    settled = np.zeros(size[::-1], np.bool_)
    found: dict[int, _Found] = {}
    kept_px, level = 0, None
    for each in sorted(asked, key=lambda a: (-a.of.priority * by_priority, a.class_id)):
        priority = each.of.priority
        one = _find(each, maps, size)
        if one is None:
            continue
        if by_priority and priority != level:
            settled, level = owner >= 0, priority
        wins = one.inside & ~settled[one.window] & (one.logits > best[one.window])
        owner[one.window][wins] = each.class_id
        best[one.window][wins] = one.logits[wins]
        kept_px += wins.size
        if kept_px <= _KEPT_PX:
            found[each.class_id] = one
    return owner, found


def _annotations(
    each: Asked,
    one: _Found,
    maps: Mapping[int, np.ndarray],
    size: tuple[int, int],
    owner: np.ndarray | None,
    instances: bool,
) -> Iterator[dict[str, Any]]:
    """The parts of a class, or the class as a whole; too small ones are left out."""
    inside, free = one.inside, None
    if owner is not None:
        inside, free = owner[one.window] == each.class_id, owner[one.window] == -1
    if each.of.fill_holes:
        inside = fill_holes(inside, each.of.fill_holes, free)
    labels = label_parts(inside) if instances else inside.astype(np.int32)
    areas = np.bincount(labels.ravel())
    large = areas >= each.of.min_area
    large[0] = False
    flat = labels.ravel()
    probability = 1 / (1 + np.exp(-one.logits.ravel()))
    scores = np.bincount(flat, probability) / np.maximum(areas, 1)
    prompts = len(each.prompt_ids)
    wins = np.bincount(flat * prompts + one.winner.ravel(), minlength=len(areas) * prompts)
    winners = wins.reshape(len(areas), prompts).argmax(1)
    rles = split_runs(
        np.where(large[labels], labels, 0), size, (one.window[0].start, one.window[1].start)
    )
    facts = {
        "class_id": each.class_id,
        "class": each.of.name,
        "presence": presence_of(each, maps),
        "height": size[0],
        "width": size[1],
        "threshold": each.of.threshold,
    }
    for k in np.flatnonzero(large).tolist():
        yield facts | {
            "prompt_id": each.prompt_ids[winners[k]],
            "score": float(scores[k]),
            "rle": {"size": list(size), "counts": rles[k]["counts"].decode("ascii")},
            "bbox": coco.toBbox(rles[k]).tolist(),
            "area": int(areas[k]),
        }


def label_parts(inside: np.ndarray) -> np.ndarray:
    """int32 of the same shape: 0 outside, from 1 in the 8-connected parts of a bool array."""
    return ndimage.label(inside, _EIGHT_CONNECTED)[0].astype(np.int32, copy=False)


def fill_holes(inside: np.ndarray, largest: int, free: np.ndarray | None) -> np.ndarray:
    """A mask (n, m) bool with its holes of at most `largest` pixels filled, where it is `free`.

    A hole is a 4-connected part of the rest, not touching the edge of the array.
    """
    holes, count = ndimage.label(~inside)
    small = np.bincount(holes.ravel(), minlength=count + 1) <= largest
    small[0] = False
    for edge in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        small[edge] = False
    filled = small[holes]
    return inside | (filled if free is None else filled & free)


def split_runs(
    labels: np.ndarray, size: tuple[int, int], start: tuple[int, int] = (0, 0)
) -> dict[int, dict[str, Any]]:
    """COCO's compressed RLE of `labels == k` for each k above 0: {"size", "counts"} as
    coco.encode gives it, in one pass over all.

    labels: (n, m) int32, a window of the transposed image of `size`; start: its column and row.
    """
    height, width = size
    padded = np.zeros((labels.shape[0], labels.shape[1] + 2), labels.dtype)
    padded[:, 1:-1] = labels
    column, row = np.nonzero(padded[:, 1:] != padded[:, :-1])
    position = (column + start[0]) * height + row + start[1]
    after, before = padded[column, row + 1], padded[column, row]
    begins, ends = position[after > 0], position[before > 0]  # in step: each run has both
    of = after[after > 0]
    order = np.argsort(of, kind="stable")
    begins, ends, of = begins[order], ends[order], of[order]
    bounds = np.flatnonzero(np.diff(of)) + 1
    rles = {}
    for first, last in zip([0, *bounds], [*bounds, len(of)], strict=True):
        if first < last:
            b, e = begins[first:last], ends[first:last]
            apart = b[1:] > e[:-1]  # a run that goes on in the next column is one
            b, e = np.append(b[:1], b[1:][apart]), np.append(e[:-1][apart], e[-1:])
            changes = np.stack([b, e], 1).ravel()
            counts = np.diff(changes, prepend=0, append=height * width)
            counts = counts[:-1] if counts[-1] == 0 else counts
            rle = {"size": [height, width], "counts": counts.tolist()}
            rles[int(of[first])] = coco.frPyObjects(rle, height, width)
    return rles


def to_logits(kept: np.ndarray) -> np.ndarray:
    """float32 logits of a uint8 map; 0 and 255 stand for half a step from the end."""
    return _LOGITS[kept]


def logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf


_STEPS = np.arange(256).clip(0.5, 254.5) / 255
_LOGITS = np.log(_STEPS / (1 - _STEPS)).astype(np.float32)
