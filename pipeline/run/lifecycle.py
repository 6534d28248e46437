"""A run as it is opened: `_run.json`, and the passes over its shards with what each has left.

The same command completes a stopped run: shards with a receipt and rows in fragments are not read
again. write.layout has the names of all files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.errors import UsageError
from pipeline.read.recognize import LeftOut, describe_left_out
from pipeline.read.shard import Shard
from pipeline.run.manifest import (
    DELETING,
    JobConfig,
    is_complete,
    is_free,
    name_run,
    new_record,
    read_run,
    refuse_other_run,
    replace_run,
    to_json,
    write_run,
)
from pipeline.run.resume import discard_shard, find_left, list_passes, read_failures
from pipeline.run.sample import choose_sample, describe_whole
from pipeline.schema import Table
from pipeline.write.fragments import Fragment
from pipeline.write.layout import (
    ERRORS,
    PROMPT_VECTORS,
    PROMPTS,
    RECEIPTS,
    REPORT,
    RUN,
    STAGING,
    SUCCESS,
    Ledger,
)
from pipeline.write.parts import write_empty_parts
from pipeline.write.passes import add_prompts, read_added, tables_of_pass


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over the shards of a run: its first prompts, or some added later."""

    ledger: Ledger
    shards: list[Shard]
    """Every shard of the input."""
    todo: list[Shard]
    """Shards without a receipt; `skip` names their finished rows."""
    rows: int
    """Rows of the other shards, which are done."""
    kept: dict[str, list[Fragment]]
    """Fragments of the finished rows, by the name of a shard in `todo`."""
    tables: dict[str, Table]
    """The tables of the pass beside `errors`."""
    prompts: list[str]
    """Empty for a job without."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job over one input into one output."""

    output: str
    record: dict[str, Any]
    """The content of _run.json."""
    passes: list[Pass]
    """The run's own, then additions in their order: each needs the results of the first."""
    max_error_rate: float
    """Maximum share of failed rows, of 1,000 or more, before the job stops."""
    sample_s: float = 0.0
    """Seconds for a sample of `passes`, see run.sample; 0 for all of it."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user."""

    @property
    def first(self) -> Pass:
        """The pass of the run's first prompts."""
        return self.passes[0]

    @property
    def tables(self) -> dict[str, Table]:
        """The tables of the run beside `errors`."""
        return self.first.tables

    @property
    def is_done(self) -> bool:
        """Whether no shard is left to do."""
        return not any(each.todo for each in self.passes)


def open_run(
    config: JobConfig,
    shards: list[Shard],
    left_out: dict[str, LeftOut] | None = None,
    *,
    model: dict[str, Any],
    tables: dict[str, Table],
) -> Run:
    """Start a run in the config's output, or continue the one there.

    The config and `model` decide the results and are the run's fingerprint; more prompts than
    before are allowed. Shards are discarded here and not earlier: only now are they known to be
    reproducible. `left_out`: files of the input in no shard. Raises UsageError if the output holds
    another run, or files of no run.
    """
    source, output = storage.check_uri(config.input), storage.check_uri(config.output)
    if f"{output}/".startswith(f"{source}/"):
        raise UsageError(f"{output}: lies inside the input, which would then read its own tables")
    if config.run.only:
        shards = [shard for shard in shards if shard.name in config.run.only]
    whole = shards
    if config.run.sample_s:
        shards = choose_sample(shards)
    record = new_record(config, shards, source, output, model, tables)
    if config.run.sample_s:
        record["input"]["whole"] = describe_whole(whole)
    found = read_run(output)
    if found is not None and (config.run.restart or found.get("status") == DELETING):
        _delete_run(output, found)
        write_run(output, record)
        found = record
    elif found is None:
        found = _start(output, record)
    prompts = _settle_prompts(output, found.get("fingerprint", {}), record["fingerprint"])
    record |= {name: found[name] for name in ("started_at", "decode") if name in found}
    write_empty_parts(output, tables)
    retry = config.run.retry
    forget = read_failures(output).choose(every=retry == "all") if retry != "none" else set()
    passes: list[Pass] = []
    stale: list[tuple[Ledger, list[str]]] = []
    removed: list[str] = []
    run = name_run(record)
    ledgers = [Ledger(output=output, run=run, first_prompt=first) for first in sorted(prompts)]
    listed = list_passes(ledgers, tables)
    for ledger in ledgers:
        first = ledger.first_prompt
        of_pass = tables_of_pass(tables, ledger, len(prompts[first]))
        left = find_left(ledger, shards, of_pass, listed, forget=forget)
        stale.append((ledger, left.stale))
        removed = removed or left.removed
        passes.append(
            Pass(
                ledger=ledger,
                shards=shards,
                todo=left.todo,
                rows=left.rows,
                kept=left.kept,
                tables=of_pass,
                prompts=prompts[first],
            )
        )
    notes = [f"{source}: {describe_left_out(left_out)}"] if left_out else []
    record["input"]["left_out"] = {kind: some._asdict() for kind, some in (left_out or {}).items()}
    if any(each.todo for each in passes):
        storage.delete_file(storage.join(output, SUCCESS))  # of a smaller input
        notes += _warn_of_careless_storage(output)
    for ledger, ids in reversed(stale):  # an addition before its first pass
        for id_ in ids:
            discard_shard(ledger, id_, list(tables))
    record["input"]["removed_shards"] = len(removed)
    replace_run(output, record)
    return Run(
        output=output,
        record=record,
        passes=passes,
        max_error_rate=config.run.max_error_rate,
        sample_s=config.run.sample_s,
        notes=notes,
    )


def _settle_prompts(
    output: str, found: dict[str, Any], wanted: dict[str, Any]
) -> dict[int, list[str]]:
    """Compare two fingerprints, and record new prompts.

    Returns the prompts of each pass, by the number of its first. A fingerprint has the prompts of
    the first pass. Raises UsageError for any difference but more prompts.
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


def is_unfinished(output: str, *, new: bool = False) -> bool:
    """Whether the folder holds an unfinished run: rows of its tables may be missing.

    `new`: the answer without a run.
    """
    record = read_run(storage.check_uri(output))
    return new if record is None else not is_complete(output, record)


def _start(output: str, record: dict[str, Any]) -> dict[str, Any]:
    """Write the record of a new run; returns a faster driver's if there is one."""
    if not is_free(output, str(record["config"]["input"]), record["tables"]):
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


def _warn_of_careless_storage(output: str) -> list[str]:
    if not storage.ignores_create_only(storage.join(output, STAGING)):
        return []
    return [
        f"warning: {output}: this storage lets a create-only write overwrite: "
        "never run two jobs into this output at the same time"
    ]


def _delete_run(output: str, record: dict[str, Any]) -> None:
    """Delete the results of a run; its record stays, marked as being deleted."""
    write_run(output, record | {"status": DELETING})
    storage.delete_file(storage.join(output, SUCCESS))
    tables = [str(name) for name in record.get("tables", ())]
    storage.delete_file(storage.join(output, PROMPT_VECTORS))
    for name in (*tables, ERRORS, STAGING, RECEIPTS, PROMPTS, REPORT):
        if "/" not in name and name not in ("", ".", ".."):
            storage.delete_folder(storage.join(output, name))
