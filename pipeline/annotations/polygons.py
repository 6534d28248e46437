"""Masks -> polygons of one ring: holes are joined to the outer ring by seams.

Vertices are pixel centres, as cv2.findContours gives them: cv2.fillPoly fills the pixels under the
outline too, and makes the same mask of them. Needs OpenCV, the extra `export`.

Shapes: H and W of the mask; N vertices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.errors import UsageError

FEWEST = 3  # vertices of a polygon


def load_cv2() -> Any:
    """OpenCV. Raises UsageError if it is not installed."""
    try:
        import cv2
    except ImportError as error:
        message = "needs OpenCV: pip install 'clipseg-ray[export]'"
        raise UsageError(message) from error
    return cv2


def trace_polygons(mask: np.ndarray) -> tuple[list[np.ndarray], int]:
    """The 8-connected parts of a mask, (H, W) uint8, as rings, (N, 2) int64 of x, y each.

    A seam runs there and back between the two nearest points of a hole and the ring joined so far,
    and crosses nothing. Also returns how many parts have under FEWEST contour points, and are left
    out: single pixels and straight lines.
    """
    cv2 = load_cv2()
    found, tree = cv2.findContours(
        np.ascontiguousarray(mask, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    rings = [contour.reshape(-1, 2).astype(np.int64) for contour in found]
    holes: dict[int, list[np.ndarray]] = {}
    for i, ring in enumerate(rings):
        if (above := int(tree[0, i, 3])) >= 0:
            holes.setdefault(above, []).append(ring)
    polygons, left_out = [], 0
    for i, ring in enumerate(rings):
        if tree[0, i, 3] >= 0:
            continue
        polygon = without_straight(_join(ring, holes.get(i, [])))
        if len(polygon) < FEWEST:
            left_out += 1
        else:
            polygons.append(polygon)
    return polygons, left_out


def without_straight(ring: np.ndarray) -> np.ndarray:
    """The ring (N, 2) without the points between two equal steps."""
    steps = np.diff(ring, axis=0, prepend=ring[-1:], append=ring[:1])
    return ring[(steps[:-1] != steps[1:]).any(axis=1)]


def _join(ring: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """One ring of an outer ring and its holes, always the nearest of those left."""
    left = [(*_nearest(ring, hole), hole) for hole in holes]
    while left:
        index = min(range(len(left)), key=lambda i: left[i][0])
        _, point, start, hole = left.pop(index)
        at = int(np.flatnonzero((ring == point).all(axis=1))[0])
        seam = np.concatenate([hole[start:], hole[: start + 1]])
        ring = np.concatenate([ring[: at + 1], seam, ring[at:]])
        # Another hole may be nearer to the one just joined than to the ring before.
        left = [min(old, (*_nearest(hole, old[3]), old[3]), key=lambda o: o[0]) for old in left]
    return ring


def _nearest(ring: np.ndarray, hole: np.ndarray) -> tuple[float, np.ndarray, int]:
    """The smallest squared distance, the ring's point and the index of the hole's."""
    best: tuple[float, np.ndarray, int] = (np.inf, ring[0], 0)
    points = ring.astype(np.float64)
    for first in range(0, len(hole), 256):  # bounds the memory of a long hole
        some = hole[first : first + 256].astype(np.float64)
        # (a - b)^2, exact: coordinates are whole and small.
        squares = (points**2).sum(1)[:, None] + (some**2).sum(1) - 2 * points @ some.T
        r, h = np.unravel_index(int(squares.argmin()), squares.shape)
        if squares[r, h] < best[0]:
            best = (float(squares[r, h]), ring[r], first + int(h))
    return best
