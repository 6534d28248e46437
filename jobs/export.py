"""Export labels in the format of an annotation tool or a trainer.

    python -m jobs.export LABELS DEST --format coco --split train=0.8,val=0.2

LABELS is the output of `clipseg-ray label`. `clipseg-ray export` is the same. It runs in this
process, without Ray; docs/exports.md tells what each format keeps and loses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from pipeline.annotations.export import describe_export, export_labels
from pipeline.config.command import run_command
from pipeline.config.export import ExportConfig


def export(config: ExportConfig) -> None:
    """Read labels and images side by side -> splits and file names -> the files of a format."""
    console = Console(stderr=True)
    hidden = config.quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("exporting", total=None)
        account = export_labels(
            config, lambda total: progress.update(bar, advance=1, total=total or None)
        )
    print(describe_export(config, account))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ExportConfig, export, "clipseg-ray export", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
