"""Find the rows of a table of embeddings nearest to texts and images.

    python -m jobs.search EMBEDDINGS --text "a red bicycle" --top 20 --gallery found.html

EMBEDDINGS is the output of `clipseg-ray embed`, or of `clipseg-ray index`. Texts and images
together are one query: `--text "a street" --image photo.jpg --minus cars`; `--queries FILE` answers
many in one pass.

`clipseg-ray search` is the same. A table is searched in this process, by a thread a CPU; a large
one, if RAY_ADDRESS names a cluster, by Ray tasks there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from pipeline.config.command import run_command
from pipeline.config.search import SearchConfig
from pipeline.embeddings.index import is_index, open_index, search_index
from pipeline.embeddings.query import make_vectors, queries_of
from pipeline.embeddings.results import RESULTS, results_table, show_results, write_parquet
from pipeline.embeddings.search import ExactSearch, Hit, search_files
from pipeline.embeddings.vectors import EmbeddingTable, open_table, warn_of_missing_rows
from pipeline.storage import FileInfo

# Smaller tables are searched sooner than Ray is joined: a core reads about 0.5 GB/s.
RAY_FROM_BYTES = 2 * 2**30
GROUP_BYTES = 2**28  # of the parts that one task reads

T = TypeVar("T")


def search(config: SearchConfig) -> None:
    """Open the table -> encode the queries -> find the nearest rows -> show, Parquet, gallery."""
    index = open_index(config.embeddings, config.column) if is_index(config.embeddings) else None
    table = index.table if index else open_table(config.embeddings, config.column)
    warn_of_missing_rows(table)
    queries = queries_of(config)
    names = [query.name for query in queries]
    if config.gallery:
        from pipeline.embeddings import gallery  # and with it the readers of every input

        images = gallery.open_gallery(table.output, len(queries) * config.top)
    vectors = make_vectors(queries, index or table, config.model)
    if index:
        hits = search_index(index, vectors, config.top)
    else:
        hits = search_exactly(table, vectors, config.top, quiet=config.quiet)
    results = results_table(names, hits)
    if not config.quiet:
        show_results(results)
    if config.output:
        write_parquet(config.output, [results], RESULTS)
    if config.gallery:
        gallery.write_gallery(config.gallery, names, hits, images)
    for file in (config.output, config.gallery):
        if file and not config.quiet:
            print(f"  {file}")


def search_exactly(
    table: EmbeddingTable, queries: np.ndarray, top: int, *, quiet: bool = True
) -> list[list[Hit]]:
    """As search_files over all parts of a table: in this process, or a large one on a cluster."""
    large = sum(file.size_bytes for file in table.files) >= RAY_FROM_BYTES
    if large and len(table.files) > 1 and os.environ.get("RAY_ADDRESS"):
        return search_on_ray(table, queries, top, quiet=quiet)
    return search_files(table, _track(table.files, len(table.files), quiet), queries, top)


def search_on_ray(
    table: EmbeddingTable,
    queries: np.ndarray,
    top: int,
    *,
    quiet: bool = True,
    group_bytes: int = GROUP_BYTES,
) -> list[list[Hit]]:
    """As search_files over all parts of a table, by Ray tasks, a group of parts each."""
    import ray  # 2 s, which a search in this process does without

    from pipeline.run.session import ray_session

    groups = group_files(table.files, group_bytes)
    search = ExactSearch(queries, top)
    with ray_session():
        task = ray.remote(num_cpus=1, max_retries=3)(_search_on_one_cpu)
        shared = ray.put(queries)
        table = replace(table, files=())
        running = [task.remote(table, group, shared, top) for group in groups]
        for _ in _track(range(len(groups)), len(groups), quiet):
            ready, running = ray.wait(running)
            search.merge(ray.get(ready[0]))
    return search.hits


def _search_on_one_cpu(
    table: EmbeddingTable, files: Sequence[FileInfo], queries: np.ndarray, top: int
) -> list[list[Hit]]:
    return search_files(table, files, queries, top, threads=1)


def group_files(files: Sequence[FileInfo], group_bytes: int) -> list[list[FileInfo]]:
    """Consecutive files, in groups of at least this size; the last may be smaller."""
    groups: list[list[FileInfo]] = [[]]
    size_bytes = 0
    for file in files:
        if size_bytes >= group_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(file)
        size_bytes += file.size_bytes
    return groups


def _track(steps: Iterable[T], count: int, quiet: bool) -> Iterable[T]:
    """The steps, with a progress bar on a terminal."""
    console = Console(stderr=True)
    disable = quiet or not console.is_terminal
    return track(steps, "searching", total=count, console=console, transient=True, disable=disable)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(SearchConfig, search, "clipseg-ray search", argv)


if __name__ == "__main__":
    sys.exit(main())
