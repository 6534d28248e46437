"""Choose the images of labels worth a person's time.

    python -m jobs.review LABELS --top 200 --format labelstudio --output review

LABELS is the output of `clipseg-ray label`. `clipseg-ray review` is the same. It runs in this
process, without Ray, model and torch; docs/review.md names the criteria.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from pipeline import storage
from pipeline.annotations.export import Only, describe_export, export_labels
from pipeline.annotations.kept_maps import KeptMaps, open_kept_maps
from pipeline.annotations.labelled import open_labels
from pipeline.annotations.review import Review, review_labels
from pipeline.annotations.review_page import draw_review
from pipeline.annotations.splits import Groups, read_groups
from pipeline.annotations.worth import CRITERIA
from pipeline.config.command import run_command
from pipeline.config.review import ReviewConfig
from pipeline.config.search import DuplicatesConfig
from pipeline.embeddings.duplicates import DUPLICATES, find_duplicates
from pipeline.embeddings.results import write_parquet
from pipeline.embeddings.vectors import open_table
from pipeline.errors import UsageError, one_line


def review(config: ReviewConfig) -> None:
    """Read the kept maps of the labels -> criteria -> ranks -> a page, or an export."""
    labels, folder = storage.check_uri(config.labels), storage.check_uri(config.output)
    record, _ = open_labels(labels)
    kept = open_kept_maps(str(record.get("config", {}).get("input")))
    file = storage.join(folder, "review.parquet")
    if not storage.is_empty(folder) and not storage.is_file(file):
        raise UsageError(
            f"--output {folder}: holds files that are not from a review; choose another"
        )
    console = Console(stderr=True)
    hidden = config.quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("reviewing", total=None)

        def advance(total: int) -> None:
            progress.update(bar, advance=1, total=total or None)

        groups = find_groups(config, kept, folder)
        found = review_labels(labels, kept, config.top, file, groups=groups, on_image=advance)
        progress.update(bar, description="writing", completed=0)
        count = sum(map(len, found.chosen.values()))
        print(f"{count:,} of {found.images:,} images chosen -> {folder}")
        print("\n".join(f"  {line}" for line in [*found.lines, file]))
        if config.format == "html":
            write_page(labels, found, storage.join(folder, "review.html"))
        else:
            made = config.export()
            print(f"  {describe_export(made, export_labels(made, advance, facts_of(found)))}")


def find_groups(config: ReviewConfig, kept: KeptMaps, folder: str) -> Groups | None:
    """Groups of near-duplicates: those of a file, or those of the run's embeddings."""
    if config.duplicates:
        return read_groups(config.duplicates, "--duplicates")
    if not kept.embedded:
        return None
    file = storage.join(folder, "duplicates.parquet")
    found = find_duplicates(open_table(kept.output), DuplicatesConfig.cosine)
    write_parquet(file, found.read(), DUPLICATES)
    return read_groups(file, "embeddings")


def facts_of(found: Review) -> Only:
    """Rank and criteria of each chosen image, as tasks of a tool carry them."""
    return {
        part: {
            number: {"review_rank": row["rank"], **{n: round(row[n], 6) for n in CRITERIA}}
            for number, row in rows.items()
        }
        for part, rows in found.chosen.items()
    }


def write_page(labels: str, found: Review, file: str) -> None:
    """Draw the chosen images, and name those without a picture."""
    page, missing = draw_review(labels, found)
    storage.write_bytes(file, page.encode())
    print(f"  {file}")
    for why, count in Counter(missing).most_common():
        print(f"  {count:,} have no picture: {one_line(why)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ReviewConfig, review, "clipseg-ray review", argv)


if __name__ == "__main__":
    sys.exit(main())
