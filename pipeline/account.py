"""What a run was asked to do and what of it is done: `_run.json`, the receipts, `_SUCCESS`.

    OUTPUT/_run.json     the whole configuration, versions, counts; its fingerprint names what
                         decides the results, and another fingerprint is another run
    OUTPUT/_receipts/    one file per finished shard, written last (see receipts and commit)
    OUTPUT/_SUCCESS      there when the receipts equal the plan

A run that was stopped is completed by the same command: shards with a receipt are not read again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Protocol

from pipeline import __version__, storage
from pipeline.commit import DECISION
from pipeline.config import RunOptions
from pipeline.errors import JobError, NotFoundError, StorageError, UsageError
from pipeline.receipts import (
    RECEIPTS,
    Receipt,
    find_replaced,
    list_receipts,
    read_receipt,
    stem,
    version_hash,
)
from pipeline.schema import SCHEMA_VERSION, Table
from pipeline.shard import Shard
from pipeline.write import STAGING, write_empty_parts

RUN, SUCCESS = "_run.json", "_SUCCESS"


class JobConfig(Protocol):
    """What the dataclass of a job's configuration offers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def input(self) -> str:
        """What is read, as the user wrote it."""
        ...

    @property
    def output(self) -> str:
        """Folder of the tables, as the user wrote it."""
        ...

    @property
    def run(self) -> RunOptions:
        """How the run deals with trouble."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What of the configuration decides the results."""
        ...


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


def open_run(
    config: JobConfig, plan: list[Shard], *, model: dict[str, Any], tables: dict[str, Table]
) -> Run:
    """Start a run in the config's output, or continue the one that is there.

    What the config and `model` say decides the results and is the run's fingerprint. Raises
    UsageError if the output holds another run, or files that are no run's.
    """
    source, output = storage.check_uri(config.input), storage.check_uri(config.output)
    if f"{output}/".startswith(f"{source}/"):
        raise UsageError(f"{output}: lies inside the input, which would then read its own tables")
    record = _record(config, plan, source, output, model, tables)
    found = read_run(output)
    if found is not None and config.run.restart:
        _delete_run(output, found)
        found = None
    if found is None:
        found = _start(output, record)
    _refuse_other_run(output, found.get("fingerprint", {}), record["fingerprint"])
    record["started_at"] = found["started_at"]
    write_empty_parts(output, tables)
    todo = _left(output, plan, list(tables))
    if todo:
        storage.delete_file(storage.join(output, SUCCESS))  # of a smaller plan
        _warn_of_careless_storage(output)
    storage.write_bytes(storage.join(output, RUN), _json(record))
    return Run(
        output=output,
        record=record,
        plan=plan,
        todo=todo,
        tables=tables,
        max_error_rate=config.run.max_error_rate,
    )


def read_run(output: str) -> dict[str, Any] | None:
    """The content of _run.json; None where there is none. Raises UsageError if it is damaged."""
    uri = storage.join(output, RUN)
    try:
        record = json.loads(storage.read_bytes(uri))
    except NotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{uri}: not readable ({error}); choose another output") from error
    if not isinstance(record, dict):
        raise UsageError(f"{uri}: not the record of a run; choose another output")
    return record


def close_run(run: Run, seconds: float) -> dict[str, int]:
    """Check that the receipts equal the plan, write the counts into _run.json, and _SUCCESS.

    `seconds`: what the shards that were left took. Returns the counts over all shards. Raises
    JobError if a shard has no receipt.
    """
    receipts = list_receipts(run.output)
    found: dict[str, Receipt] = {}
    for shard in run.plan:
        of_shard = receipts.pop(stem(shard.name), [])
        if [r.version for r in of_shard] == [version_hash(shard)]:
            found[shard.name] = of_shard[0]
    missing = [shard.name for shard in run.plan if shard.name not in found]
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise JobError(f"{len(missing)} shards were not finished ({some}, ...); run it again")
    counts = count(list(found.values()), run.tables)
    removed = _report_removed(run.output, receipts)
    images = sum(found[shard.name].ok + found[shard.name].error for shard in run.todo)
    last = {"seconds": round(seconds, 2), "images": images, "images_per_s": images / seconds}
    record = run.record | {"status": "complete", "finished_at": now()}
    record |= {"counts": counts, "throughput": last, "removed_shards": removed}
    storage.write_bytes(storage.join(run.output, RUN), _json(record))
    storage.write_bytes(storage.join(run.output, SUCCESS), b"")
    with contextlib.suppress(StorageError):  # another driver may just be adding to it
        storage.delete_folder(storage.join(run.output, STAGING))
    return counts


def is_unfinished(output: str) -> bool:
    """Whether the folder holds a run that has not closed: rows of its tables may be missing."""
    has_run = storage.exists(storage.join(output, RUN))
    return has_run and not storage.exists(storage.join(output, SUCCESS))


def count(receipts: list[Receipt], tables: dict[str, Table]) -> dict[str, int]:
    """Sums over receipts: shards, shards cut short, rows in, ok and error, and rows of tables."""
    ok, error = sum(r.ok for r in receipts), sum(r.error for r in receipts)
    return {
        "shards": len(receipts),
        "shards_failed": sum(r.cut for r in receipts),
        "rows_in": ok + error,
        "rows_ok": ok,
        "rows_error": error,
        **{name: ok * table.rows_per_image for name, table in tables.items()},
    }


def discard_shard(output: str, stem: str, tables: list[str]) -> None:
    """Forget what a shard has left: its rows are made anew. The receipt goes last.

    Killed before, the receipt is still there, and the same is done again.
    """
    for table in (*tables, "errors"):
        storage.delete_file(storage.join(output, table, f"{stem}.parquet"))
    storage.delete_folder(storage.join(output, STAGING, stem))
    storage.delete_folder(storage.join(output, RECEIPTS, stem))


def summary(run: Run, counts: dict[str, int]) -> str:
    """What a finished run tells its user: how much came out, and where it lies."""
    out = ", ".join(f"{counts[name]:,} {name}" for name in run.tables)
    lines = [
        f"{counts['rows_in']:,} images in {counts['shards']:,} shards: {out}, "
        f"{counts['rows_error']:,} errors, {counts['shards_failed']:,} shards not read to their end"
    ]
    lines += [f"  {storage.join(run.output, name)}/*.parquet" for name in (*run.tables, "errors")]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    names = ("ray", "torch", "pyarrow", "pillow", "numpy", "tokenizers", "pycocotools")
    found = {name: version(name) for name in names}
    return {"clipseg_ray": __version__, "python": platform.python_version(), **found}


def now() -> str:
    """The time as ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _refuse_other_run(output: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UsageError naming each field in which two fingerprints differ."""
    fields = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    if fields:
        differences = "; ".join(
            f"{k} was {_short(found.get(k))}, now {_short(wanted.get(k))}" for k in fields
        )
        raise UsageError(
            f"{output}: holds another run ({differences}); "
            "choose another output, or --restart to delete it and start over"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _record(
    config: JobConfig,
    plan: list[Shard],
    source: str,
    output: str,
    model: dict[str, Any],
    tables: dict[str, Table],
) -> dict[str, Any]:
    """What _run.json says while the run is going on."""
    decides = {**config.fingerprint(), "input": source, **model, "schema_version": SCHEMA_VERSION}
    return {
        "status": "running",
        "fingerprint": json.loads(json.dumps(decides)),  # as it will be read back
        "config": asdict(config) | {"input": source, "output": output},
        "plan": {"shards": len(plan), "bytes": sum(shard.size_bytes for shard in plan)},
        "tables": list(tables),
        "versions": _versions(),
        "started_at": now(),
    }


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
        storage.write_new(storage.join(output, RUN), _json(record))
    except FileExistsError:
        return read_run(output) or record
    return record


def _left(output: str, plan: list[Shard], tables: list[str]) -> list[Shard]:
    """The shards without a receipt; what is there of another content of theirs is discarded."""
    # Decisions before receipts: one that goes meanwhile has left its receipt.
    decided = _list_decisions(output)
    receipts = list_receipts(output)
    todo = []
    for shard in plan:
        name, version = stem(shard.name), version_hash(shard)
        versions = [receipt.version for receipt in receipts.get(name, [])]
        if versions == [version]:
            continue
        todo.append(shard)
        if versions or decided.get(name, {version}) != {version}:
            discard_shard(output, name, tables)
    planned = {stem(shard.name) for shard in plan}
    unfinished = decided.keys() - planned - receipts.keys()  # killed half-way, and gone since
    for name in unfinished | find_replaced(output, plan, receipts):
        discard_shard(output, name, tables)
    return todo


def _list_decisions(output: str) -> dict[str, set[str]]:
    """The shards that were being written when a run stopped: stem -> hashes of their versions."""
    found: dict[str, set[str]] = {}
    for file in storage.list_files(storage.join(output, STAGING)):
        folder, name = file.uri.rsplit("/", 2)[1:]
        if name.endswith(DECISION) and not name.startswith("."):
            found.setdefault(folder, set()).add(name.removesuffix(DECISION))
    return found


def _report_removed(output: str, receipts: dict[str, list[Receipt]]) -> list[str]:
    """Say which finished shards are no longer in the input; their rows stay in the tables.

    Returns the names of the first 100.
    """
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


def _warn_of_careless_storage(output: str) -> None:
    if storage.ignores_create_only(storage.join(output, STAGING)):
        print(
            f"warning: {output}: this storage lets a create-only write overwrite: "
            "never run two jobs into this output at the same time",
            file=sys.stderr,
        )


def _delete_run(output: str, record: dict[str, Any]) -> None:
    """Delete what a run left, the record last: killed before, --restart does the rest."""
    storage.delete_file(storage.join(output, SUCCESS))
    tables = [str(name) for name in record.get("tables", ())]
    for name in (*tables, "errors", STAGING, RECEIPTS):
        if "/" not in name and name not in ("", ".", ".."):
            storage.delete_folder(storage.join(output, name))
    storage.delete_file(storage.join(output, RUN))


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
