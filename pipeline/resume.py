"""What earlier commands left in an output: what is still to do, and what is discarded for it."""

from __future__ import annotations

import sys
from dataclasses import replace

from pipeline import storage
from pipeline.added import read_added
from pipeline.commit import DECISION
from pipeline.receipts import (
    RECEIPTS,
    Receipt,
    is_added,
    list_receipts,
    of_pass,
    read_receipt,
    receipts_of,
    stem_of,
    version_hash,
)
from pipeline.shard import Shard
from pipeline.write import STAGING


def left_to_do(
    output: str, plans: dict[int, list[Shard]], tables: list[str]
) -> dict[int, list[Shard]]:
    """The shards without a receipt, of each pass; what is there of other content is discarded."""
    # Decisions before receipts: one that goes meanwhile has left its receipt.
    decided = _list_decisions(output)
    receipts = list_receipts(output)
    todo: dict[int, list[Shard]] = {first: [] for first in sorted(plans)}
    stale = []
    again: set[str] = set()  # shards of which the first pass is made (anew)
    for first, left in todo.items():
        for shard in plans[first]:
            name, version = stem_of(shard), version_hash(shard)
            versions = [receipt.version for receipt in receipts.get(name, [])]
            begun = shard.name in again and not receipts_of(output, replace(shard, first_prompt=0))
            if versions == [version] and not begun:
                continue
            left.append(shard)
            if first == 0:
                again.add(shard.name)
            if versions or decided.get(name, {version}) != {version}:
                stale.append(name)
    planned = {stem_of(shard) for plan in plans.values() for shard in plan}
    # Killed half-way, and gone since.
    stale += sorted(decided.keys() - planned - receipts.keys())
    for name in reversed(stale):  # what was added before what it was added to
        discard_pass(output, name, tables)
    return todo


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
        print(
            f"warning: {len(receipts)} finished shards are no longer in the input "
            f"({', '.join(names[:3])}{', ...' if len(receipts) > 3 else ''}): "
            "their rows stay in the tables and are not counted",
            file=sys.stderr,
        )
    return names


def discard_shard(output: str, shard: str, tables: list[str]) -> None:
    """Forget what a shard, named by its stem, has left: its rows are made anew.

    What was added goes before what it was added to, and each receipt last. Killed before, the
    receipt is still there, and the same is done again.
    """
    for first in sorted(read_added(output), reverse=True):
        discard_pass(output, f"{shard}{of_pass(first)}", tables)
    discard_pass(output, shard, tables)


def discard_pass(output: str, stem: str, tables: list[str]) -> None:
    """Forget what one pass over a shard has left."""
    for table in (*tables, "errors"):
        storage.delete_file(storage.join(output, table, f"{stem}.parquet"))
    storage.delete_folder(storage.join(output, STAGING, stem))
    storage.delete_folder(storage.join(output, RECEIPTS, stem))
