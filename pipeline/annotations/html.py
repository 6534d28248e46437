"""The shell of every page: one HTML file, self-contained, with at most a script of ours.

Names are whatever the data holds: all text is escaped, and the page's policy lets in no other style
and script than those of these hashes, and no pictures but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import html

from pipeline.errors import one_line

# Contrast of text is at least 4.5 in both schemes, also on cells.
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #202226; --faded: #5c6169;
  --cell: #eef0f2; --line: #d5d8dc; --bar: #a3abb5; --mark: #c4006a }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17191c; --ink: #e7e9ec; --faded: #a4aab3; --cell: #26292e; --line: #3a3f46;
    --bar: #646d78; --mark: #ff6db5 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 28px; max-width: 1480px; background: var(--paper);
  color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
h1, h2, h3, h4 { font-weight: 600; overflow-wrap: anywhere }
h1 { margin: 0 0 4px; font-size: 22px }
h1:not(:first-child) { margin-top: 48px }
h2 { margin: 40px 0 2px; font-size: 17px }
h3 { margin: 30px 0 6px; font-size: 15px }
h4 { margin: 18px 0 8px; font-size: 13px; color: var(--faded) }
p, ul { margin: 0 0 16px; color: var(--faded); overflow-wrap: anywhere }
ul { padding-left: 20px }
h2 + p { margin-bottom: 10px; max-width: 90ch }
a { color: inherit }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px;
  margin: 10px 0 0 }
dt { color: var(--faded) }
dd { margin: 0; overflow-wrap: anywhere }
ol { display: grid; gap: 22px 16px; margin: 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(200px, calc(50% - 8px)), 1fr)) }
li { min-width: 0 }
.cell { display: flex; align-items: center; justify-content: center; aspect-ratio: 1; width: 100%;
  overflow: hidden; border: 0; padding: 0; border-radius: 6px; background: var(--cell);
  color: var(--faded); font: inherit; text-align: center }
.cell img { width: 100%; height: 100%; object-fit: contain }
.cell span { padding: 16px; text-wrap: balance }
button.cell { cursor: zoom-in }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 6px }
.line { display: flex; justify-content: space-between; gap: 10px; white-space: nowrap }
.line :first-child { overflow: hidden; text-overflow: ellipsis }
.line :last-child { font-variant-numeric: tabular-nums }
.cell + .line { margin-top: 7px }
.line + .line { color: var(--faded); font-size: 12.5px }
.kept { color: var(--mark); font-weight: 600 }
.scroll { overflow-x: auto }
.scroll + p { margin-top: 8px }
dl + .scroll { margin-top: 18px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--line) }
th, td { vertical-align: baseline }
th { font-weight: 600 }
thead th { vertical-align: bottom }
th:first-child, .text { text-align: left }
th:first-child, td.text { min-width: 130px; max-width: 260px; overflow-wrap: anywhere }
tr.all { font-weight: 600 }
th button { border: 0; padding: 0; background: none; color: inherit; font: inherit;
  cursor: pointer; text-decoration: underline dotted; text-underline-offset: 3px }
[aria-sort="ascending"] button::after { content: " \\2191" }
[aria-sort="descending"] button::after { content: " \\2193" }
.tall { max-height: 560px; overflow: auto }
.tall thead th { position: sticky; top: 0; background: var(--paper) }
.filter { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; margin: 10px 0 }
input, select { max-width: 100%; border: 1px solid var(--bar); border-radius: 4px; padding: 3px 6px;
  background: var(--paper); color: var(--ink); font: inherit }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(150px, calc(50% - 5px)), 1fr));
  gap: 10px; margin: 18px 0 }
.cards div { padding: 10px 14px; border-radius: 6px; background: var(--cell) }
.cards dd { font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr));
  gap: 0 36px }
.groups ol { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 14px }
.groups ol.pair { grid-template-columns: repeat(2, minmax(0, 1fr)) }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)) }
.groups > ol { margin-bottom: 18px }
.plots { display: flex; flex-wrap: wrap; gap: 20px }
figure { margin: 0 }
figcaption { color: var(--faded); font-size: 12.5px }
.plots svg { display: block; width: 240px; max-width: 100%; height: auto }
.plots svg.wide { width: 420px }
svg.share { display: inline-block; width: 90px; height: 8px; background: var(--cell) }
.axis { fill: none; stroke: var(--line) }
.even { stroke: var(--line); stroke-dasharray: 3 3 }
.curve { fill: none; stroke: var(--mark); stroke-width: 2 }
.point, .over { fill: var(--mark) }
.under { fill: var(--bar) }
.limit { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 2 }
svg text { fill: var(--faded); font-size: 10px }
dialog { max-width: 96vw; max-height: 96vh; border: 0; border-radius: 8px; padding: 14px;
  background: var(--paper); color: var(--ink) }
dialog::backdrop { background: #000a }
dialog img { display: block; width: 82vmin; max-width: 100%; max-height: 76vh;
  object-fit: contain; margin-bottom: 10px }
dialog button { border: 1px solid var(--bar); border-radius: 4px; padding: 4px 14px;
  background: var(--cell); color: inherit; font: inherit }
@media (max-width: 500px) {
  body { padding: 16px }
  ol, .groups ol { gap: 14px 12px }
  .groups ol { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  th, td { padding: 4px 7px }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{script}</body>
</html>
"""


def make_page(title: str, body: str, *, script: str = "") -> str:
    """A page; `title` is text, `body` HTML, `script` one of ours: no word of it from the data."""
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
    policy += f"style-src '{_hash(_STYLE)}'"
    if script:
        policy += f"; script-src '{_hash(script)}'"
        script = f"<script>{script}</script>\n"
    title = escape_text(title)
    return _PAGE.format(policy=policy, title=title, style=_STYLE, body=body, script=script)


def _hash(text: str) -> str:
    """A source of a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def escape_text(text: str, characters: int = 300) -> str:
    """At most so many printable characters, escaped for an element or an attribute."""
    return html.escape(one_line(text, characters))


def picture(jpeg: bytes, alt: str) -> str:
    """An element of a JPEG inside the page."""
    data = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape_text(alt)}">'


def missing(why: str) -> str:
    """An element in the place of a picture."""
    return f"<span>{escape_text(why)}</span>"


def dot(color: str) -> str:
    """A round mark of a colour: #rrggbb, or whatever the data holds."""
    circle = f'<circle cx="5" cy="5" r="5" fill="{escape_text(color)}"/>'
    return f'<svg class="dot" viewBox="0 0 10 10" aria-hidden="true">{circle}</svg>'


def cell(
    inside: str,
    title: str,
    beside: str = "",
    *below: tuple[str, str],
    before: str = "",
    zoom: bool = False,
    strong: bool = False,
) -> str:
    """An item of a list: `inside`, a picture or why it is missing, above lines of text.

    `before`: HTML in front of the title. `zoom`: the script (see script.ZOOM) enlarges the picture.
    `strong`: what stands beside the title is marked.
    """
    holder = 'button type="button"' if zoom and inside.startswith("<img") else "div"
    lines = "".join(
        f'<div class="line"><span title="{escape_text(one)}"><bdi>{escape_text(one)}</bdi></span>'
        f"<span>{escape_text(other)}</span></div>\n"
        for one, other in below
    )
    title, mark = escape_text(title), ' class="kept"' if strong else ""
    return f"""<li>
<{holder} class="cell">{inside}</{holder.partition(" ")[0]}>
<div class="line"><span title="{title}">{before}<bdi>{title}</bdi></span>
<span{mark}>{escape_text(beside)}</span></div>
{lines}</li>
"""
