"""Options of the commands on a table of embeddings: index, search, duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.config.options import check_file, read_lines
from pipeline.errors import UsageError

_Embeddings = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EMBEDDINGS")]


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Build a vector index of a table of embeddings; `clipseg-ray search DEST` then uses it."""

    embeddings: _Embeddings
    """A run's OUTPUT folder, or the folder embeddings/ in it; local or s3://."""

    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")]
    """Folder of the index; local or s3://."""

    column: Literal["vector", "text_vector"] = "vector"
    """Embeddings to index: of the images, or of their texts."""

    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the index in DEST, if there is one."""

    recall: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Measure the index: search for N rows of the table by the index and exactly, then print
    recall@10 (the share found of the ten nearest other rows) and the time of a query by each."""

    def __post_init__(self) -> None:
        if self.recall < 0:
            raise UsageError(f"--recall {self.recall}: must be at least 0")
        check_file("DEST", self.dest)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Find the rows of a table of embeddings nearest to texts and images, by cosine."""

    embeddings: _Embeddings
    """A run's OUTPUT folder, or the folder embeddings/ in it, or the DEST of clipseg-ray index;
    local or s3://."""

    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to look for. All texts, images and keys add up to one query; one given twice counts
    twice."""

    image: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE")] = ()
    """Image to look for; local or s3://."""

    like: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY")] = ()
    """Key of an image of the table to look for; needs no model."""

    minus: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to subtract from the query."""

    queries: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with one query a line; all are answered in one pass."""

    top: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Rows to find for each query."""

    column: Literal["vector", "text_vector"] = "vector"
    """Embeddings to compare with: of the images, or of their texts."""

    model: str | None = None
    """Place of the table's model, if it has moved; other weights are refused."""

    output: Annotated[str | None, tyro.conf.arg(metavar="PARQUET")] = None
    """Write the results into this Parquet file."""

    gallery: Annotated[str | None, tyro.conf.arg(metavar="HTML")] = None
    """Write a page with the found images into this HTML file."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Nothing on the terminal, only --output and --gallery."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"--top {self.top}: must be at least 1")
        if not self.text and not self.image and not self.like:
            if self.minus:
                raise UsageError("--minus: give a --text, --image or --like to subtract it from")
            if self.queries is None:
                raise UsageError(
                    'nothing to look for: give --text "...", --image, --like or --queries'
                )
        for name in ("text", "image", "like", "minus"):
            if any(not value.strip() for value in getattr(self, name)):
                raise UsageError(f"--{name}: it is empty; say what to look for")
        if self.quiet and self.output is None and self.gallery is None:
            raise UsageError("--quiet: would show nothing at all; add --output or --gallery")
        for image in self.image:
            check_file("--image", image)
        check_file("--output", self.output)
        check_file("--gallery", self.gallery)

    def lines(self) -> list[str]:
        """The queries of --queries. Raises UsageError for a file without any."""
        return [] if self.queries is None else read_lines(self.queries, "--queries", "queries")


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Group near-duplicate images in a table of embeddings."""

    embeddings: _Embeddings
    """A run's OUTPUT folder, or the folder embeddings/ in it; local or s3://."""

    cosine: float = 0.97
    """Smallest cosine of near-duplicates; 0 to 1. Groups are connected components of such pairs, so
    the ends of a group may be further apart."""

    output: Annotated[str | None, tyro.conf.arg(metavar="PARQUET")] = None
    """Write all groups into this Parquet file."""

    gallery: Annotated[str | None, tyro.conf.arg(metavar="HTML")] = None
    """Write a page of up to 200 groups, the least alike first, into this HTML file: images side by
    side, with the one that would be kept."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display and no groups on the terminal, only the last line."""

    def __post_init__(self) -> None:
        if not 0 <= self.cosine <= 1:
            raise UsageError(f"--cosine {self.cosine}: must be between 0 and 1")
        check_file("--output", self.output)
        check_file("--gallery", self.gallery)
