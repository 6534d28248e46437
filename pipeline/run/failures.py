"""The errors table of a run, as a person reads it: reasons, how many, and some names of each."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import one_line
from pipeline.write.layout import EMPTY_PART, ERRORS
from pipeline.write.parts import read_part

_AT_ONCE = 32  # parts that are read
_COLUMNS = ("shard", "row", "key", "reason", "detail", "retryable")


class Failed(NamedTuple):
    """A row of the errors table."""

    shard: str
    row: int | None
    """None: the shard itself."""
    key: str
    detail: str

    @property
    def name(self) -> str:
        """The row's own name; of a shard the shard's."""
        return one_line(self.key or f"row {self.row}" if self.row is not None else self.shard, 80)


class FailureSample(NamedTuple):
    """Counts of what was read, and the first rows of each reason."""

    reasons: Counter[str]
    first: dict[str, list[Failed]]
    retryable: int
    unread: int
    """Shards with failures that were not read."""


def sample_failures(output: str, *, names: int, shards: int | None = None) -> FailureSample:
    """Read the errors of the first so many shards with failures (None: all).

    At most `names` rows of a reason are kept, in the order of the tables' files.
    """
    files = storage.list_files(storage.join(output, ERRORS), recursive=False)
    uris = sorted(
        file.uri
        for file in files
        if file.uri.endswith(".parquet") and not file.uri.endswith(f"/{EMPTY_PART}")
    )
    found = FailureSample(Counter(), {}, 0, len(uris[shards:]) if shards is not None else 0)
    retryable = 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows in pool.map(_read, uris[:shards]):
            for row in rows:
                retryable += row.pop("retryable")
                reason = row.pop("reason")
                found.reasons[reason] += 1
                first = found.first.setdefault(reason, [])
                if len(first) < names:
                    first.append(Failed(**row))
    return found._replace(retryable=retryable)


def _read(uri: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_part(uri, _COLUMNS).to_pylist()
    return rows
