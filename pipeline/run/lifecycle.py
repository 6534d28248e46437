"""What a run was asked to do and what of it is done: `_run.json`, the receipts, `_SUCCESS`.

    OUTPUT/_run.json     the whole configuration, versions, counts; its fingerprint names what
                         decides the results, and another fingerprint is another run (see record)
    OUTPUT/_prompts/     prompts that were added to it (see added)
    OUTPUT/_receipts/    one file per finished shard, written last (see receipts and commit)
    OUTPUT/_SUCCESS      there when the receipts equal the plan

A run that was stopped is completed by the same command: shards with a receipt are not read again.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from typing import Any

from pipeline import storage
from pipeline.errors import JobError, StorageError, UsageError
from pipeline.read.shard import Shard
from pipeline.run.manifest import (
    DELETING,
    RUN,
    JobConfig,
    name_run,
    new_record,
    now,
    read_run,
    refuse_other_run,
    to_json,
)
from pipeline.run.resume import discard_pass, left_to_do, read_failures, report_removed
from pipeline.schema import Table
from pipeline.write.fragments import STAGING, write_empty_parts
from pipeline.write.passes import PROMPTS, add_prompts, read_added, tables_of_pass
from pipeline.write.receipts import (
    RECEIPTS,
    Receipt,
    covers,
    is_borne_out,
    list_parts,
    list_receipts,
    stem,
    stem_of,
    version_hash,
)

SUCCESS = "_SUCCESS"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job over one input into one output."""

    output: str
    record: dict[str, Any]
    """The content of _run.json."""
    plan: list[Shard]
    """Every shard of the input."""
    todo: list[Shard]
    """Those without a receipt."""
    tables: dict[str, Table]
    """The tables of the job beside `errors`."""
    max_error_rate: float
    """The share of failed rows, of 1,000 or more, at which the job stops."""
    prompts: list[str]
    """Those of this pass over the shards; empty for a job without."""
    first_prompt: int
    """The prompt_id of the first of them."""
    added: list[Run]
    """One more pass for each time that prompts were added, in their order."""

    @property
    def passes(self) -> list[Run]:
        """Of the run, then of what was added: an added one needs what those before it leave."""
        return [self, *self.added]


def open_run(
    config: JobConfig, plan: list[Shard], *, model: dict[str, Any], tables: dict[str, Table]
) -> Run:
    """Start a run in the config's output, or continue the one that is there.

    What the config and `model` say decides the results and is the run's fingerprint; only that
    there may be more prompts than before. Shards are discarded here and not earlier: by now it is
    known that they can be made anew. Raises UsageError if the output holds another run, or files
    that are no run's.
    """
    source, output = storage.check_uri(config.input), storage.check_uri(config.output)
    if f"{output}/".startswith(f"{source}/"):
        raise UsageError(f"{output}: lies inside the input, which would then read its own tables")
    record = new_record(config, plan, source, output, model, tables)
    found = read_run(output)
    if found is not None and (config.run.restart or found.get("status") == DELETING):
        _delete_run(output, found)
        storage.write_bytes(storage.join(output, RUN), to_json(record))
        found = record
    elif found is None:
        found = _start(output, record)
    prompts = _settle_prompts(output, found.get("fingerprint", {}), record["fingerprint"])
    record["started_at"] = found["started_at"]
    write_empty_parts(output, tables)
    name, retry = name_run(record), config.run.retry
    plans = {n: [replace(shard, first_prompt=n, run=name) for shard in plan] for n in prompts}
    forget = read_failures(output).choose(every=retry == "all") if retry != "none" else set()
    todo, stale, removed = left_to_do(output, plans, list(tables), forget)
    if any(todo.values()):
        storage.delete_file(storage.join(output, SUCCESS))  # of a smaller plan
        _warn_of_careless_storage(output)
    for discarded in stale:
        discard_pass(output, discarded, list(tables))
    record["plan"]["removed_shards"] = removed
    storage.write_bytes(storage.join(output, RUN), to_json(record))
    passes: list[Run] = []
    for first in sorted(prompts, reverse=True):
        of_pass = Run(
            output=output,
            record=record,
            plan=plans[first],
            todo=todo[first],
            tables=tables_of_pass(tables, first, len(prompts[first])),
            max_error_rate=config.run.max_error_rate,
            prompts=prompts[first],
            first_prompt=first,
            added=passes if first == 0 else [],
        )
        passes = [of_pass, *passes]
    return passes[0]


def _settle_prompts(
    output: str, found: dict[str, Any], wanted: dict[str, Any]
) -> dict[int, list[str]]:
    """Hold two fingerprints against each other, and write down prompts that are new.

    Returns the prompts of each pass, by the number of its first. A fingerprint's prompts are those
    that the run was started with. Raises UsageError for any difference but more prompts.
    """
    started_with, asked = found.get("prompts", []), wanted.get("prompts", [])
    added = read_added(output)
    known = [*started_with, *(prompt for some in added.values() for prompt in some)]
    if not set(known) <= set(asked):
        found = found | {"prompts": known}
    elif "prompts" in wanted:
        wanted["prompts"] = started_with
    refuse_other_run(output, found, wanted)
    new = set(asked) - set(known)
    if more := [prompt for prompt in asked if prompt in new]:
        storage.delete_file(storage.join(output, SUCCESS))
        add_prompts(output, len(known), more)
        added[len(known)] = more
    return {0: started_with, **added}


def close_run(run: Run, seconds: float) -> dict[str, int]:
    """Check that the receipts equal the plan, write the counts into _run.json, and _SUCCESS.

    `seconds`: what the shards that were left took. Returns the counts over all shards. Raises
    JobError if a shard has no receipt, or if meanwhile prompts were added or the run started over.
    """
    _refuse_another_start(run)
    receipts = list_receipts(run.output)
    parts = list_parts(run.output, list(run.tables))
    found: dict[str, Receipt] = {}
    plan = [shard for each in run.passes for shard in each.plan]
    for shard in plan:
        name = stem_of(shard)
        of_shard = receipts.pop(name, [])
        if is_borne_out(of_shard, version_hash(shard), parts.get(name, 0)):
            found[name] = of_shard[0]
    missing = [shard.name for shard in plan if not _is_done(shard, found)]
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise JobError(f"{len(missing)} shards were not finished ({some}, ...); run it again")
    _refuse_more_prompts(run)
    counts = _count(run, found)
    removed = report_removed(run.output, receipts)
    todo = [found[stem_of(shard)] for each in run.passes for shard in each.todo]
    images = sum(receipt.ok + receipt.error for receipt in todo)
    last = {"seconds": round(seconds, 2), "images": images, "images_per_s": images / seconds}
    record = run.record | {"status": "complete", "finished_at": now()}
    record |= {"counts": counts, "throughput": last, "removed_shards": removed}
    storage.write_bytes(storage.join(run.output, RUN), to_json(record))
    storage.write_bytes(storage.join(run.output, SUCCESS), b"")
    try:
        _refuse_more_prompts(run)  # added while we wrote that
    except JobError:
        storage.delete_file(storage.join(run.output, SUCCESS))
        raise
    with contextlib.suppress(StorageError):  # another driver may just be adding to it
        storage.delete_folder(storage.join(run.output, STAGING))
    return counts


def is_unfinished(output: str) -> bool:
    """Whether the folder holds a run that has not closed: rows of its tables may be missing."""
    has_run = storage.exists(storage.join(output, RUN))
    return has_run and not storage.exists(storage.join(output, SUCCESS))


def _is_done(shard: Shard, found: dict[str, Receipt]) -> bool:
    receipt = found.get(stem_of(shard))
    if receipt is None or shard.first_prompt == 0:
        return receipt is not None
    first = found.get(stem(shard.name))
    return first is not None and covers(receipt, [first])


def _refuse_another_start(run: Run) -> None:
    found = read_run(run.output)
    if found is None or name_run(found) != name_run(run.record):
        raise JobError(f"{run.output}: another command has started it over meanwhile")


def _refuse_more_prompts(run: Run) -> None:
    if read_added(run.output).keys() != {each.first_prompt for each in run.added}:
        raise JobError(f"{run.output}: prompts were added meanwhile; the same command tells which")


def _count(run: Run, found: dict[str, Receipt]) -> dict[str, int]:
    """Sums over receipts: shards, shards cut short, rows in, ok and error, and rows of tables."""
    receipts = [found[stem_of(shard)] for shard in run.plan]
    ok, error = sum(r.ok for r in receipts), sum(r.error for r in receipts)
    counts = {
        "shards": len(receipts),
        "shards_failed": sum(r.cut for r in receipts),
        "rows_in": ok + error,
        "rows_ok": ok,
        "rows_error": error,
        **{name: ok * table.rows_per_image for name, table in run.tables.items()},
    }
    for each in run.added:
        receipts = [found[stem_of(shard)] for shard in each.plan]
        counts["rows_error_later"] = counts.get("rows_error_later", 0)
        counts["rows_error_later"] += sum(r.error for r in receipts)
        for name, table in each.tables.items():
            if table.per_prompt:
                counts[name] += sum(r.ok for r in receipts) * table.rows_per_image
    return counts


def summary(run: Run, counts: dict[str, int]) -> str:
    """What a finished run tells its user: how much came out, and where it lies."""
    out = ", ".join(f"{counts[name]:,} {name}" for name in run.tables)
    lines = [
        f"{counts['rows_in']:,} images in {counts['shards']:,} shards: {out}, "
        f"{counts['rows_error']:,} errors, {counts['shards_failed']:,} shards not read to their end"
    ]
    lines += [f"  {storage.join(run.output, name)}/*.parquet" for name in (*run.tables, "errors")]
    if later := counts.get("rows_error_later"):
        lines.insert(
            1, f"  {later:,} images failed when prompts were added, and have no masks of these"
        )
    return "\n".join(lines)


def _start(output: str, record: dict[str, Any]) -> dict[str, Any]:
    """Write the record of a new run; returns that of another driver which was faster."""
    if not storage.is_empty(output):
        found = read_run(output)  # of a driver that began a moment ago
        if found is None:
            raise UsageError(
                f"{output}: holds files that are not from a run; choose another output"
            )
        return found
    try:
        storage.write_new(storage.join(output, RUN), to_json(record))
    except FileExistsError:
        return read_run(output) or record
    return record


def _warn_of_careless_storage(output: str) -> None:
    if storage.ignores_create_only(storage.join(output, STAGING)):
        print(
            f"warning: {output}: this storage lets a create-only write overwrite: "
            "never run two jobs into this output at the same time",
            file=sys.stderr,
        )


def _delete_run(output: str, record: dict[str, Any]) -> None:
    """Delete what a run left but its record, which says so meanwhile."""
    storage.write_bytes(storage.join(output, RUN), to_json(record | {"status": DELETING}))
    storage.delete_file(storage.join(output, SUCCESS))
    tables = [str(name) for name in record.get("tables", ())]
    for name in (*tables, "errors", STAGING, RECEIPTS, PROMPTS):
        if "/" not in name and name not in ("", ".", ".."):
            storage.delete_folder(storage.join(output, name))
