"""The shell of a page: one HTML file that loads nothing, and in which nothing runs.

Names are whatever the data holds: all text is escaped, and the page's policy lets nothing load but
its own style and its own pictures.
"""

from __future__ import annotations

import base64
import html

from pipeline.errors import one_line

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark;
  --paper: #fff; --ink: #202226; --faded: #6b7078; --cell: #eef0f2 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #17191c; --ink: #e7e9ec; --faded: #9aa0a9; --cell: #26292e }}
}}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 28px; max-width: 1480px; background: var(--paper);
  color: var(--ink); font: 14px/1.4 system-ui, sans-serif }}
h1 {{ margin: 0 0 4px; font-size: 22px; font-weight: 600; overflow-wrap: anywhere }}
h1:not(:first-child) {{ margin-top: 48px }}
h2 {{ margin: 36px 0 2px; font-size: 16px; font-weight: 600; overflow-wrap: anywhere }}
p {{ margin: 0 0 18px; color: var(--faded); overflow-wrap: anywhere }}
h2 + p {{ margin-bottom: 10px }}
dl {{ display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px;
  margin: 10px 0 0 }}
dt {{ color: var(--faded) }}
dd {{ margin: 0; overflow-wrap: anywhere }}
ol {{ display: grid; gap: 22px 16px; margin: 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(200px, calc(50% - 8px)), 1fr)) }}
li {{ min-width: 0 }}
.cell {{ display: flex; align-items: center; justify-content: center; aspect-ratio: 1;
  overflow: hidden; border-radius: 6px; background: var(--cell); color: var(--faded);
  text-align: center }}
.cell img {{ width: 100%; height: 100%; object-fit: contain }}
.cell span {{ padding: 16px; text-wrap: balance }}
.dot {{ display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 5px }}
.line {{ display: flex; justify-content: space-between; gap: 10px; white-space: nowrap }}
.line :first-child {{ overflow: hidden; text-overflow: ellipsis }}
.line :last-child {{ font-variant-numeric: tabular-nums }}
.cell + .line {{ margin-top: 7px }}
.line + .line {{ color: var(--faded); font-size: 12.5px }}
@media (max-width: 500px) {{ body {{ padding: 16px }} ol {{ gap: 16px }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def make_page(title: str, body: str) -> str:
    """A page; `title` is text, `body` HTML."""
    return _PAGE.format(title=escape_text(title), body=body)


def escape_text(text: str, characters: int = 300) -> str:
    """At most so many printable characters, escaped for an element or an attribute."""
    return html.escape(one_line(text, characters))


def picture(jpeg: bytes, alt: str) -> str:
    """An element of a JPEG inside the page."""
    data = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape_text(alt)}">'
