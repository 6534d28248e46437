"""The fragments of a shard -> its rows in order, with bounded memory.

In memory are the fragments with overlapping rows and a few read ahead, whatever the shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.read.ranges import parse_rows
from pipeline.write.fragments import Fragment

READ_AHEAD = 4

Tables = dict[str, pa.Table]

# Of the rows of a part.
_ORDER = ("row", "instance", "prompt_id", "rank")


def merge_fragments(
    fragments: Sequence[Fragment],
    read: Callable[[Fragment], Tables],
    schemas: dict[str, pa.Schema],
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of each table, by (name, rows): ascending by row, and by prompt or rank.

    Rows without a number, of the shard itself, come last. Raises as `read` does.
    """
    order = sorted(fragments, key=lambda fragment: (*_first_row(fragment), fragment.run))
    ends = [*(_first_row(after)[1] for _, after in pairwise(order)), None]
    pending: dict[str, list[pa.Table]] = {name: [] for name in schemas}
    for tables, end in zip(_read_ahead(order, read), ends, strict=False):
        for name, table in tables.items():
            pending[name].append(table.replace_schema_metadata(schemas[name].metadata))
        for name, pieces in pending.items():
            ready, pending[name] = _split(pieces, end)
            if ready is not None:
                yield name, ready


def _first_row(fragment: Fragment) -> tuple[bool, int | None]:
    """(whether it has no rows, its first row): sorts fragments without rows last."""
    rows = parse_rows(fragment.rows)
    return (False, rows[0].start) if rows else (True, None)


def _read_ahead(order: Sequence[Fragment], read: Callable[[Fragment], Tables]) -> Iterator[Tables]:
    pending: deque[Future[Tables]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for fragment in order:
            pending.append(pool.submit(read, fragment))
            if len(pending) > READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _split(pieces: list[pa.Table], end: int | None) -> tuple[pa.Table | None, list[pa.Table]]:
    """The rows before `end` (None: all), sorted, and the others."""
    if not pieces:
        return None, []
    table = pa.concat_tables(pieces)
    rest: list[pa.Table] = []
    if end is not None:
        early = pc.fill_null(pc.less(table["row"], end), False)
        later = table.filter(pc.invert(early))
        table, rest = table.filter(early), [later] if len(later) else []
    if not len(table):
        return None, rest
    keys = [name for name in _ORDER if name in table.column_names]
    return table.sort_by([(key, "ascending") for key in keys]), rest
