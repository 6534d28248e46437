"""The end of a run: receipts held against the input, counts into _run.json, `_SUCCESS`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import JobError, StorageError, one_line
from pipeline.run.lifecycle import Pass, Run
from pipeline.run.manifest import (
    name_success,
    now,
    refuse_another_start,
    replace_run,
)
from pipeline.run.resume import read_names
from pipeline.write.layout import (
    SUCCESS,
    shard_id,
)
from pipeline.write.passes import read_added
from pipeline.write.receipts import Receipt, covers, is_borne_out, list_parts, list_receipts

Receipts = dict[str, Receipt]


def close_run(
    run: Run,
    seconds: float,
    lost: dict[str, str] | None = None,
    stages: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Check that the receipts equal the shards, write the counts into _run.json, and _SUCCESS.

    `seconds`: duration of the passes. `lost`: by the name of a shard, what of it the storage did
    not give. `stages`: seconds that each was busy. Returns the counts over all shards. Raises
    JobError if a shard has no receipt, or if meanwhile prompts were added or the run started over.
    """
    refuse_another_start(run.output, run.record)
    listed = [list_receipts(each.ledger) for each in run.passes]
    parts = list_parts(run.output, run.tables)  # after the receipts: they are written before them
    ids = {shard.name: shard_id(shard.name) for shard in run.first.shards}
    found = [
        _borne_out(each, ids, receipts, parts[each.ledger.first_prompt])
        for each, receipts in zip(run.passes, listed, strict=True)
    ]
    missing = {
        name
        for each, receipts in zip(run.passes, found, strict=True)
        for name, id_ in ids.items()
        if id_ not in receipts or (each.ledger.added and not _covers_first(id_, receipts, found[0]))
    }
    if missing:
        _refuse_unfinished(run, missing, lost or {})
    _refuse_more_prompts(run)
    counts = _count(run, found)
    removed = listed[0].keys() - set(ids.values())
    names = read_names(run.first.ledger, {id_: listed[0][id_] for id_ in removed})
    if names:
        run.notes.append(_note_removed(len(removed), names))
    todo = [r[ids[s.name]] for p, r in zip(run.passes, found, strict=True) for s in p.todo]
    images = sum(receipt.ok + receipt.error for receipt in todo)
    last: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "images": images,
        "images_per_s": images / seconds,
    }
    last["stages"] = {name: round(busy, 3) for name, busy in (stages or {}).items()}
    run.record["throughput"] = last
    record = run.record | {"status": "complete", "finished_at": now()}
    record |= {"counts": counts, "removed_shards": names}
    replace_run(run.output, record)
    said = name_success(record, [each.ledger.first_prompt for each in run.passes[1:]])
    storage.write_bytes(storage.join(run.output, SUCCESS), said.encode())
    try:  # while we wrote that
        refuse_another_start(run.output, record)
        _refuse_more_prompts(run)
    except JobError:
        storage.delete_file(storage.join(run.output, SUCCESS))
        raise
    for each in run.passes:
        with contextlib.suppress(StorageError):  # another driver may just be adding to it
            storage.delete_folder(each.ledger.staging)
    return counts


def _borne_out(
    of_pass: Pass,
    ids: dict[str, str],
    receipts: dict[str, list[Receipt]],
    parts: Mapping[str, int],
) -> Receipts:
    """The receipts of a pass with parts of the right size, by shard id."""
    found = {}
    for shard in of_pass.shards:
        id_ = ids[shard.name]
        some = receipts.get(id_, [])
        if is_borne_out(some, of_pass.ledger.version(shard.version), parts.get(id_, 0)):
            found[id_] = some[0]
    return found


def _covers_first(id_: str, receipts: Receipts, first: Receipts) -> bool:
    return id_ in first and covers(receipts[id_], [first[id_]])


def _refuse_unfinished(run: Run, missing: set[str], lost: dict[str, str]) -> None:
    """Record the missing shards, and raise JobError."""
    order = sorted(missing, key=lambda name: (name not in lost, name))
    note_missing(run, {name: lost.get(name, "not finished") for name in order})
    size = sum(shard.size_bytes for shard in run.first.shards if shard.name in missing)
    whole = sum(shard.size_bytes for shard in run.first.shards)
    what = f"{len(missing):,} of {len(run.first.shards):,} shards are not complete"
    share = f" ({size / whole:.0%} of the bytes)" if size else ""
    some = "; ".join(
        f"{one_line(name)} {one_line(lost[name], 200)}".strip() if name in lost else one_line(name)
        for name in order[:3]
    )
    more = ", ..." if len(order) > 3 else ""
    raise JobError(f"{what}{share}: {some}{more}; the same command takes them up again")


def note_missing(run: Run, missing: dict[str, str]) -> None:
    """Write down for `status` that the run is not complete: the names of shards, and why."""
    run.record["status"] = "incomplete"
    run.record["missing"] = dict(list(missing.items())[:100])
    replace_run(run.output, run.record)


def _refuse_more_prompts(run: Run) -> None:
    if read_added(run.output).keys() != {each.ledger.first_prompt for each in run.passes[1:]}:
        raise JobError(f"{run.output}: prompts were added meanwhile; the same command tells which")


def _note_removed(count: int, names: list[str]) -> str:
    shown = ", ".join(map(one_line, names[:3]))
    return (
        f"warning: {count} finished shards are no longer in the input "
        f"({shown}{', ...' if count > 3 else ''}): "
        "their rows stay in the tables and are not counted"
    )


def _count(run: Run, found: list[Receipts]) -> dict[str, int]:
    """Sums over receipts: shards, shards cut short, rows in, ok and error, and rows of tables."""
    receipts = list(found[0].values())
    ok, error = sum(r.ok for r in receipts), sum(r.error for r in receipts)
    counts = {
        "shards": len(receipts),
        "shards_failed": sum(r.cut for r in receipts),
        "rows_in": ok + error,
        "rows_ok": ok,
        "rows_error": error,
        "samples_without_image": sum(r.skipped for r in receipts),
        **{name: ok * t.rows_per_image for name, t in run.tables.items() if t.rows_per_image},
    }
    for each, of_pass in zip(run.passes[1:], found[1:], strict=True):
        receipts = list(of_pass.values())
        counts["rows_error_later"] = counts.get("rows_error_later", 0)
        counts["rows_error_later"] += sum(r.error for r in receipts)
        for name, table in each.tables.items():
            if table.per_prompt:
                counts[name] += sum(r.ok for r in receipts) * table.rows_per_image
    return counts
