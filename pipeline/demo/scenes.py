"""Synthetic scenes: coloured shapes on textured backgrounds, and the phrases naming them.

The bundled model is trained and measured on these, and the bundled shards hold some. A scene is
decided by its generator's state alone, so the same seed always draws the same scene.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# Hue in degrees, saturation, value; each object moves a little away from these.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.90, 0.85),
    "orange": (29, 0.95, 0.97),
    "yellow": (56, 0.90, 0.97),
    "green": (125, 0.80, 0.62),
    "blue": (221, 0.85, 0.88),
    "purple": (285, 0.75, 0.68),
    "white": (0, 0.00, 0.97),
    "black": (0, 0.00, 0.06),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")

Pair = tuple[str, str]
ALL_PAIRS: tuple[Pair, ...] = tuple((c, s) for c in COLOURS for s in SHAPES)
# Never drawn and never named in training: each colour once, and "red" and "blue" twice; each shape
# once, "star" and "circle" twice. What the model does with them is composed, not remembered.
UNSEEN_PAIRS: frozenset[Pair] = frozenset(
    {
        ("red", "star"),
        ("red", "moon"),
        ("orange", "square"),
        ("yellow", "heart"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("blue", "ring"),
        ("purple", "cross"),
        ("white", "star"),
        ("black", "circle"),
    }
)
# An object of colour "" is turquoise or pink, which have no name here: ranges of hue in degrees.
UNNAMED_HUES = ((168, 195), (312, 332))
UNNAMED_PAIRS: tuple[Pair, ...] = tuple(("", s) for s in SHAPES)
SEEN_PAIRS: tuple[Pair, ...] = tuple(p for p in ALL_PAIRS if p not in UNSEEN_PAIRS)

SIZE_PX = (160, 160)
DIAMETERS = (0.3, 0.56)
_SUPERSAMPLING = 4  # shapes are drawn this much larger, then averaged: anti-aliased edges


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it.

    `image` HWC uint8 0..255; `labels` HW uint8, 0 for the background and i + 1 where object i is
    what one sees (nearer objects hide farther ones); `objects` the (colour, shape) of each.
    """

    image: np.ndarray
    labels: np.ndarray
    objects: tuple[Pair, ...]

    def mask(self, colour: str = "", shape: str = "") -> np.ndarray:
        """HW bool: every object of this colour and this shape; an empty name admits any."""
        wanted = [c == (colour or c) and s == (shape or s) for c, s in self.objects]
        return np.array([False, *wanted])[self.labels]


def phrase(colour: str, shape: str) -> str:
    """The plain phrase for a colour, a shape or both: "red circle", "star", "blue"."""
    return f"{colour} {shape}".strip()


def draw_scene(
    rng: np.random.Generator,
    pairs: Sequence[Pair] = ALL_PAIRS,
    size: tuple[int, int] = SIZE_PX,
    diameters: tuple[float, float] = DIAMETERS,
) -> Scene:
    """Draw two to five objects out of `pairs`, at `size` (height, width) in pixels.

    Diameters are shares of the shorter side, tilts up to 25 degrees either way. Half of the
    objects repeat the colour or the shape of an earlier one: neither word alone finds a "red
    circle". An object without a place hiding little of the others is left out.
    """
    canvas = draw_background(rng, size)
    labels = np.zeros(size, np.uint8)
    objects: list[Pair] = []
    for _ in range(rng.integers(2, 6)):
        pair = _choose_pair(rng, pairs, objects)
        diameter = float(rng.uniform(*diameters)) * min(size)
        coverage = _draw_shape(pair[1], diameter, rng.uniform(-25, 25))
        place = _find_place(rng, labels, coverage > 0.5)
        if place is None:
            continue
        window = labels[place]
        window[coverage > 0.5] = len(objects) + 1
        paint = _paint(rng, pair[0], coverage.shape)
        canvas[place] += coverage[..., None] * (paint - canvas[place])
        objects.append(pair)
    canvas += rng.uniform(0, 5) * rng.standard_normal(canvas.shape, np.float32)
    return Scene(canvas.clip(0, 255).astype(np.uint8), labels, tuple(objects))


def draw_background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """HWC float32 0..255: a dull two-tone texture, one of five kinds."""
    tones = [
        _rgb(rng.uniform(0, 360), rng.uniform(0, 0.28), rng.uniform(0.35, 0.75)) for _ in range(2)
    ]
    y, x = _grid(size, min(size))
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    frequency = rng.uniform(3, 14)
    kind = rng.integers(5)
    if kind == 0:  # gradient
        share = (along - along.min()) / np.ptp(along)
    elif kind == 1:  # stripes
        share = 0.5 + 0.5 * np.sin(2 * math.pi * frequency * along)
    elif kind == 2:  # checks
        share = ((np.floor(frequency * along) + np.floor(frequency * across)) % 2) * 0.6
    elif kind == 3:  # clouds
        share = _clouds(rng, size, int(rng.integers(3, 10)))
    else:  # grain
        share = 0.5 + 0.25 * rng.standard_normal(size, np.float32)
    share = (share * rng.uniform(0.4, 1)).clip(0, 1).astype(np.float32)[..., None]
    return tones[0] + (tones[1] - tones[0]) * share


def _choose_pair(rng: np.random.Generator, pairs: Sequence[Pair], drawn: list[Pair]) -> Pair:
    if drawn and rng.random() < 0.5:
        colour, shape = drawn[rng.integers(len(drawn))]
        kin = [p for p in pairs if (p[0] == colour) != (p[1] == shape)]
        pairs = kin or pairs
    return pairs[int(rng.integers(len(pairs)))]


def _find_place(
    rng: np.random.Generator, labels: np.ndarray, solid: np.ndarray
) -> tuple[slice, slice] | None:
    """A window of `labels` for the mask `solid`, hiding at most a tenth of any object."""
    height, width = solid.shape
    areas = np.bincount(labels.ravel(), minlength=8)
    for _ in range(20):
        top = int(rng.integers(labels.shape[0] - height + 1))
        left = int(rng.integers(labels.shape[1] - width + 1))
        place = (slice(top, top + height), slice(left, left + width))
        hidden = np.bincount(labels[place][solid], minlength=8)
        if (hidden[1:] <= 0.1 * areas[1:]).all():
            return place
    return None


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) float32 0..255 from a hue in degrees and two shares."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32)


def _grid(size: tuple[int, int], unit: int) -> tuple[np.ndarray, np.ndarray]:
    """y (H, 1) and x (1, W), float32, in units of so many pixels."""
    y, x = np.ogrid[: size[0], : size[1]]
    return y.astype(np.float32) / unit, x.astype(np.float32) / unit


def _paint(rng: np.random.Generator, colour: str, size: tuple[int, int]) -> np.ndarray:
    """HWC float32: the colour, slightly off, a little darker towards one side."""
    hue, saturation, value = COLOURS[colour] if colour else _unnamed_colour(rng)
    hue += rng.uniform(-6, 6)
    saturation = min(1.0, saturation * rng.uniform(0.88, 1.1))
    base = _rgb(hue, saturation, min(1.0, value * rng.uniform(0.9, 1.08)))
    y, x = _grid(size, max(size))
    angle = rng.uniform(0, 2 * math.pi)
    shade = 1 - rng.uniform(0, 0.15) * (x * math.cos(angle) + y * math.sin(angle)).clip(0, 1)
    return base * shade[..., None]


def _unnamed_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    low, high = UNNAMED_HUES[int(rng.integers(len(UNNAMED_HUES)))]
    return rng.uniform(low, high), rng.uniform(0.45, 0.95), rng.uniform(0.5, 0.95)


def _clouds(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """HW 0..1: random values on a coarse grid, smoothly enlarged."""
    grid = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
    return np.asarray(grid.resize(size[::-1], Image.Resampling.BICUBIC)).clip(0, 1)


# ---- shapes: outlines in a unit disc, x to the right and y down


def _polar(radii: Sequence[float], start: float = -0.25) -> np.ndarray:
    """Corners at equal angles; the first, at `start` turns, is on top unless told otherwise."""
    turns = 2 * math.pi * (start + np.arange(len(radii)) / len(radii))
    return np.stack([np.cos(turns), np.sin(turns)], 1) * np.asarray(radii)[:, None]


def _cross() -> np.ndarray:
    a, b = 0.33, 0.94
    quarter = [(a, a), (a, b), (-a, b)]
    return np.array([(x, y) for turn in range(4) for x, y in _turned(quarter, turn)])


def _turned(points: list[tuple[float, float]], quarters: int) -> list[tuple[float, float]]:
    for _ in range(quarters):
        points = [(-y, x) for x, y in points]
    return points


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], 1) / 16.5


_OUTLINES: dict[str, Callable[[], np.ndarray]] = {
    "circle": lambda: _polar([0.9] * 60),
    "ring": lambda: _polar([0.98] * 60),
    "moon": lambda: _polar([0.98] * 60),
    "square": lambda: _polar([1.0] * 4, start=0.125),
    "triangle": lambda: _polar([1.0] * 3),
    "star": lambda: _polar([1.0, 0.42] * 5),
    "cross": _cross,
    "heart": _heart,
}
# Discs cut out of a shape: centre x, centre y, radius.
_HOLES = {"ring": (0.0, 0.0, 0.5), "moon": (0.55, 0.0, 0.72)}


def _draw_shape(shape: str, diameter: float, degrees: float) -> np.ndarray:
    """HW float32 0..1: how much of each pixel the rotated shape covers, cropped to the shape."""
    scale = _SUPERSAMPLING * diameter / 2
    side = _SUPERSAMPLING * (math.ceil(diameter) + 2)
    turn = math.radians(degrees)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

    def to_pixels(points: np.ndarray) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (points @ rotation) * scale + side / 2]

    picture = Image.new("L", (side, side))
    draw = ImageDraw.Draw(picture)
    draw.polygon(to_pixels(_OUTLINES[shape]()), fill=255)
    if shape in _HOLES:
        x, y, radius = _HOLES[shape]
        draw.polygon(to_pixels(_polar([radius] * 60) + np.array([x, y])), fill=0)
    coverage = np.asarray(picture.reduce(_SUPERSAMPLING), np.float32) / 255
    rows, columns = np.nonzero(coverage)
    return coverage[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
