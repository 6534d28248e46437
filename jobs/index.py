"""Build a vector index of a table of embeddings, for `clipseg-ray search`.

    python -m jobs.index EMBEDDINGS DEST --recall 100
    python -m jobs.search DEST --text "a red bicycle"

EMBEDDINGS is the output of `clipseg-ray embed`. `clipseg-ray index` is the same. The index is a
LanceDB table: `pip install 'clipseg-ray[lance]'`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from pipeline.config.command import run_command
from pipeline.config.search import IndexConfig
from pipeline.embeddings.index import VectorIndex, build_index
from pipeline.embeddings.recall import TOP, Recall, measure_recall
from pipeline.embeddings.vectors import open_table, warn_of_missing_rows


def index(config: IndexConfig) -> None:
    """Open the table -> copy its rows into LanceDB -> index them -> compare with exact search."""
    table = open_table(config.embeddings, config.column)
    warn_of_missing_rows(table)
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("copying", total=1.0)
        built = build_index(
            table,
            config.dest,
            overwrite=config.overwrite,
            on_progress=lambda done: progress.update(bar, completed=done),
        )
    print(summary(built))
    if config.recall:
        print(recall_text(measure_recall(built, table, config.recall)))


def summary(built: VectorIndex) -> str:
    """Size and place of an index, for the user."""
    how = f"in {built.partitions:,} partitions"
    if not built.partitions:
        how = "too few for an index to be faster: a search compares all of them"
    return f"{built.rows:,} rows, {how}\n  {built.uri}"


def recall_text(measured: Recall | None) -> str:
    """A measured recall, for the user."""
    if measured is None:
        return f"recall@{TOP}: cannot be measured, there is no other row to be found"
    found = f"recall@{TOP} {measured.recall:.3f}, {measured.queries:,} rows of the table as queries"
    return (
        f"{found}\n  by the index {measured.index_ms:.1f} ms a query; exactly "
        f"{measured.exact_ms:.1f} ms one alone, {measured.exact_pass_ms:.1f} ms each in one pass"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(IndexConfig, index, "clipseg-ray index", argv)


if __name__ == "__main__":
    sys.exit(main())
