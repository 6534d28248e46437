"""Hits of a search -> one self-contained HTML page with thumbnails.

The images come from the shards of the run behind the table. Only shards with hits are read,
each once and no further than its last hit. Keys, shards and queries are hostile: all text is
escaped, and the page's policy lets nothing load but its own style and thumbnails, and
nothing run.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from pipeline import storage
from pipeline.annotations.html import cell, escape_text, make_page, missing, picture
from pipeline.embeddings.search import Hit
from pipeline.errors import UsageError
from pipeline.run.images import Images, find_images
from pipeline.run.wanted_images import read_wanted

THUMBNAIL_PX = 320  # the longer side
MOST_THUMBNAILS = 5000  # of a page: about 100 MB


def open_gallery(output: str, thumbnails: int = 0) -> Images:
    """Find the images of the run in the folder `output`, for a page of so many thumbnails.

    Raises UsageError if the run's record is missing, or the page would be too large.
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
        sections.append(
            f"<h1>{escape_text(query)}</h1>\n<p>{count}</p>\n<ol>\n{''.join(cells)}</ol>"
        )
    title = queries[0] if len(queries) == 1 else f"{len(queries):,} queries"
    return make_page(title, "\n".join(sections))


def read_thumbnails(
    images: Images, wanted: set[tuple[str, int]]
) -> dict[tuple[str, int], bytes | str]:
    """JPEG thumbnails of the wanted (shard, row)s; for each unavailable one, the reason.

    Raises CredentialsError, no fault of an image.
    """
    return read_wanted(images, wanted, _thumbnail)


def _thumbnail(place: tuple[str, int], image: Image.Image) -> bytes:
    """A JPEG."""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return file.getvalue()


def show_thumbnail(
    place: tuple[str, int], key: str, thumbnails: dict[tuple[str, int], bytes | str]
) -> str:
    """The element of a thumbnail, or why there is none."""
    found = thumbnails.get(place, "not available")
    return missing(found) if isinstance(found, str) else picture(found, key)


def _cell(rank: int, hit: Hit, thumbnails: dict[tuple[str, int], bytes | str]) -> str:
    inside = show_thumbnail((hit.shard, hit.row), hit.key, thumbnails)
    below = (hit.shard, f"row {hit.row}")
    return cell(inside, hit.key, f"{hit.cosine:.4f}", below, before=f"{rank}.&ensp;")
