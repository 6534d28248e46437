"""Group near-duplicate images in a table of embeddings.

    python -m jobs.duplicates EMBEDDINGS --cosine 0.97 --output duplicates.parquet \\
        --gallery duplicates.html

EMBEDDINGS is the output of `clipseg-ray embed`. `clipseg-ray duplicates` is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from pipeline.config.command import run_command
from pipeline.config.search import DuplicatesConfig
from pipeline.embeddings.duplicates import DUPLICATES, find_duplicates
from pipeline.embeddings.duplicates_page import write_duplicates
from pipeline.embeddings.gallery import open_gallery
from pipeline.embeddings.results import show_groups, write_parquet
from pipeline.embeddings.vectors import open_table, warn_of_missing_rows


def duplicates(config: DuplicatesConfig) -> None:
    """Open the table -> compare blocks of rows -> groups -> show, Parquet, gallery."""
    table = open_table(config.embeddings)
    warn_of_missing_rows(table)
    images = open_gallery(table.output) if config.gallery else None
    console = Console(stderr=True)
    hidden = config.quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("comparing", total=1.0)
        found = find_duplicates(
            table, config.cosine, on_progress=lambda done: progress.update(bar, completed=done)
        )
    if not config.quiet and found.rows:
        show_groups(found.read(), found.rows)
    if config.output:
        write_parquet(config.output, found.read(), DUPLICATES)
        print(f"  {config.output}")
    if config.gallery and images:
        write_duplicates(config.gallery, found, config.cosine, images)
        print(f"  {config.gallery}")
    print(
        f"{found.rows:,} of {len(found.roots):,} rows are in {len(found.sizes):,} groups of "
        f"near-duplicates; with one row kept of each, {found.kept:,} remain"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(DuplicatesConfig, duplicates, "clipseg-ray duplicates", argv)


if __name__ == "__main__":
    sys.exit(main())
