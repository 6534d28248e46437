"""Configuration of `clipseg-ray report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.config.options import check_file


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a page about a run, finished or not: counts, classes, pictures, errors, speed."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The OUTPUT of segment, label, embed or classify, local or s3://."""

    output: Annotated[str | None, tyro.conf.arg(metavar="HTML")] = None
    """The page, local or s3://; RUN/report/index.html if not given."""

    input_moved_to: Annotated[str | None, tyro.conf.arg(metavar="INPUT")] = None
    """Where the input of the run is now, if it is not where it was."""

    def __post_init__(self) -> None:
        check_file("--output", self.output)
        check_file("--input-moved-to", self.input_moved_to)
