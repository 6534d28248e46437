"""A run -> its report. Whatever its size, a bounded number of parts and images is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.annotations.choose import list_parts_by_shard
from pipeline.annotations.overlay import colors_of
from pipeline.annotations.report_page import Report, draw_report
from pipeline.annotations.report_pictures import (
    BUDGET_BYTES,
    choose_pictures,
    choose_shards,
    draw_pictures,
    draw_thumbnails,
    read_rows,
)
from pipeline.annotations.report_rows import KINDS, Kind
from pipeline.annotations.report_sample import read_sample
from pipeline.annotations.report_vectors import read_vectors
from pipeline.errors import UsageError
from pipeline.read.shard import Shard
from pipeline.run.failures import sample_failures
from pipeline.run.images import Images, find_images
from pipeline.run.manifest import is_complete
from pipeline.run.status import count_shards
from pipeline.run.wanted_images import Moved, list_there
from pipeline.write.layout import shard_id
from pipeline.write.passes import read_added

NAMES = 5  # of failed images of a reason
ERROR_SHARDS = 1000  # whose errors are read

Shards = Mapping[str, Shard]
"""By name."""


def write_report(
    output: str,
    record: dict[str, Any],
    page: str,
    *,
    shards: Shards | None = None,
    moved_to: str | None = None,
) -> Report:
    """Write the page of a run into a file.

    `shards`: of its own input, if known already. Raises JobError, StorageError, and UsageError for
    what is no run.
    """
    if not isinstance(record.get("config"), dict) or not record.get("tables"):
        raise UsageError(f"{output}: its _run.json does not say what the run is")
    source, shards = _find_input(output, shards, moved_to)
    report = Report(
        output=output,
        record=record,
        complete=is_complete(output, record),
        account=count_shards(output, record),
        failures=sample_failures(output, names=NAMES, shards=ERROR_SHARDS),
    )
    tables = record["tables"]
    kind = next((kind for name, kind in KINDS.items() if name in tables), None)
    budget = BUDGET_BYTES // (1 + (kind is not None and "embeddings" in tables))
    read = _Reader(source, shards, moved_to, budget)
    if kind:
        report = read.classes(report, kind)
    if "embeddings" in tables:
        report = read.vectors(report)
    report = replace(report, notes=read.notes)
    storage.write_bytes(page, draw_report(report).encode())
    return report


def _find_input(
    output: str, shards: Shards | None, moved_to: str | None
) -> tuple[Images | None, Shards]:
    """The input of the images, and its present shards; none if unknown."""
    try:
        source = find_images(output)
    except UsageError:
        return None, {}
    if shards is None or source.output != output or moved_to:
        shards = list_there(source, moved_to)
    return source, shards


class _Reader:
    """Reader of tables, and of pictures of `budget` bytes."""

    def __init__(self, source: Images | None, shards: Shards, moved_to: str | None, budget: int):
        self.source, self.shards, self.budget = source, shards, budget
        self.moved = Moved(to=moved_to) if moved_to else None
        gone = "no pictures: the images of the run are not there any more"
        self.notes = [] if source and shards else [gone]

    def _choose(self, parts: dict[str, list[str]]) -> Shards:
        """The shards to show images of."""
        some = choose_shards(parts, self.shards.values())
        if 0 < len(some) < len(parts) and not self.notes:
            self.notes.append(f"pictures are of {len(some):,} of {len(parts):,} shards")
        return {shard.name: shard for shard in some}

    def classes(self, report: Report, kind: Kind) -> Report:
        """The report with figures and pictures of each class."""
        parts = list_parts_by_shard(report.output, kind.table)
        shards = self._choose(parts)
        pictured = {shard_id(name) for name in shards} or set(parts)
        known = _known_classes(report.output, report.record)
        sample = read_sample(report.output, kind, parts, known, pictured)
        chosen = choose_pictures(sample.classes)
        rows = read_rows(parts, kind, chosen)
        colors = _colors_of_classes(report.record) or colors_of(report.record["config"])
        report = replace(report, sample=sample, chosen=chosen, rows=rows, colors=colors)
        if self.source is None:
            return report
        pictures = draw_pictures(self.source, shards, rows, colors, self.budget, moved=self.moved)
        return replace(report, pictures=pictures)

    def vectors(self, report: Report) -> Report:
        """The report with a sample of the embeddings."""
        parts = list_parts_by_shard(report.output, "embeddings")
        shards = self._choose(parts)
        vectors = read_vectors(parts, [shard_id(name) for name in shards])
        if vectors is None or self.source is None:
            return replace(report, vectors=vectors)
        groups = (*vectors.neighbours, *vectors.closest)
        wanted = [(one.shard, one.row) for group in groups for one in group]
        thumbnails = draw_thumbnails(self.source, shards, wanted, self.budget, moved=self.moved)
        return replace(report, vectors=vectors, thumbnails=thumbnails)


def _known_classes(output: str, record: Mapping[str, Any]) -> list[str]:
    """Names of the run's classes, in their order."""
    decides = record.get("fingerprint", {})
    if "annotations" in record["tables"]:
        ontology = decides.get("ontology") or {}
        return [str(one.get("name")) for one in ontology.get("classes", [])]
    if "masks" in record["tables"]:
        added = [prompt for some in read_added(output).values() for prompt in some]
        return [*map(str, decides.get("prompts", [])), *added]
    return []


def _colors_of_classes(record: Mapping[str, Any]) -> dict[str, str]:
    """The colours of the classes of labels, by name, as far as they have one."""
    ontology = record.get("fingerprint", {}).get("ontology")
    classes = ontology.get("classes", []) if isinstance(ontology, dict) else []
    return {str(one["name"]): str(one["color"]) for one in classes if one.get("color")}
