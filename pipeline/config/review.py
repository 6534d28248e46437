"""Options of `clipseg-ray review`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.config.export import ExportConfig
from pipeline.config.options import check_file, check_positive
from pipeline.config.view import MOST_IMAGES
from pipeline.errors import UsageError
from pipeline.storage import check_uri, join


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """Choose the images of labels that are worth a person's time, and hand them to a tool."""

    labels: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LABELS")]
    """The OUTPUT of clipseg-ray label, whose RUN still has its probability maps; local or s3://."""

    top: Annotated[int, tyro.conf.arg(metavar="N")] = 200
    """Images to choose."""

    format: Literal["html", "labelstudio", "cvat"] = "html"
    """A page to look at, or the images and their labels for a tool to correct them in."""

    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "review"
    """Where to write review.parquet, with the criteria of every image, and the chosen images below
    it; local or s3://."""

    duplicates: Annotated[str | None, tyro.conf.arg(metavar="PARQUET")] = None
    """Choose one image of each group in the --output of clipseg-ray duplicates. By default groups
    are found where the RUN has embeddings."""

    images: Literal["none", "copy", "upright"] = "copy"
    """As clipseg-ray export has it, for --format labelstudio and cvat."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display, only the last lines."""

    def __post_init__(self) -> None:
        check_positive(self, "top")
        for option in ("labels", "output", "duplicates"):
            check_file("LABELS" if option == "labels" else f"--{option}", getattr(self, option))
        if self.format == "html" and self.top > MOST_IMAGES:
            raise UsageError(f"--top {self.top}: at most {MOST_IMAGES:,} images on a page")
        if self.format == "html" and self.images != "copy":
            raise UsageError(f"--images {self.images}: a page always has its images; leave it out")

    def export(self) -> ExportConfig:
        """The export of the chosen images; with --format labelstudio or cvat."""
        if self.format == "html":
            raise ValueError("a page is no export")
        dest = join(check_uri(self.output), self.format)
        return ExportConfig(labels=self.labels, dest=dest, format=self.format, images=self.images)
