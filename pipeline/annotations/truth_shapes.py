"""Shapes of annotation tools -> polygons in pixels, as truth.check_polygons takes them.

Pixels have whole corners: x = 0 is the left edge of the first column, as in COCO, CVAT and Label
Studio. Angles are degrees, clockwise as the image is seen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.errors import UsageError

_LIMIT_PX = 10.0**7  # of a coordinate
_CORNERS = 180  # of an ellipse


def numbers(values: list[Any], where: str) -> list[float]:
    """Finite numbers out of texts or numbers; raises UsageError."""
    try:
        found = [float(value) for value in values]
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{where}: coordinates that are no numbers") from error
    if not all(abs(value) <= _LIMIT_PX for value in found):
        raise UsageError(f"{where}: coordinates that are no places in an image")
    return found


def rectangle(
    box: tuple[float, float, float, float], angle: float, around: tuple[float, float]
) -> np.ndarray:
    """The corners (4, 2) x, y of a box (left, top, right, bottom), turned around a point."""
    left, top, right, bottom = box
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return _turn(corners, angle, around)


def ellipse(center: tuple[float, float], radii: tuple[float, float], angle: float) -> np.ndarray:
    """Points (N, 2) x, y on an ellipse of radii along x and y, turned around its centre."""
    at = np.linspace(0, 2 * math.pi, _CORNERS, endpoint=False)
    points = np.stack([np.cos(at), np.sin(at)], 1) * radii + np.array(center)
    return _turn(points, angle, center)


def _turn(points: np.ndarray, angle: float, around: tuple[float, float]) -> np.ndarray:
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned: np.ndarray = (points - around) @ np.array([[c, s], [-s, c]]) + around
    return turned
