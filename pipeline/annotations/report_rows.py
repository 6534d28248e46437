"""Rows of masks, annotations or labels in one form, for the report: a row an image and class.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Rows(NamedTuple):
    """Rows of one shard, in the order of its images."""

    shard: str
    names: list[str]
    """Of the classes in these rows."""
    of: np.ndarray
    """(N,) index into `names`."""
    row: np.ndarray
    key: pa.Array
    score: np.ndarray
    """(N,) float64: the largest probability, 0..1."""
    doubt: np.ndarray
    """(N,) distance to the threshold, or to the second label; NaN where there is none."""
    share: np.ndarray
    """(N,) of the image that is covered, 0..1; NaN where there is no mask."""
    found: np.ndarray
    """(N,) bool."""
    threshold: np.ndarray
    images: int
    """Number of images among them."""
    read: int
    """Rows of the table that they were made of."""

    def take(self, wanted: np.ndarray) -> Rows:
        """Some of the rows."""
        arrays = {name: value[wanted] for name, value in self._asdict().items() if name in _ARRAYS}
        return self._replace(**arrays, key=self.key.filter(pa.array(wanted)))


_ARRAYS = ("of", "row", "score", "doubt", "share", "found", "threshold")


class Kind(NamedTuple):
    """A table, and the way to its rows."""

    table: str
    columns: list[str]
    name: str
    """The column that names the class."""
    make: Callable[[pa.Table], Rows]
    has_masks: bool
    counts_images: bool
    """Whether images are counted in the table `images`: some have no row in this one."""
    asks_every_image: bool
    """Whether an image has a row of each class that it was asked for."""


def _rows(table: pa.Table, name: str, **known: Any) -> Rows:
    encoded = table[name].combine_chunks().dictionary_encode()
    row = table["row"].to_numpy()
    count = len(table)
    nothing = np.full(count, np.nan)
    filled: dict[str, Any] = {"doubt": nothing, "share": nothing, "threshold": nothing}
    return Rows(
        shard=table["shard"][0].as_py(),
        names=encoded.dictionary.to_pylist(),
        of=encoded.indices.to_numpy(),
        row=row,
        key=table["key"].combine_chunks(),
        images=int((np.diff(row) != 0).sum()) + 1,
        **{"read": count, "found": np.ones(count, bool), **filled, **known},
    )


def _floats(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].to_numpy(), np.float64)


def _share(table: pa.Table) -> np.ndarray:
    """(N,) of the grid of each mask: the image's, or the model's."""
    sides = pc.list_flatten(pc.struct_field(table["rle"].combine_chunks(), "size")).to_numpy()
    pixels = np.asarray(sides, np.float64).reshape(-1, 2).prod(axis=1)
    return np.asarray(_floats(table, "area") / np.maximum(pixels, 1))


def _of_masks(table: pa.Table) -> Rows:
    score, threshold = _floats(table, "score_max"), _floats(table, "threshold")
    share = _share(table)
    return _rows(
        table,
        "prompt",
        score=score,
        doubt=np.abs(score - threshold),
        share=share,
        found=share > 0,
        threshold=threshold,
    )


def _of_annotations(table: pa.Table) -> Rows:
    """Instances of a class in an image become one row: their pixels together, the least sure."""
    ids = table["class_id"].to_numpy()
    order = np.lexsort((ids, table["row"].to_numpy()))
    table = table.take(pa.array(order))
    row, ids = table["row"].to_numpy(), table["class_id"].to_numpy()
    starts = np.flatnonzero(np.r_[True, (row[1:] != row[:-1]) | (ids[1:] != ids[:-1])])
    threshold = _floats(table, "threshold")
    doubt = np.minimum.reduceat(np.abs(_floats(table, "score") - threshold), starts)
    share = np.minimum(np.add.reduceat(_share(table), starts), 1)
    first = table.take(pa.array(starts))
    return _rows(
        first,
        "class",
        score=_floats(first, "presence"),
        doubt=doubt,
        share=share,
        threshold=threshold[starts],
        read=len(table),
    )


def _of_labels(table: pa.Table) -> Rows:
    """The first label of each image; in doubt if the second is as probable."""
    rank, row = table["rank"].to_numpy(), table["row"].to_numpy()
    best = np.flatnonzero(rank == 0)
    probability = _floats(table, "probability")
    after = np.minimum(best + 1, len(table) - 1)
    second = (rank[after] == 1) & (row[after] == row[best])
    doubt = np.where(second, probability[best] - probability[after], np.nan)
    first = table.take(pa.array(best))
    return _rows(first, "label", score=probability[best], doubt=doubt, read=len(table))


_ID = ["shard", "row", "key"]
KINDS = {
    "annotations": Kind(
        "annotations",
        [*_ID, "class_id", "class", "score", "presence", "area", "threshold", "rle.size"],
        "class",
        _of_annotations,
        has_masks=True,
        counts_images=True,
        asks_every_image=False,
    ),
    "masks": Kind(
        "masks",
        [*_ID, "prompt", "score_max", "area", "threshold", "rle.size"],
        "prompt",
        _of_masks,
        has_masks=True,
        counts_images=True,
        asks_every_image=True,
    ),
    "labels": Kind(
        "labels",
        [*_ID, "rank", "label", "probability"],
        "label",
        _of_labels,
        has_masks=False,
        counts_images=False,
        asks_every_image=False,
    ),
}
"""By the table; of a run with several of them the first is shown."""
