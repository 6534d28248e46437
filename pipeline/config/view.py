"""Configuration of `clipseg-ray view`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.config.options import check_file, check_positive
from pipeline.errors import UsageError

MOST_IMAGES = 1000  # of a page: about 100 MB


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Write a page with images of a run and their masks, for a browser."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The OUTPUT of clipseg-ray segment, local or s3://."""

    image: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """Show the images of this key alone."""

    prompt: Annotated[str | None, tyro.conf.arg(metavar="PROMPT")] = None
    """Show the masks of this prompt alone."""

    sort: Literal["score", "area", "uncertain"] = "score"
    """Images first with the largest probability, with the largest share of the image, or with a
    largest probability near the threshold."""

    text_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Caption to show with each image: a column of Parquet, a field of the .json beside it, or the
    .txt."""

    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 24
    """Images on the page."""

    output: Annotated[str, tyro.conf.arg(metavar="HTML")] = "view.html"
    """The page, local or s3://."""

    input_moved_to: Annotated[str | None, tyro.conf.arg(metavar="INPUT")] = None
    """Where the input of the run is now, if it is not where it was."""

    def __post_init__(self) -> None:
        check_positive(self, "limit")
        if self.limit > MOST_IMAGES:
            raise UsageError(f"--limit {self.limit}: at most {MOST_IMAGES:,} images on a page")
        check_file("--output", self.output)
        check_file("--input-moved-to", self.input_moved_to)
