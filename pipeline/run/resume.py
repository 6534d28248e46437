"""Results of earlier commands in an output: find the work left, discard what no longer counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.read.ranges import format_rows, iter_rows
from pipeline.read.shard import Shard
from pipeline.schema import Table
from pipeline.write.commit import outputs_per_image
from pipeline.write.fragments import Fragment, choose_fragments, parse_fragment
from pipeline.write.layout import DECISION, ERRORS, Ledger, shard_id
from pipeline.write.parts import read_part
from pipeline.write.receipts import (
    Receipt,
    covers,
    find_replaced,
    is_borne_out,
    list_parts,
    list_receipts,
    read_receipt,
    receipts_of,
)

_AT_ONCE = 32  # parts of the errors table that are read


class Left(NamedTuple):
    """The work left in one pass over the shards."""

    todo: list[Shard]
    """Shards without a valid receipt; their `skip` names the rows in `kept`."""
    kept: dict[str, list[Fragment]]
    """Fragments of finished rows, by the name of a shard in `todo`."""
    stale: list[str]
    """Ids of shards whose files no longer count."""
    removed: list[str]
    """Ids of finished shards that are no longer in the input."""
    rows: int
    """Rows of the shards that are done."""


class Staged(NamedTuple):
    """Files of one shard in the staging folder."""

    decisions: set[str]
    """Versions of the shard whose fragments are decided."""
    fragments: list[Fragment]


class Listed(NamedTuple):
    """Files of one pass, by the ids of shards."""

    staged: dict[str, Staged]
    receipts: Mapping[str, list[Receipt]]
    parts: Mapping[str, int]
    """Their bytes together."""


def list_passes(ledgers: list[Ledger], tables: Iterable[str]) -> dict[int, Listed]:
    """List the files of all passes of a run, by the first prompt of each.

    One listing of each table serves all of them. Unfinished files of killed writers go.
    """
    others: list[str] = []
    # Staging before receipts: a decision that goes meanwhile has left its receipt. Receipts of the
    # first pass after those of additions, which need them. Parts are written before receipts, and
    # are listed after them.
    staged = {ledger.first_prompt: _list_staging(ledger) for ledger in ledgers}
    additions_first = sorted(ledgers, key=lambda ledger: ledger.first_prompt, reverse=True)
    receipts = {
        ledger.first_prompt: list_receipts(ledger, others=others) for ledger in additions_first
    }
    output = ledgers[0].output
    parts = list_parts(output, tables, others=others)
    if not storage.is_s3(output):
        others += [storage.join(output, name) for name, _ in storage.list_sizes(output)]
    storage.delete_unfinished(others)
    return {first: Listed(staged[first], receipts[first], parts[first]) for first in receipts}


def find_left(
    ledger: Ledger,
    shards: list[Shard],
    tables: dict[str, Table],
    listed: Mapping[int, Listed],
    *,
    forget: set[str],
) -> Left:
    """Find the shards without a receipt, or with parts of another size than in their receipt.

    `listed`: the files of this pass and of the first (see list_passes), the only ones looked at,
    whatever the number of shards. `forget`: ids of shards to process again in spite of their
    receipts.
    """
    staged, receipts, parts = listed[ledger.first_prompt]
    first = listed[0].receipts
    todo: list[Shard] = []
    rows_done = 0
    kept: dict[str, list[Fragment]] = {}
    stale = []
    matched = 0
    for shard in shards:
        id_, version = shard_id(shard.name), ledger.version(shard.version)
        matched += id_ in receipts
        found = receipts.get(id_, [])
        done = is_borne_out(found, version, parts.get(id_, 0)) and id_ not in forget
        if done and (not ledger.added or _covers(ledger, shard, found[0], first.get(id_, []))):
            rows_done += found[0].ok + found[0].error
            continue
        if not shard.version:  # it was not there when the input was listed, and may come back
            todo.append(shard)
            continue
        here = staged.get(id_, Staged(set(), []))
        if found or here.decisions - {version} or (id_ in parts and not here.decisions):
            stale.append(id_)
        else:
            some = [fragment for fragment in here.fragments if fragment.version == version]
            kept[shard.name] = choose_fragments(some, outputs_per_image(tables))
        rows = (row for f in kept.get(shard.name, []) for row in iter_rows(f.rows))
        todo.append(replace(shard, skip=format_rows(rows)))
    decided = {id_ for id_, here in staged.items() if here.decisions} - receipts.keys()
    planned: Set[str] = receipts.keys()
    if decided or matched < len(receipts):  # or they need not be held in memory
        planned = {shard_id(shard.name) for shard in shards}
    # Killed half-way, and gone from the input since. Others are being made by another driver.
    stale += sorted(decided - planned)
    gone = receipts.keys() - planned
    stale += sorted(find_replaced(ledger, shards, {id_: receipts[id_] for id_ in gone}))
    removed = sorted(gone - set(stale))
    return Left(todo, kept, stale, removed, rows_done)


def _covers(ledger: Ledger, shard: Shard, receipt: Receipt, first: list[Receipt]) -> bool:
    # The listing may have passed by the first receipt just before it came.
    return covers(receipt, first) or covers(
        receipt, receipts_of(replace(ledger, first_prompt=0), shard)
    )


def _list_staging(ledger: Ledger) -> dict[str, Staged]:
    """Shards in work when a run stopped, by id; one listing."""
    found: dict[str, Staged] = {}
    for uri in storage.list_names(ledger.staging):
        id_, name = uri.rsplit("/", 2)[1:]
        here = found.setdefault(id_, Staged(set(), []))
        if name.endswith(DECISION) and not name.startswith("."):
            here.decisions.add(name.removesuffix(DECISION))
        elif fragment := parse_fragment(name):
            here.fragments.append(fragment)
    return found


def read_names(
    ledger: Ledger, receipts: Mapping[str, list[Receipt]], limit: int = 100
) -> list[str]:
    """The names of the first `limit` of some finished shards, from their receipts."""
    some = sorted(receipts.items())[:limit]
    return [str(read_receipt(ledger, id_, found[0])["shard"]) for id_, found in some]


class Failures(NamedTuple):
    """Contents of the errors table."""

    reasons: Counter[str]
    """Failed rows for each reason, the shards' own failures among them."""
    retryable: int
    """Number of retryable failures."""
    shards: dict[str, bool]
    """Shards with failures: shard_id -> whether any is retryable."""

    def choose(self, *, every: bool) -> set[str]:
        """The shards with a retryable failure, or with any."""
        return {name for name, retryable in self.shards.items() if retryable or every}


def read_failures(output: str) -> Failures:
    """Read the errors of the finished shards; shards without any cost nothing."""
    files = storage.list_files(storage.join(output, ERRORS), recursive=False)
    uris = [file.uri for file in files if file.uri.endswith(".parquet")]
    reasons: Counter[str] = Counter()
    shards: dict[str, bool] = {}
    retryable = 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for rows in pool.map(_read_errors, uris):
            for row in rows:
                reasons[row["reason"]] += 1
                name = shard_id(row["shard"])
                shards[name] = shards.get(name, False) or row["retryable"]
                retryable += row["retryable"]
    return Failures(reasons, retryable, shards)


def _read_errors(uri: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_part(uri, ["shard", "reason", "retryable"]).to_pylist()
    return found


def discard_shard(ledger: Ledger, id_: str, tables: list[str]) -> None:
    """Forget the results of one pass over a shard, its receipt last.

    Killed before, the receipt is there without its parts: the pass counts as not done.
    """
    for table in (*tables, ERRORS):
        storage.delete_file(storage.join(ledger.output, ledger.part(table, id_)))
    storage.delete_folder(storage.join(ledger.staging, id_))
    storage.delete_folder(storage.join(ledger.receipts, id_))
