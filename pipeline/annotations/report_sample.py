"""Tables of a run -> figures of each class, and a few images of it, from a bounded sample of parts.

A class is a prompt of a run of segment, a class of labels, or a label of classify. Of a large run
some shards are read, spread evenly, and of a large part its first rows: at most ROWS in all.

Shapes: N rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.annotations.choose import Parts, spread
from pipeline.annotations.report_rows import Kind, Rows
from pipeline.errors import CredentialsError, PipelineError
from pipeline.write.layout import Ledger
from pipeline.write.parts import open_part

SHARDS = 64  # whose parts are read
ROWS = 1_000_000  # of them
MOST_CLASSES = 300
TABLE_ROWS = 500
BINS = 50  # of scores, 0..1
NEAR = 0.1  # to the threshold
ORDERS = ("random", "highest", "most uncertain", "lowest")

_AT_ONCE = 8  # parts that are read
_KEPT = 16  # candidates of a class in each order: the same image stands in several


class Candidate(NamedTuple):
    """An image of a class."""

    shard_id: str
    shard: str
    row: int
    score: float
    share: float
    """Of the image, 0..1; NaN where there is no mask."""


class TableRow(NamedTuple):
    """A row of the page's table."""

    key: str
    shard: str
    row: int
    name: str
    score: float
    share: float


@dataclass(kw_only=True)
class Class:
    """Figures of a class."""

    name: str
    images: int
    """That were asked for it."""
    found: int
    """In which something was."""
    near: int
    """Whose score is near the threshold, or to that of another label."""
    mean_share: float
    """Of the image, where found; NaN where not known."""
    mean_score: float
    """Where found."""
    threshold: float
    """NaN where there is none."""
    scores: list[int]
    """Images in each of BINS bins."""
    chosen: dict[str, list[Candidate]] = field(default_factory=dict)
    """Best first, by the order of ORDERS."""


@dataclass(kw_only=True)
class Sample:
    """Rows read from a bounded number of parts, as figures of each class."""

    kind: Kind
    images: int
    shards: int
    of_shards: int
    whole: bool
    """Whether it is every row of the finished shards."""
    unread: list[str]
    """Why parts could not be read."""
    more_classes: bool
    """Whether there are more than MOST_CLASSES."""
    classes: list[Class]
    table: list[TableRow]


class _Part(NamedTuple):
    """The rows read of a shard's parts."""

    batches: list[Rows]
    images: int
    whole: bool
    fault: str


def read_sample(
    output: str, kind: Kind, parts: Parts, known: Sequence[str], pictured: set[str]
) -> Sample:
    """Read a sample of the parts of a table (see choose.list_parts_by_shard).

    `known`: names of classes in their order, whether in the sample or not. `pictured`: ids of the
    shards to choose images from. Raises CredentialsError.
    """
    ids = spread(list(parts), SHARDS)
    quota = max(ROWS // max(sum(len(parts[id_]) for id_ in ids), 1), 1)

    def read(id_: str) -> _Part:
        try:
            return _read_shard(output, kind, id_, parts[id_], quota)
        except CredentialsError:
            raise
        except PipelineError as error:
            return _Part([], 0, False, str(error))

    counts = _Counts(kind, known)
    found = Sample(
        kind=kind,
        images=0,
        shards=0,
        of_shards=len(parts),
        whole=len(ids) == len(parts),
        unread=[],
        more_classes=False,
        classes=[],
        table=[],
    )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for id_, part in zip(ids, pool.map(read, ids), strict=True):
            found.shards += not part.fault
            found.images += part.images
            found.whole &= part.whole
            found.unread += [part.fault] if part.fault else []
            for rows in part.batches:
                counts.add(id_, rows, pictured=id_ in pictured)
    found.classes, found.more_classes = counts.classes(found.images), counts.more
    found.table = counts.table()
    return found


def _read_shard(output: str, kind: Kind, id_: str, uris: Sequence[str], quota: int) -> _Part:
    batches: list[Rows] = []
    whole, last, seen = True, -1, 0
    for uri in uris:
        of_part = []
        with open_part(uri) as parquet:
            for table in _whole_images(parquet, kind.columns, quota):
                of_part.append(kind.make(table))
            whole &= sum(rows.read for rows in of_part) == parquet.metadata.num_rows
        batches += of_part
        last = max([last, *(int(rows.row[-1]) for rows in of_part if len(rows.row))])
        if ".from-" not in uri.rpartition("/")[2]:
            seen = sum(rows.images for rows in of_part)
    if not kind.counts_images:
        return _Part(batches, seen, whole, "")
    images = storage.join(output, Ledger(output=output).part("images", id_))
    with open_part(images) as parquet:
        count = parquet.metadata.num_rows
        if not whole:
            rows = parquet.read(columns=["row"], use_threads=False)["row"].to_numpy()
            count = int((rows <= last).sum())
    return _Part(batches, count, whole, "")


def _whole_images(parquet: pq.ParquetFile, columns: list[str], quota: int) -> Iterator[pa.Table]:
    """Row groups until there are so many rows; the rows of an image are never parted."""
    held = None
    read = 0
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns, use_threads=False)
        read += len(table)
        if held is not None:
            table = pa.concat_tables([held, table])
        if group + 1 < parquet.num_row_groups:
            numbers = table["row"].to_numpy()
            cut = int(np.searchsorted(numbers, numbers[-1]))
            table, held = table.slice(0, cut), table.slice(cut)
        if len(table):
            yield table
        if read >= quota:
            return


class _Counts:
    """Sums over batches, and the best candidates so far."""

    def __init__(self, kind: Kind, known: Sequence[str]):
        self.kind, self.more = kind, len(known) > MOST_CLASSES
        self.names = {name: i for i, name in enumerate(dict.fromkeys(known[:MOST_CLASSES]))}
        self.sums = np.zeros((MOST_CLASSES, 5))  # rows, found, near, and sums of share and score
        self.thresholds = np.full(MOST_CLASSES, np.nan)
        self.scores = np.zeros((MOST_CLASSES, BINS), np.int64)
        self.random = np.random.default_rng(0)  # the same page every time
        self.shards: list[tuple[str, str]] = []
        nothing = np.empty((0, 6))  # class, worth, shard, row, score, share
        self.best = dict.fromkeys(ORDERS, nothing)
        self.rows = np.empty((0, 6))
        self.keys = np.empty(0, object)

    def add(self, id_: str, rows: Rows, *, pictured: bool) -> None:
        """Count a batch."""
        numbers = np.array([self._number(name) for name in rows.names], np.int64)
        of = numbers[rows.of] if len(numbers) else np.empty(0, np.int64)
        if (of < 0).any():
            self.more = True
            rows, of = rows.take(of >= 0), of[of >= 0]
        if not len(of):
            return
        ones, found = np.ones(len(of)), rows.found.astype(float)
        share = np.nan_to_num(rows.share)
        values = (ones, found, rows.doubt < NEAR, share * found, rows.score * found)
        for i, value in enumerate(values):
            self.sums[:, i] += np.bincount(of, value, MOST_CLASSES)
        self.thresholds[of] = rows.threshold
        bins = np.clip((rows.score * BINS).astype(np.int64), 0, BINS - 1)
        counted = np.bincount(of * BINS + bins, minlength=self.scores.size)
        self.scores += counted.reshape(self.scores.shape)
        if not self.shards or self.shards[-1] != (id_, rows.shard):
            self.shards.append((id_, rows.shard))
        chance = self.random.random(len(of))
        self._keep_rows(of, chance, rows)
        if pictured:
            self._keep_best(of, chance, rows)

    def _number(self, name: str) -> int:
        if name not in self.names and len(self.names) < MOST_CLASSES:
            self.names[name] = len(self.names)
        return self.names.get(name, -1)

    def _columns(self, of: np.ndarray, worth: np.ndarray, rows: Rows) -> np.ndarray:
        shard = np.full(len(of), len(self.shards) - 1)
        return np.stack([of, worth, shard, rows.row, rows.score, rows.share], axis=1)

    def _keep_rows(self, of: np.ndarray, chance: np.ndarray, rows: Rows) -> None:
        """Rows of the table: those with something found before others, by chance."""
        worth = chance - rows.found
        best = np.argsort(worth, kind="stable")[:TABLE_ROWS]
        every = np.concatenate([self.rows, self._columns(of, worth, rows)[best]])
        keys = rows.key.take(pa.array(best)).to_numpy(zero_copy_only=False)
        keys = np.concatenate([self.keys, keys])
        best = np.argsort(every[:, 1], kind="stable")[:TABLE_ROWS]
        self.rows, self.keys = every[best], keys[best]

    def _keep_best(self, of: np.ndarray, chance: np.ndarray, rows: Rows) -> None:
        worths = {
            "random": np.where(rows.found, chance, np.nan),
            "highest": -rows.score,
            "lowest": rows.score,
            "most uncertain": rows.doubt,
        }
        for name, worth in worths.items():
            new = self._columns(of, worth, rows)[~np.isnan(worth)]
            every = np.concatenate([self.best[name], _first_of_each(new)])
            self.best[name] = _first_of_each(every)

    def table(self) -> list[TableRow]:
        """The rows kept, by class and score."""
        names = list(self.names)
        found = [
            TableRow(key, self.shards[int(r[2])][1], int(r[3]), names[int(r[0])], r[4], r[5])
            for key, r in zip(self.keys.tolist(), self.rows.tolist(), strict=True)
        ]
        order = {name: i for i, name in enumerate(names)}
        return sorted(found, key=lambda r: (order[r.name], -r.score, r.shard, r.row))

    def classes(self, images: int) -> list[Class]:
        """The figures; `images` in the sample."""
        made = []
        for name, i in self.names.items():
            rows, found, near, share, score = self.sums[i].tolist()
            masked = self.kind.has_masks
            one = Class(
                name=name,
                images=int(rows) if self.kind.asks_every_image else images,
                found=int(found),
                near=int(near),
                mean_share=share / found if found and masked else float("nan"),
                mean_score=score / found if found else float("nan"),
                threshold=float(self.thresholds[i]),
                scores=self.scores[i].tolist(),
            )
            for order in ORDERS:
                some = self.best[order][self.best[order][:, 0] == i].tolist()
                one.chosen[order] = [
                    Candidate(*self.shards[int(r[2])], int(r[3]), r[4], r[5]) for r in some
                ]
            made.append(one)
        return made


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """Of rows (n, 6) the _KEPT of each class with the smallest worth, smallest first."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    starts = np.flatnonzero(np.r_[True, rows[1:, 0] != rows[:-1, 0]])
    lengths = np.diff(np.r_[starts, len(rows)])
    place = np.arange(len(rows)) - np.repeat(starts, lengths)
    return np.asarray(rows[place < _KEPT])
