"""What earlier commands left in an output: what is still to do, and what is discarded for it."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import one_line
from pipeline.read.shard import Shard
from pipeline.write.commit import DECISION
from pipeline.write.fragments import STAGING
from pipeline.write.parts import read_part
from pipeline.write.receipts import (
    RECEIPTS,
    Receipt,
    covers,
    find_replaced,
    is_added,
    is_borne_out,
    list_parts,
    list_receipts,
    read_receipt,
    receipts_of,
    stem,
    stem_of,
    version_hash,
    without_pass,
)

_AT_ONCE = 32  # parts of the errors table that are read


class Left(NamedTuple):
    """What a run has to do."""

    todo: dict[int, list[Shard]]
    """Of each pass, by the number of its first prompt."""
    stale: list[str]
    """Stems of passes that left what no longer counts, in the order to discard it."""
    removed: int
    """How many finished shards are no longer in the input."""


def left_to_do(
    output: str, plans: dict[int, list[Shard]], tables: list[str], forget: set[str]
) -> Left:
    """What of each pass has no receipt, or one that its parts do not bear out.

    `forget`: stems of shards that count as not done whatever their receipts say.
    """
    # Decisions before receipts: one that goes meanwhile has left its receipt. Parts come before
    # receipts, and are listed after them.
    decided = _list_decisions(output)
    receipts = list_receipts(output)
    parts = list_parts(output, tables)
    todo: dict[int, list[Shard]] = {first: [] for first in sorted(plans)}
    stale = []
    for first, left in todo.items():
        for shard in plans[first]:
            name, version = stem_of(shard), version_hash(shard)
            found = receipts.get(name, [])
            if (
                is_borne_out(found, version, parts.get(name, 0))
                and without_pass(name) not in forget
                and (
                    first == 0
                    or covers(found[0], receipts.get(stem(shard.name), []))
                    # The listing may have passed by the first receipt just before it came.
                    or covers(found[0], receipts_of(output, replace(shard, first_prompt=0)))
                )
            ):
                continue
            left.append(shard)
            others = decided.get(name, set()) - {version}
            if found or others or (name in parts and name not in decided):
                stale.append(name)
    # Killed half-way, and gone since. Of a shard that is there, what is not in our plans is being
    # made by another driver, who has just added prompts.
    gone = sorted(decided.keys() - receipts.keys())
    planned = {stem(shard.name) for shard in plans[0]}
    stale += [name for name in gone if without_pass(name) not in planned]
    stale += sorted(find_replaced(output, plans[0], receipts))
    kept = {name for name in receipts if not is_added(name)} - set(stale)
    # What was added goes before what it was added to.
    return Left(todo, stale[::-1], len(kept - planned))


def _list_decisions(output: str) -> dict[str, set[str]]:
    """The shards that were being written when a run stopped: stem -> hashes of their versions."""
    found: dict[str, set[str]] = {}
    for file in storage.list_files(storage.join(output, STAGING)):
        folder, name = file.uri.rsplit("/", 2)[1:]
        if name.endswith(DECISION) and not name.startswith("."):
            found.setdefault(folder, set()).add(name.removesuffix(DECISION))
    return found


def report_removed(output: str, receipts: dict[str, list[Receipt]]) -> list[str]:
    """Say which finished shards are no longer in the input; their rows stay in the tables.

    Returns the names of the first 100.
    """
    receipts = {name: found for name, found in receipts.items() if not is_added(name)}
    some = sorted(receipts.items())[:100]
    names = [str(read_receipt(output, name, found[0])["shard"]) for name, found in some]
    if names:
        shown = ", ".join(map(one_line, names[:3]))
        print(
            f"warning: {len(receipts)} finished shards are no longer in the input "
            f"({shown}{', ...' if len(receipts) > 3 else ''}): "
            "their rows stay in the tables and are not counted",
            file=sys.stderr,
        )
    return names


class Failures(NamedTuple):
    """What the errors table holds."""

    reasons: Counter[str]
    """How many rows failed for each reason, the shards' own failures among them."""
    retryable: int
    """How many may work another time."""
    shards: dict[str, bool]
    """The shards with a failure: stem -> whether one of theirs may work another time."""

    def choose(self, *, every: bool) -> set[str]:
        """The shards with a failure that may work another time, or with any."""
        return {name for name, retryable in self.shards.items() if retryable or every}


def read_failures(output: str) -> Failures:
    """The errors of the finished shards; shards without any have no part and cost nothing."""
    files = storage.list_files(storage.join(output, "errors"), recursive=False)
    uris = [file.uri for file in files if file.uri.endswith(".parquet")]
    reasons: Counter[str] = Counter()
    shards: dict[str, bool] = {}
    retryable = 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows in pool.map(_read_errors, uris):
            for row in rows:
                reasons[row["reason"]] += 1
                name = stem(row["shard"])
                shards[name] = shards.get(name, False) or row["retryable"]
                retryable += row["retryable"]
    return Failures(reasons, retryable, shards)


def _read_errors(uri: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_part(uri, ["shard", "reason", "retryable"]).to_pylist()
    return found


def discard_pass(output: str, stem: str, tables: list[str]) -> None:
    """Forget what one pass over a shard has left, its receipt last.

    Killed before, the receipt is there without its parts: the pass counts as not done.
    """
    for table in (*tables, "errors"):
        storage.delete_file(storage.join(output, table, f"{stem}.parquet"))
    storage.delete_folder(storage.join(output, STAGING, stem))
    storage.delete_folder(storage.join(output, RECEIPTS, stem))
