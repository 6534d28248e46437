"""Read a few rows of a shard again, for pictures, pages and exports."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from pipeline.read.records import read_shard
from pipeline.read.shard import Sample, Shard


def read_rows(shard: Shard, rows: Collection[int]) -> Iterator[tuple[int, Sample]]:
    """Read the wanted rows of a shard in their order, each with its sample, up to the last of them;
    of loose files no others.

    Rows missing in the shard are left out; unreadable ones have a reason. Raises CredentialsError.
    """
    wanted = set(rows)
    if shard.format == "images":
        order = sorted(row for row in wanted if row < len(shard.files))
        files = replace(shard, files=tuple(shard.files[row] for row in order))
        # The end record, which comes last, is left over.
        for row, record in zip(order, read_shard(files), strict=False):
            yield row, _sample(record)
        return
    last = max(wanted, default=-1)
    for record in read_shard(shard) if wanted else ():
        if record["row"] in wanted:
            yield record["row"], _sample(record)
        if record["row"] == last:
            return


def _sample(record: dict[str, Any]) -> Sample:
    return Sample(**{name: record[name] for name in Sample._fields})
