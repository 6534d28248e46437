"""Hits of a search -> one HTML page with thumbnails, which needs nothing beside itself.

The images come from the shards of the run that made the table. Only shards with hits are read,
each once and no further than its last hit. Keys, shards and queries are hostile: all text is
escaped, and the page's policy lets nothing load but its own style and thumbnails, and
nothing run.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from pipeline import storage
from pipeline.embeddings.search import Hit
from pipeline.errors import CredentialsError, PipelineError, RowError, UsageError, one_line
from pipeline.prepare.images import decode_image
from pipeline.read.shard import Sample
from pipeline.read.wanted import read_rows
from pipeline.run.images import Images, find_images, find_shards, is_unchanged

THUMBNAIL_PX = 320  # the longer side
MOST_THUMBNAILS = 5000  # of a page: about 100 MB
SHARDS_AT_ONCE = 4

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
p {{ margin: 0 0 18px; color: var(--faded) }}
ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 22px 16px;
  margin: 0; padding: 0; list-style: none }}
li {{ min-width: 0 }}
.cell {{ display: flex; align-items: center; justify-content: center; aspect-ratio: 1;
  overflow: hidden; border-radius: 6px; background: var(--cell); color: var(--faded);
  text-align: center }}
.cell img {{ width: 100%; height: 100%; object-fit: contain }}
.cell span {{ padding: 16px; text-wrap: balance }}
.line {{ display: flex; justify-content: space-between; gap: 10px; white-space: nowrap }}
.line :first-child {{ overflow: hidden; text-overflow: ellipsis }}
.line :last-child {{ font-variant-numeric: tabular-nums }}
.cell + .line {{ margin-top: 7px }}
.line + .line {{ color: var(--faded); font-size: 12.5px }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def open_gallery(output: str, thumbnails: int) -> Images:
    """Find the images of the run in the folder `output`, for a page of so many thumbnails.

    Raises UsageError where the run's record is not to be found, or the page would be too large.
    """
    if thumbnails > MOST_THUMBNAILS:
        raise UsageError(
            f"--gallery: {thumbnails:,} images are too many for a page, at most {MOST_THUMBNAILS:,}"
            ": lower --top, or give fewer queries"
        )
    try:
        return find_images(output)
    except UsageError as error:
        raise UsageError(f"--gallery: {error}") from error


def write_gallery(
    file: str, queries: Sequence[str], hits: Sequence[Sequence[Hit]], images: Images
) -> None:
    """Write the page of the hits of each query into an HTML file. Raises StorageError."""
    wanted = {(hit.shard, hit.row) for found in hits for hit in found}
    page = draw_gallery(queries, hits, read_thumbnails(images, wanted))
    storage.write_bytes(storage.check_uri(file), page.encode())


def draw_gallery(
    queries: Sequence[str],
    hits: Sequence[Sequence[Hit]],
    thumbnails: dict[tuple[str, int], bytes | str],
) -> str:
    """The page; `thumbnails` are JPEG files, or say why there is none, by shard and row."""
    sections = []
    for query, found in zip(queries, hits, strict=True):
        cells = [_cell(rank, hit, thumbnails) for rank, hit in enumerate(found, 1)]
        count = f"{len(found):,} nearest, by cosine" if found else "nothing found"
        sections.append(f"<h1>{_text(query)}</h1>\n<p>{count}</p>\n<ol>\n{''.join(cells)}</ol>")
    title = _text(queries[0]) if len(queries) == 1 else f"{len(queries):,} queries"
    return _PAGE.format(title=title, body="\n".join(sections))


def read_thumbnails(
    images: Images, wanted: set[tuple[str, int]]
) -> dict[tuple[str, int], bytes | str]:
    """JPEG thumbnails of the wanted (shard, row)s; for each that cannot be had, the reason.

    Raises CredentialsError: that is no fault of an image.
    """
    try:
        shards = find_shards(images)
    except CredentialsError:
        raise
    except PipelineError:
        return dict.fromkeys(wanted, "the input is not there any more")
    rows: dict[str, set[int]] = {}
    for shard, row in wanted:
        rows.setdefault(shard, set()).add(row)

    def read(name: str) -> dict[tuple[str, int], bytes | str]:
        found: dict[int, bytes | str] = dict.fromkeys(rows[name], "not in its shard any more")
        if name not in shards:
            found = dict.fromkeys(rows[name], "the shard is not there any more")
        elif not is_unchanged(images, shards[name]):
            found = dict.fromkeys(rows[name], "the shard has changed since")
        else:
            for row, sample in read_rows(shards[name], rows[name]):
                found[row] = _thumbnail(sample, images.max_pixels)
        return {(name, row): thumbnail for row, thumbnail in found.items()}

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        return {k: v for found in pool.map(read, sorted(rows)) for k, v in found.items()}


def _thumbnail(sample: Sample, max_pixels: int) -> bytes | str:
    """A JPEG, or why there is none."""
    if sample.reason:
        return "the image cannot be read any more"
    try:
        image = decode_image(sample.image, max_pixels=max_pixels).image
    except RowError:
        return "the image cannot be decoded"
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return file.getvalue()


def _cell(rank: int, hit: Hit, thumbnails: dict[tuple[str, int], bytes | str]) -> str:
    thumbnail = thumbnails.get((hit.shard, hit.row), "not available")
    if isinstance(thumbnail, str):
        inside = f"<span>{_text(thumbnail)}</span>"
    else:
        data = base64.b64encode(thumbnail).decode()
        inside = f'<img src="data:image/jpeg;base64,{data}" alt="{_text(hit.key)}">'
    key, shard = _text(hit.key), _text(hit.shard)
    return f"""<li>
<div class="cell">{inside}</div>
<div class="line"><span title="{key}">{rank}.&ensp;<bdi>{key}</bdi></span>
<span>{hit.cosine:.4f}</span></div>
<div class="line"><span title="{shard}"><bdi>{shard}</bdi></span><span>row {hit.row}</span></div>
</li>
"""


def _text(text: str) -> str:
    return html.escape(one_line(text))
