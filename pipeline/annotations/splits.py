"""The split of an image, and the name of its files: the same in every export.

Both come from hashes, so neither depends on the order of images or on how many there are.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.annotations.labelled import LabelledImage
from pipeline.errors import NotFoundError, UsageError
from pipeline.write.parts import open_part

GROUP_COLUMNS = ("shard", "key", "member")
_READABLE = 60  # characters of the key that a file name keeps


def name_image(image: LabelledImage) -> str:
    """A file name without ending, unique in an export: see name_row."""
    return name_row(image.shard, image.row, image.key)


def name_row(shard: str, row: int, key: str) -> str:
    """The name of a row's files in an export, without ending.

    ASCII letters, digits, hyphens: the end of the key, to be read by people, and a hash of shard,
    row and key: no two are equal, even without regard to case.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")[-_READABLE:].strip("-")
    who = f"{shard}\0{row}\0{key}"
    return f"{readable or 'image'}-{_hash(who).hexdigest()[:20]}"


class Splits:
    """Puts images into splits of the given shares (name -> 0..1, together 1)."""

    def __init__(self, shares: dict[str, float], group: str | None = None):
        """`group`: None, a column of GROUP_COLUMNS, or a Parquet file of groups (see Groups);
        images of one group come into one split."""
        self.names = list(shares)
        self._ends = np.cumsum(list(shares.values()))
        self._column = group if group in GROUP_COLUMNS else None
        self._groups = read_groups(group, "--group") if group and not self._column else None

    def find(self, image: LabelledImage) -> str:
        """The split of an image."""
        who = f"{image.shard}\0{image.key}"
        if self._column:
            who = f"\0{getattr(image, self._column)}"
        elif self._groups and (group := self._groups.find(image.shard, image.row)) is not None:
            who = f"\0{group}"
        place = int.from_bytes(_hash(who).digest()[:8], "big") / 2**64
        index = int(np.searchsorted(self._ends, place, side="right"))
        return self.names[min(index, len(self.names) - 1)]


class Groups:
    """The groups in a Parquet file with the columns shard, row and group, as `clipseg-ray
    duplicates --output` writes it. Holds 16 bytes a row."""

    def __init__(self, uri: str, option: str):
        """`option`: the option naming the file. Raises UsageError for what is no such file."""
        rows: dict[str, list[np.ndarray]] = defaultdict(list)
        groups: dict[str, list[np.ndarray]] = defaultdict(list)
        with open_part(uri) as parquet:
            names = parquet.schema_arrow.names
            if missing := [n for n in ("shard", "row", "group") if n not in names]:
                columns = f"one of {', '.join(GROUP_COLUMNS)}, or " * (option == "--group")
                raise UsageError(
                    f"{option} {uri}: no column {missing[0]!r} in it; give {columns}"
                    "the --output of clipseg-ray duplicates"
                )
            for batch in parquet.iter_batches(columns=["shard", "row", "group"], use_threads=False):
                shards = batch["shard"].dictionary_encode()
                of_shard = np.asarray(shards.indices)
                for i, shard in enumerate(shards.dictionary.to_pylist()):
                    found = of_shard == i
                    rows[shard].append(_integers(batch["row"], f"{option} {uri}")[found])
                    groups[shard].append(_integers(batch["group"], f"{option} {uri}")[found])
        self._of_shard = {}
        for shard, some in rows.items():
            order = np.argsort(numbers := np.concatenate(some))
            self._of_shard[shard] = (numbers[order], np.concatenate(groups[shard])[order])

    def find(self, shard: str, row: int) -> int | None:
        """The group of a row; None for a row in none."""
        if shard not in self._of_shard:
            return None
        rows, groups = self._of_shard[shard]
        i = int(np.searchsorted(rows, row))
        return int(groups[i]) if i < len(rows) and rows[i] == row else None


def read_groups(file: str, option: str) -> Groups:
    """The groups in a file; raises UsageError, naming the option, for one without any."""
    try:
        return Groups(storage.check_uri(file), option)
    except NotFoundError as error:
        columns = f", and none of {', '.join(GROUP_COLUMNS)}" * (option == "--group")
        raise UsageError(f"{option} {file}: no such file{columns}") from error


def _integers(column: pa.Array, where: str) -> np.ndarray:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise UsageError(f"{where}: rows and groups are whole numbers")
    return np.asarray(column, np.int64)


def _hash(text: str) -> Any:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass"))
