"""Plots as inline SVG, in the colours of the page's style: curves in the unit square, histograms.

Captions are text of ours with names of the data in it: escaped by whoever makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

_SIDE = 220  # of the square of a curve
_WIDTH, _HEIGHT = 400, 90  # of a histogram


def curve(
    caption: str, axis: str, xs: Sequence[float], ys: Sequence[float], *, even: bool = False
) -> str:
    """A curve in the unit square; `even`: with the diagonal, and a dot for each point."""
    left, top = 26, 6
    points = [(left + _SIDE * x, top + _SIDE * (1 - y)) for x, y in zip(xs, ys, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    bottom, right = top + _SIDE, left + _SIDE
    extra = ""
    if even:
        extra = f'<line class="even" x1="{left}" y1="{bottom}" x2="{right}" y2="{top}"/>'
        extra += "".join(
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points
        )
    box = f"0 0 {right + 8} {bottom + 18}"
    return f"""<figure><svg viewBox="{box}" role="img" aria-label="{caption}">
<rect class="axis" x="{left}" y="{top}" width="{_SIDE}" height="{_SIDE}"/>{extra}
<polyline class="curve" points="{line}"/>
<text x="{left - 4}" y="{top + 9}" text-anchor="end">1</text>
<text x="{left - 4}" y="{bottom}" text-anchor="end">0</text>
<text x="{right}" y="{bottom + 13}" text-anchor="end">{axis} 1</text>
</svg><figcaption>{caption}</figcaption></figure>"""


def histogram(
    caption: str, counts: Sequence[int], span: tuple[float, float], *, limit: float | None = None
) -> str:
    """Bars with heights by the square root of the counts, to show few beside many.

    `span`: values at the two ends of the axis; `limit`: position of a line, with other colours of
    the bars beyond it.
    """
    left, top = 4, 14
    low, high = span
    wide = _WIDTH / max(len(counts), 1)
    tallest = max([1, *counts]) ** 0.5
    at = None if limit is None else left + _WIDTH * (limit - low) / ((high - low) or 1)
    bars = []
    for i, count in enumerate(counts):
        if count:
            x, tall = left + i * wide, max(_HEIGHT * count**0.5 / tallest, 1)
            kind = "under" if at is not None and x + wide / 2 < at else "over"
            y = top + _HEIGHT - tall
            size = f'width="{max(wide - 1, 0.5):.1f}" height="{tall:.1f}"'
            bars.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}/>')
    bottom = top + _HEIGHT
    line = ""
    if at is not None:
        line = f'<line class="limit" x1="{at:.1f}" y1="{top - 4}" x2="{at:.1f}" y2="{bottom}"/>'
        line += f'<text x="{at:.1f}" y="8" text-anchor="middle">{limit:.2f}</text>'
    box = f"0 0 {_WIDTH + 8} {bottom + 16}"
    return f"""<figure><svg class="wide" viewBox="{box}" role="img" aria-label="{caption}">
{"".join(bars)}
<line class="axis" x1="{left}" y1="{bottom}" x2="{left + _WIDTH}" y2="{bottom}"/>{line}
<text x="{left}" y="{bottom + 12}">{low:.3g}</text>
<text x="{left + _WIDTH}" y="{bottom + 12}" text-anchor="end">{high:.3g}</text>
</svg><figcaption>{caption}</figcaption></figure>"""


def share_bar(share: float) -> str:
    """A bar as long as a share of 0..1; the number stands beside it."""
    long = f"{100 * min(max(share, 0.0), 1.0):.1f}"
    bar = f'<rect class="over" width="{long}" height="8"/>'
    return (
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f"{bar}</svg>"
    )
