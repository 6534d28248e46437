"""A report -> its page: one self-contained HTML file, at most MOST_BYTES whatever the run.

Keys, prompts, captions and reasons are whatever the data holds: see html.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.annotations.charts import histogram, share_bar
from pipeline.annotations.html import cell, dot, escape_text, make_page, missing, picture
from pipeline.annotations.overlay import ACCENT, describe_share
from pipeline.annotations.report_pictures import Row, Shown
from pipeline.annotations.report_sample import NEAR, TABLE_ROWS, Candidate, Class, Sample
from pipeline.annotations.report_vectors import Neighbour, VectorSample
from pipeline.annotations.script import SORT, ZOOM, sortable_table
from pipeline.errors import REASONS
from pipeline.run.failures import FailureSample
from pipeline.run.status import Account
from pipeline.run.wanted_images import Place

MOST_BYTES = 5_000_000
HISTOGRAMS = 60  # classes with one
NAMES = 60  # characters of a class
_KEY = 80  # characters
_FACTS = 80  # of the configuration

_TITLES = {"segment": "Masks", "label": "Labels", "embed": "Embeddings", "classify": "Classes"}
_MEANINGS = {
    "random": "random, of those found",
    "highest": "highest score",
    "most uncertain": "most uncertain: nearest to the threshold",
    "lowest": "lowest score",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Contents of the page."""

    output: str
    record: Mapping[str, Any]
    """Of _run.json."""
    complete: bool
    account: Account
    failures: FailureSample
    sample: Sample | None = None
    """Of a run with masks, annotations or labels."""
    chosen: Mapping[str, Mapping[str, Sequence[Candidate]]] = field(default_factory=dict)
    """Images by class and order."""
    rows: Mapping[Shown, Row] = field(default_factory=dict)
    pictures: Mapping[Shown, bytes | str] = field(default_factory=dict)
    """JPEG files, or why there is none."""
    colors: Mapping[str, str] = field(default_factory=dict)
    """By class, of those with one of their own."""
    vectors: VectorSample | None = None
    thumbnails: Mapping[Place, bytes | str] = field(default_factory=dict)
    """Of the images in `vectors`."""
    notes: Sequence[str] = ()


def draw_report(report: Report) -> str:
    """The page; without its pictures if too large with them."""
    page = _draw(report)
    if len(page.encode()) > MOST_BYTES:
        why = f"left out: the page would be larger than {MOST_BYTES // 1_000_000} MB"
        pictures = dict.fromkeys(report.pictures, why)
        thumbnails = dict.fromkeys(report.thumbnails, why)
        page = _draw(replace(report, pictures=pictures, thumbnails=thumbnails))
    return page


def _draw(report: Report) -> str:
    sections: dict[str, tuple[str, str]] = {}
    if report.sample:
        sections["found"] = ("What was found", _found(report, report.sample))
        if report.sample.table:
            sections["images"] = ("Images", _table(report.sample))
    if report.vectors:
        sections["vectors"] = ("Embeddings", _vectors(report, report.vectors))
    sections["errors"] = ("Errors", _errors(report))
    sections["speed"] = ("Speed", _speed(report))
    sections["run"] = ("Configuration", _configuration(report))
    links = "".join(f'<a href="#{id_}">{title}</a>' for id_, (title, _) in sections.items())
    body = [_head(report), f'<nav aria-label="sections">{links}</nav>']
    body += [
        f'<section id="{id_}" aria-labelledby="{id_}-title">\n<h2 id="{id_}-title">{title}</h2>\n'
        f"{inside}</section>"
        for id_, (title, inside) in sections.items()
    ]
    return make_page(f"Report: {report.output}", "\n".join(body), script=ZOOM + SORT)


def _head(report: Report) -> str:
    record, account = report.record, report.account
    job = str(record.get("fingerprint", {}).get("job", "?"))
    source = escape_text(str(record.get("config", {}).get("input")), 200)
    state = (
        f"complete, finished {record.get('finished_at', '?')}"
        if report.complete
        else "not complete: the same command again does the rest"
    )
    cards = {
        "images done": f"{account.ok:,}",
        "images failed": f"{account.error:,}",
        "shards done": f"{account.done:,} of {account.planned:,}",
    }
    if account.cut:
        cards["shards damaged"] = f"{account.cut:,}"
    if account.skipped:
        cards["samples without an image"] = f"{account.skipped:,}"
    if rate := record.get("throughput", {}).get("images_per_s"):
        cards["images a second"] = f"{rate:,.1f}"
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards.items())
    notes = "".join(f"<li>{escape_text(note)}</li>" for note in report.notes)
    return f"""<h1>{_TITLES.get(job, "Results")} of {source}</h1>
<p>{escape_text(report.output)}: {escape_text(job)}, {escape_text(state)}</p>
<dl class="cards">{shown}</dl>
{f"<ul>{notes}</ul>" if notes else ""}"""


def _sampled(whole: bool, images: int, shards: int, of_shards: int) -> str:
    if whole:
        return f"All {images:,} images of the finished shards."
    return (
        f"A sample: {images:,} images of {shards:,} of {of_shards:,} shards, evenly spread; of a "
        "large shard its first images. Shares are shares of the sample."
    )


def _found(report: Report, sample: Sample) -> str:
    said = _sampled(sample.whole, sample.images, sample.shards, sample.of_shards)
    if sample.more_classes:
        said += f" Figures of {len(sample.classes):,} classes; there are more."
    parts = [f"<p>{escape_text(said)}</p>", *map(_unread, sample.unread[:5])]
    if not sample.images:
        return "".join([*parts, "<p>No image came out well yet.</p>"])
    ordered = list(sample.classes)
    if not sample.kind.has_masks:
        ordered.sort(key=lambda one: -one.found)
        every = [sum(bins) for bins in zip(*(one.scores for one in ordered), strict=True)]
        caption = "probability of the first label of each image; heights are square roots"
        parts.append(f'<div class="plots">{histogram(caption, every, (0.0, 1.0))}</div>')
    parts.append(_coverage(sample, ordered, report.colors))
    for one in ordered[:HISTOGRAMS]:
        if one.images:
            parts.append(_class(report, sample, one))
    if len(ordered) > HISTOGRAMS:
        parts.append(f"<p>Pictures and plots of the first {HISTOGRAMS} classes.</p>")
    return "\n".join(parts)


def _unread(why: str) -> str:
    return f"<p>Not read: {escape_text(why)}</p>"


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _coverage(sample: Sample, classes: Sequence[Class], colors: Mapping[str, str]) -> str:
    masks = sample.kind.has_masks
    heads = ["class", "images with it", "share of images", ""]
    heads += ["mean share of the image"] if masks else []
    heads += ["mean score", "near the threshold" if masks else "nearly another label"]
    heads += ["threshold"] if masks else []
    head = "".join(
        f'<th scope="col">{name}</th>' if name else '<td aria-hidden="true"></td>' for name in heads
    )
    lines = []
    for one in classes:
        share = one.found / one.images if one.images else 0.0
        cells = [f"{one.found:,} of {one.images:,}", f"{100 * share:.1f} %", share_bar(share)]
        if masks:
            known = not math.isnan(one.mean_share)
            cells.append(describe_share(one.mean_share) if known else "-")
        cells += [_number(one.mean_score, 3), f"{one.near:,}"]
        cells += [_number(one.threshold)] if masks else []
        mark = dot(colors.get(one.name, ACCENT)) if masks else ""
        name = f'<th scope="row">{mark}{escape_text(one.name, NAMES)}</th>'
        lines.append(f"<tr>{name}{''.join(f'<td>{c}</td>' for c in cells)}</tr>\n")
    near = "threshold" if masks else "score of the second label"
    return f"""<div class="scroll" role="region" aria-label="figures of classes" tabindex="0">
<table><thead><tr>{head}</tr></thead><tbody>
{"".join(lines)}</tbody></table></div>
<p>Means are over the images in which something was found; near: within {NEAR:g} of the {near}.</p>
"""


def _class(report: Report, sample: Sample, one: Class) -> str:
    name = escape_text(one.name, NAMES)
    masks = sample.kind.has_masks
    mark = dot(report.colors.get(one.name, ACCENT)) if masks else ""
    what = "largest probability" if masks else "probability"
    of = f"{sum(one.scores):,} images"
    if sample.kind.table == "annotations":
        of += " that have it"
    line = None if math.isnan(one.threshold) else one.threshold
    caption = f"{what} of {name} in {of}; heights are square roots"
    if line is not None:
        caption += f"; the line is the threshold, {line:.2f}"
    groups = []
    for order, some in report.chosen.get(one.name, {}).items():
        if not some:
            continue
        meaning = _MEANINGS[order]
        if not masks:
            meaning = meaning.replace("the threshold", "another label").replace(", of those", ", ")
            meaning = meaning.replace("random,  found", "random")
        cells = "".join(_shown(report, one.name, candidate, masks=masks) for candidate in some)
        groups.append(f"<div><h4>{meaning}</h4>\n<ol>\n{cells}</ol></div>")
    return f"""<h3>{mark}{name}</h3>
<div class="plots">{histogram(caption, one.scores, (0.0, 1.0), limit=line)}</div>
<div class="groups">{"".join(groups)}</div>
"""


def _shown(report: Report, name: str, one: Candidate, *, masks: bool) -> str:
    shown = Shown(name, (one.shard, one.row))
    row = report.rows.get(shown)
    key = row.key if row else f"row {one.row}"
    share = describe_share(one.share) if masks else ""
    found = report.pictures.get(shown, "not available")
    alt = f"{name[:NAMES]} in {key[:_KEY]}: p {one.score:.2f}{', ' if share else ''}{share}"
    inside = missing(found) if isinstance(found, str) else picture(found, alt)
    return cell(inside, key[:_KEY], "", (f"p {one.score:.2f}", share), zoom=True)


def _table(sample: Sample) -> str:
    masks = sample.kind.has_masks
    columns = [("image", True), ("class", True), ("score", False)]
    columns += [("% of the image", False)] if masks else []
    columns += [("shard", True), ("row", False)]
    rows = []
    for one in sample.table:
        cells = [one.key, one.name, f"{one.score:.3f}"]
        cells += [f"{100 * one.share:.2f}"] if masks else []
        rows.append([*cells, one.shard, str(one.row)])
    every = sum(c.found for c in sample.classes)
    said = (
        f"{len(rows):,} rows of an image and class, drawn by chance from {every:,} in which "
        "something was found"
        if len(rows) == TABLE_ROWS
        else f"All {len(rows):,} rows of an image and class"
    )
    return f"<p>{said}; the heads sort.</p>\n" + sortable_table("table of images", columns, rows)


def _vectors(report: Report, sample: VectorSample) -> str:
    low, middle, high = sample.lengths
    facts = (
        f"A sample: {sample.vectors:,} vectors of {sample.dimension:,} dimensions, the first of "
        f"row groups in {sample.shards:,} of {sample.of_shards:,} shards. Lengths {low:.4f} to "
        f"{high:.4f}, in the middle {middle:.4f}."
    )
    if sample.bad:
        facts += f" {sample.bad:,} are zero or not finite."
    plots = [
        histogram("cosines of random pairs; heights are square roots", sample.pairs, sample.span),
        histogram("cosine of each image to its nearest other", sample.nearest, sample.span),
    ]
    if sample.texts:
        plots.append(
            histogram("cosine of each image to its own text", sample.texts, sample.text_span)
        )
    parts = [f"<p>{facts}</p>", *map(_unread, sample.unread[:5])]
    parts.append(f'<div class="plots">{"".join(plots)}</div>')
    if sample.neighbours:
        parts.append("<h3>Images, each in front of its nearest others in the sample</h3>")
        rows = "".join(_near(report, some) for some in sample.neighbours)
        parts.append(f'<div class="groups">{rows}</div>')
        parts.append("<h3>The closest pairs of the sample</h3>")
        rows = "".join(_near(report, some) for some in sample.closest)
        parts.append(f'<div class="groups pairs">{rows}</div>')
    return "\n".join(parts)


def _near(report: Report, some: Sequence[Neighbour]) -> str:
    cells = []
    for i, one in enumerate(some):
        found = report.thumbnails.get((one.shard, one.row), "not available")
        said = f"{one.cosine:.4f}" if i else ""
        alt = f"{one.key[:_KEY]}{f', cosine {said}' if i else ''}"
        inside = missing(found) if isinstance(found, str) else picture(found, alt)
        cells.append(cell(inside, one.key[:_KEY], said, zoom=True))
    kind = ' class="pair"' if len(some) == 2 else ""
    return f"<ol{kind}>\n{''.join(cells)}</ol>"


def _errors(report: Report) -> str:
    failures = report.failures
    parts = []
    for reason, count in failures.reasons.most_common():
        meaning = escape_text(REASONS.get(reason, "of another version"))
        items = []
        for one in failures.first[reason]:
            where = f"{one.shard}, row {one.row}" if one.row is not None else "the shard"
            detail = f": {escape_text(one.detail, 200)}" if one.detail else ""
            items.append(f"<li>{escape_text(one.name)} ({escape_text(where, 120)}){detail}</li>")
        more = "<li>...</li>" if count > len(items) else ""
        parts.append(
            f"<h3>{escape_text(reason)}: {count:,}</h3>\n<p>{meaning}</p>\n"
            f"<ul>{''.join(items)}{more}</ul>"
        )
    if failures.unread:
        parts.append(f"<p>And those of {failures.unread:,} more shards with failures.</p>")
    if not parts:
        return "<p>No image failed in a finished shard.</p>\n"
    if failures.retryable:
        parts.append(f"<p>{failures.retryable:,} may work another time: retry-failed.</p>")
    return "\n".join(parts)


def _speed(report: Report) -> str:
    record = report.record
    last = record.get("throughput", {})
    facts = {"started": record.get("started_at", "?")}
    if "finished_at" in record:
        facts["finished"] = record["finished_at"]
    if last.get("images"):
        facts["last command"] = (
            f"{last['images']:,} images in {last['seconds']:,.1f} s, "
            f"{last['images_per_s']:,.1f} images/s"
        )
    if size := record.get("input", {}).get("bytes"):
        facts["input"] = f"{size:,} bytes"
    workers = record.get("config", {}).get("workers", {})
    facts["device"] = f"{workers.get('device', '?')}{', one process' * bool(workers.get('local'))}"
    return _facts(facts) + _stages(last)


def _stages(last: Mapping[str, Any]) -> str:
    """Each stage's busy seconds, and its images in one of them."""
    stages, images = last.get("stages"), last.get("images")
    if not isinstance(stages, dict) or not images:
        return ""
    every = sum(stages.values()) or 1.0
    lines = "".join(
        f'<tr><th scope="row">{escape_text(str(name), 80)}</th><td>{busy:,.2f} s</td>'
        f"<td>{share_bar(busy / every)}</td><td>{images / busy:,.1f}</td></tr>\n"
        for name, busy in list(stages.items())[:_FACTS]
        if busy > 0
    )
    return f"""<div class="scroll" role="region" aria-label="speed of stages" tabindex="0">
<table><thead><tr><th scope="col">stage</th><th scope="col">busy</th>
<td aria-hidden="true"></td><th scope="col">images a second of it</th></tr></thead><tbody>
{lines}</tbody></table></div>
<p>Busy seconds of all processes together: the stages run beside each other.</p>
"""


def _configuration(report: Report) -> str:
    record = report.record
    decides = record.get("fingerprint", {})
    facts: dict[str, Any] = {"model": record.get("config", {}).get("model")}
    for name in ("weights_hash", "tokenizer_hash", "dtype"):
        facts[name] = decides.get(name)
    facts |= _flat(record.get("config", {}))
    if decides.get("prompts"):
        facts["prompts of the run"] = ", ".join(map(str, decides["prompts"][:50]))
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
    return _facts(facts)


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        elif value not in (None, [], "", False):
            found[f"{before}{name}"] = value
    return found


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [
        f"<dt>{escape_text(str(name), 60)}</dt><dd>{escape_text(_text(value))}</dd>"
        for name, value in list(facts.items())[:_FACTS]
        if value not in (None, "")
    ]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>\n"


def _text(value: Any) -> str:
    return ", ".join(map(str, value[:50])) if isinstance(value, list) else str(value)
