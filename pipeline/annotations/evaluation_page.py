"""An evaluation -> a table for a terminal, a Parquet file, and a self-contained HTML page.

Names of classes are whatever the data holds: see html.py. Plots are inline SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.annotations.charts import curve
from pipeline.annotations.html import escape_text, make_page
from pipeline.annotations.metrics import THRESHOLDS
from pipeline.errors import one_line

MOST_CLASSES = 200  # of a page
_COLUMNS = {
    "class": "class",
    "images": "images",
    "images_present": "with it",
    "threshold": "threshold",
    "iou": "IoU",
    "iou_present": "IoU where present",
    "iou_0.5": "IoU at .5",
    "iou_best": "best IoU",
    "iou_best_threshold": "at",
    "ap": "AP",
    "boundary_iou": "boundary IoU",
    "presence_precision": "presence precision",
    "presence_recall": "presence recall",
    "absent_found_share": "found where absent",
    "calibration_error": "calibration error",
    "coco_ap": "COCO AP",
    "coco_ap50": "COCO AP50",
}
_ALL = "all"
_SCHEMA = pa.schema(
    [
        ("class", pa.string()),  # null: over all
        ("threshold", pa.float64()),
        *((n, pa.int64()) for n in ("images", "images_present", "absent_found")),
        *(
            (name, pa.float64())
            for name in (
                *("iou", "iou_present", "boundary_iou", "presence_precision", "presence_recall"),
                *("absent_found_share", "absent_pixel_share", "ap", "iou_0.1", "iou_0.3"),
                *("iou_0.5", "iou_best", "iou_best_threshold", "biniou_0.5", "biniou_best"),
                *("calibration_error", "coco_ap", "coco_ap50", "coco_ap75"),
                *("miou", "miou_0.1", "miou_0.3", "miou_0.5", "miou_best", "miou_best_threshold"),
            )
        ),
        # At each of the 49 thresholds.
        ("iou_at", pa.list_(pa.float64())),
        *((name, pa.list_(pa.int64())) for name in ("tp", "fp", "fn", "tn")),
        # The distinct pairs that AP integrates.
        *((name, pa.list_(pa.float64())) for name in ("recall", "precision")),
        # The 50 bins of probability between the thresholds.
        *((name, pa.list_(pa.int64())) for name in ("bin_pixels", "bin_pixels_of_class")),
        ("bin_probabilities", pa.list_(pa.float64())),  # their sum
    ]
)


def evaluation_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A row for each class and one over all, with counts, curves and bins; NaN becomes null."""
    return pa.Table.from_pylist([{k: _known(v) for k, v in r.items()} for r in rows], _SCHEMA)


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def describe_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table as lines of text, without columns of unknown figures."""
    names = _known_columns(rows)
    cells = [[_COLUMNS[n] for n in names], *([_show(row, n) for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = []
    for line in cells:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return [*lines, *_describe_overall(rows[-1])]


def _describe_overall(overall: dict[str, Any]) -> list[str]:
    parts = [f"mean IoU over classes {overall['miou']:.4f}"]
    if not math.isnan(overall["miou_0.5"]):
        parts.append(f"at 0.5 {overall['miou_0.5']:.4f}")
        best, at = overall["miou_best"], overall["miou_best_threshold"]
        parts.append(f"best {best:.4f} at {at:g}")
    return [", ".join(parts)]


def _known_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        name
        for name in _COLUMNS
        if any(row[name] is not None and _known(row[name]) is not None for row in rows)
    ]


def _show(row: dict[str, Any], name: str) -> str:
    value = _known(row[name])
    if name == "class":
        return _ALL if value is None else one_line(value, 40)
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if name in ("threshold", "iou_best_threshold") else f"{value:.4f}"


def draw_evaluation(title: str, rows: Sequence[dict[str, Any]], lines: Sequence[str]) -> str:
    """The page: notes, the table, and plots of all and of each class, at most MOST_CLASSES."""
    names = _known_columns(rows)
    head = "".join(f'<th scope="col">{escape_text(_COLUMNS[n])}</th>' for n in names)
    body = "".join(
        f'<tr{_of_all(row)}><th scope="row">{escape_text(_show(row, names[0]))}</th>'
        + "".join(f"<td>{_show(row, n)}</td>" for n in names[1:])
        + "</tr>\n"
        for row in rows
    )
    notes = "".join(f"<li>{escape_text(line)}</li>" for line in lines)
    parts = [
        f"<h1>{escape_text(title)}</h1>",
        f"<p>{escape_text(_describe_overall(rows[-1])[0])}</p>",
        f"<ul>{notes}</ul>" if notes else "",
        '<div class="scroll" role="region" aria-label="figures" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>",
    ]
    if rows[-1]["bin_pixels"]:
        parts += [_plots(row) for row in [rows[-1], *rows[:-1][:MOST_CLASSES]]]
        if len(rows) - 1 > MOST_CLASSES:
            parts.append(f"<p>Plots of the first {MOST_CLASSES} classes.</p>")
    return make_page(title, "\n".join(parts))


def _of_all(row: dict[str, Any]) -> str:
    return ' class="all"' if row["class"] is None else ""


def _plots(row: dict[str, Any]) -> str:
    name = escape_text(_show(row, "class"))
    filled = [i for i, n in enumerate(row["bin_pixels"]) if n]
    means = [row["bin_probabilities"][i] / row["bin_pixels"][i] for i in filled]
    shares = [row["bin_pixels_of_class"][i] / row["bin_pixels"][i] for i in filled]
    at = THRESHOLDS.tolist()
    plots = [
        curve(f"IoU of {name} at each threshold", "threshold", at, row["iou_at"]),
        curve(f"Precision over recall of {name}", "recall", row["recall"], row["precision"]),
        curve(
            f"Share of pixels that are {name}, over the probability",
            "probability",
            means,
            shares,
            even=True,
        ),
    ]
    return f'<h2>{name}</h2>\n<div class="plots">{"".join(plots)}</div>'
