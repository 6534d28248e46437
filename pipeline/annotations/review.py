"""Labels and the kept maps behind them -> the images worth a person's time.

Two passes: criteria of every image into a file beside, then the same rows with their ranks. Of each
image 60 bytes are held meanwhile, and 16 of each row in a group of near-duplicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.annotations.kept_maps import KeptMaps, read_kept_maps
from pipeline.annotations.labelled import open_labels, read_rows_of
from pipeline.annotations.splits import Groups
from pipeline.annotations.temporary import TemporaryFolder
from pipeline.annotations.worth import CRITERIA, asked_of, measure_image, weigh
from pipeline.errors import UsageError
from pipeline.run.finished import list_finished
from pipeline.write.layout import shard_id

_MEASURED = [
    ("shard", pa.string()),
    ("row", pa.int64()),
    ("key", pa.string()),
    *(pair for name in CRITERIA for pair in ((name, pa.float32()), (f"{name}_class", pa.string()))),
    ("group", pa.int64()),  # of near-duplicates; null for an image in none
]
REVIEW = pa.schema([*_MEASURED, ("rank", pa.int64()), ("chosen", pa.bool_())])
"""A row an image. Ranks begin with 1; one image of a group is chosen at most."""
_AT_ONCE = 4096  # rows of a row group

Chosen = dict[str, dict[int, dict[str, Any]]]
"""By part of the labels and row number, the rows of REVIEW."""


@dataclass(kw_only=True)
class Review:
    """Account of a review."""

    images: int = 0
    chosen: Chosen = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """On what was left out."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the chosen images, best first."""
        found = [row for rows in self.chosen.values() for row in rows.values()]
        return sorted(found, key=lambda row: row["rank"])


def review_labels(
    labels: str,
    kept: KeptMaps,
    top: int,
    file: str,
    *,
    groups: Groups | None = None,
    on_image: Callable[[int], None] = lambda total: None,
) -> Review:
    """Write the table of all images into a Parquet file, and choose so many of them.

    `on_image` is called for each with their number, or 0. Raises UsageError, JobError,
    StorageError.
    """
    temporary = TemporaryFolder()
    try:
        measured, ranked = (temporary.path / name for name in ("measured", "ranked"))
        review, criteria, group = _measure(labels, kept, measured, groups, on_image)
        if not review.images:
            raise UsageError(f"{labels}: {kept.output} has maps of none of its images")
        ranks = rank(criteria)
        chosen = choose(ranks, group, top)
        for row in _write_ranked(measured, ranked, ranks, chosen):
            part = f"{shard_id(row['shard'])}.parquet"
            review.chosen.setdefault(part, {})[row["row"]] = row
        storage.put_file(ranked, file)
    finally:
        temporary.cleanup()
    return review


def _measure(
    labels: str,
    kept: KeptMaps,
    path: Path,
    groups: Groups | None,
    on_image: Callable[[int], None],
) -> tuple[Review, np.ndarray, np.ndarray]:
    """Write the criteria; returns them, (N, 3) float32, and the groups (N,) int64, -1 for none."""
    record, parts = open_labels(labels)
    total = int(record.get("counts", {}).get("rows_ok", 0))
    asked = asked_of(record.get("fingerprint", {}), kept.prompt_ids, labels)
    classes = [weigh(each) for each in asked]
    wanted = sorted({i for each in asked for i in (*each.prompt_ids, *each.negative_ids)})
    review, listed, known = Review(), 0, set(parts)
    criteria, group = [np.zeros((0, len(CRITERIA)), np.float32)], [np.zeros(0, np.int64)]
    schema = pa.schema(_MEASURED)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for shard in list_finished(kept.output, "probabilities"):
            part = f"{shard_id(shard.name)}.parquet"
            if part not in known:
                continue
            rows = set(read_rows_of(labels, part))
            listed += len(rows)
            for table in read_kept_maps(shard, wanted):
                found = []
                for image, maps in _images(table, wanted, rows):
                    image["group"] = groups.find(image["shard"], image["row"]) if groups else None
                    found.append(image | measure_image(maps, classes))
                    on_image(total)
                done = pa.Table.from_pylist(found, schema=schema)
                writer.write_table(done)
                review.images += len(done)
                criteria.append(np.stack([done[n].to_numpy() for n in CRITERIA], 1))
                group.append(pc.fill_null(done["group"], -1).to_numpy())
    if lost := max(listed, total) - review.images:
        review.lines.append(
            f"{lost:,} images of the labels have no maps in {kept.output} any more; not reviewed"
        )
    return review, np.concatenate(criteria), np.concatenate(group)


def _images(
    table: pa.Table, wanted: list[int], rows: set[int]
) -> Iterator[tuple[dict[str, Any], dict[int, np.ndarray]]]:
    """Each image with one of the row numbers, and its maps by prompt_id."""
    names = ["shard", "row", "key", "map_height", "map_width"]
    good = table.filter(pc.greater(pc.binary_length(table["maps"]), 0))
    for image, data in zip(good.select(names).to_pylist(), good["maps"], strict=True):
        size = (image.pop("map_height"), image.pop("map_width"))
        if image["row"] in rows:
            flat = np.frombuffer(data.as_buffer(), np.uint8)
            yield image, dict(zip(wanted, flat.reshape(-1, *size), strict=True))


def rank(criteria: np.ndarray) -> np.ndarray:
    """The rank (N,) int64, from 1, of images with criteria (N, C).

    By the mean of their places by each criterion, counted from the least; equal values share the
    highest of their places, and 0 has none.
    """
    places = np.zeros(len(criteria))
    for values in criteria.T:
        places += np.where(values > 0, np.searchsorted(np.sort(values), values, side="right"), 0)
    ranks = np.empty(len(criteria), np.int64)
    ranks[np.argsort(-places, kind="stable")] = np.arange(1, len(criteria) + 1)
    return ranks


def choose(ranks: np.ndarray, groups: np.ndarray, top: int) -> np.ndarray:
    """(N,) bool: the images of the lowest ranks, one of each group (-1: in none)."""
    chosen, seen, count = np.zeros(len(ranks), np.bool_), set(), 0
    for i in np.argsort(ranks, kind="stable"):
        group = int(groups[i])
        if count == top:
            break
        if group < 0 or group not in seen:
            seen.add(group)
            chosen[i] = True
            count += 1
    return chosen


def _write_ranked(
    source: Path, path: Path, ranks: np.ndarray, chosen: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Copy the measured rows with their ranks; yields the chosen ones."""
    at, writing = 0, pq.ParquetWriter(path, REVIEW, compression="zstd")
    with pq.ParquetFile(source) as measured, writing as writer:
        for batch in measured.iter_batches(_AT_ONCE, use_threads=False):
            span = slice(at, at + len(batch))
            columns = [*batch.columns, pa.array(ranks[span]), pa.array(chosen[span])]
            table = pa.table(columns, schema=REVIEW)
            writer.write_table(table)
            yield from table.filter(table["chosen"]).to_pylist()
            at += len(batch)
