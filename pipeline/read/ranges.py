"""Sets of row numbers as short texts: `0-15_48-63`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise


def format_rows(rows: Iterable[int]) -> str:
    """The text of a set of row numbers; "" for none."""
    order = sorted(set(rows))
    starts = [row for before, row in pairwise([-2, *order]) if row != before + 1]
    ends = [row for row, after in pairwise([*order, -2]) if after != row + 1]
    return "_".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))


def parse_rows(text: str) -> list[range]:
    """The ranges in a text of format_rows, in ascending order."""
    pairs = [part.partition("-") for part in text.split("_") if part]
    return [range(int(a), int(b or a) + 1) for a, _, b in pairs]


def iter_rows(text: str) -> Iterator[int]:
    """The row numbers in a text of format_rows, in ascending order."""
    for rows in parse_rows(text):
        yield from rows


class RowSet:
    """Row numbers, asked for in ascending order: one comparison a question."""

    def __init__(self, text: str):
        self._ranges = parse_rows(text)[::-1]

    def __contains__(self, row: int) -> bool:
        return self.holds(range(row, row + 1))

    def holds(self, rows: range) -> bool:
        """Whether all of some consecutive rows, one or more, are in the set."""
        while self._ranges and self._ranges[-1].stop <= rows.start:
            self._ranges.pop()
        return (
            bool(self._ranges) and rows.start in self._ranges[-1] and rows[-1] in self._ranges[-1]
        )
