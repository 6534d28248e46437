"""Number of masks in a run whose images have prompts of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyarrow.compute as pc

from pipeline import storage
from pipeline.storage import FileInfo
from pipeline.write.parts import open_part

_AT_ONCE = 32  # parts that are read


def count_masks(output: str) -> str:
    """A line with the number of masks, and of images that had no prompt and so have none."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        images = sum(pool.map(_count_rows, _parts(output, "images")))
        masks = list(pool.map(_count_masks, _parts(output, "masks")))
    without = images - sum(prompted for _, prompted in masks)
    return f"{sum(rows for rows, _ in masks):,} masks; {without:,} images had no prompt"


def _parts(output: str, table: str) -> list[FileInfo]:
    files = storage.list_files(storage.join(output, table), recursive=False)
    return [file for file in files if file.uri.endswith(".parquet")]


def _count_rows(file: FileInfo) -> int:
    with open_part(file.uri) as parquet:
        return int(parquet.metadata.num_rows)


def _count_masks(file: FileInfo) -> tuple[int, int]:
    """Rows, and the images that they are of."""
    with open_part(file.uri) as parquet:
        rows = parquet.read(columns=["row"], use_threads=False)["row"]
    return len(rows), int(pc.count_distinct(rows).as_py())
