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

from pipeline import storage
from pipeline.annotations.export import Account, export_labels
from pipeline.annotations.labelled import read_classes
from pipeline.config.command import run_command
from pipeline.config.export import ExportConfig
from pipeline.errors import one_line


def export(config: ExportConfig) -> None:
    """Read labels and images side by side -> splits and file names -> the files of a format."""
    console = Console(stderr=True)
    hidden = config.quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("exporting", total=None)
        account = export_labels(
            config, lambda total: progress.update(bar, advance=1, total=total or None)
        )
    print(summary(config, account))


def summary(config: ExportConfig, account: Account) -> str:
    """Lines for the user of an export: counts, losses, and how to open it."""
    lines = [
        f"{account.images:,} images ({account.empty:,} without annotations), "
        f"{account.annotations:,} annotations -> {storage.check_uri(config.dest)}"
    ]
    if len(account.of_split) > 1:
        splits = ", ".join(f"{name} {count:,}" for name, count in account.of_split.items())
        lines.append(f"images of each split: {splits}")
    names = [c.name for c in read_classes(storage.check_uri(config.labels))]
    if without := [n for n, count in zip(names, account.of_class, strict=True) if not count]:
        lines.append(f"warning: no annotations of {', '.join(without)}")
    if account.turned and config.images == "copy":
        lines.append(
            f"warning: {account.turned:,} images are turned by their EXIF orientation, and their "
            "masks are upright: for readers that do not turn them, Pillow's, --images upright"
        )
    return "\n  ".join(one_line(line, 1000) for line in [*lines, *account.lines])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ExportConfig, export, "clipseg-ray export", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
