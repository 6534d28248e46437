"""What a run was asked to do and what of it is done: `_run.json`, the receipts, `_SUCCESS`.

    OUTPUT/_run.json     the whole configuration, versions, counts; its fingerprint names what
                         decides the results, and another fingerprint is another run
    OUTPUT/_receipts/    one file per finished shard, written last (see write.finish_shard)
    OUTPUT/_SUCCESS      there when the receipts equal the plan

A run that was stopped is completed by the same command: shards with a receipt are not read again.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Protocol

from pipeline import __version__, storage
from pipeline.errors import JobError, NotFoundError, UsageError
from pipeline.schema import SCHEMA_VERSION, Table
from pipeline.shard import Shard
from pipeline.write import RECEIPTS, STAGING, receipt_name, stem, write_empty_parts

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

    def fingerprint(self) -> dict[str, Any]:
        """What of the configuration decides the results."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job over one input into one output."""

    output: str
    record: dict[str, Any]
    """The content of _run.json."""
    todo: list[Shard]
    """Shards without a receipt."""
    done: list[str]
    """Names of the receipts that were there already."""
    tables: dict[str, Table]
    """The tables of the job beside `errors`."""


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
    fingerprint = {**config.fingerprint(), **model, "schema_version": SCHEMA_VERSION}
    fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read back
    record = {
        "status": "running",
        "fingerprint": fingerprint,
        "config": asdict(config) | {"input": source, "output": output},
        "versions": _versions(),
        "started_at": now(),
    }
    try:
        found = json.loads(storage.read_bytes(storage.join(output, RUN)))
    except NotFoundError:
        _refuse_foreign_files(output)
        storage.write_bytes(storage.join(output, RUN), _json(record))
        write_empty_parts(output, tables)
        return Run(output=output, record=record, todo=plan, done=[], tables=tables)
    except ValueError as error:
        raise UsageError(
            f"{output}/{RUN}: not readable ({error}); choose another output"
        ) from error
    _refuse_other_run(output, found.get("fingerprint", {}), fingerprint)
    record["started_at"] = found["started_at"]
    names = {receipt_name(shard.name, shard.version): shard for shard in plan}
    receipts = [r.uri.rpartition("/")[2] for r in storage.list_files(_receipts(output))]
    done = [name for name in receipts if name in names]
    stale = [name for name in receipts if name not in names]
    _discard(output, stale, {stem(shard.name) for shard in plan})
    finished = set(done)
    todo = [shard for name, shard in names.items() if name not in finished]
    if todo:
        storage.delete_file(storage.join(output, SUCCESS))  # of a smaller plan
    return Run(output=output, record=record, todo=todo, done=done, tables=tables)


def close_run(run: Run, receipts: list[dict[str, Any]], seconds: float) -> dict[str, int]:
    """Check that the account closes, write the counts into _run.json, and _SUCCESS.

    `receipts` are those of the shards finished now, `seconds` what they took. Returns the counts
    over all shards. Raises JobError if a shard has no receipt or a row is missing.
    """
    missing = {s.name for s in run.todo} - {r["shard"] for r in receipts}
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise JobError(f"{len(missing)} shards were not finished ({some}, ...); run it again")
    with ThreadPoolExecutor(32) as pool:
        earlier = list(pool.map(lambda name: _read_receipt(run.output, name), run.done))
    counts = count(earlier + receipts, run.tables)
    if counts["rows_in"] != counts["rows_ok"] + counts["rows_error"]:
        raise JobError(f"rows in and rows out differ: {counts}")
    images = sum(r["rows_in"] for r in receipts)
    last = {"seconds": round(seconds, 2), "images": images, "images_per_s": images / seconds}
    record = run.record | {"status": "complete", "finished_at": now()}
    record |= {"counts": counts, "throughput": last}
    storage.write_bytes(storage.join(run.output, RUN), _json(record))
    storage.write_bytes(storage.join(run.output, SUCCESS), b"")
    storage.delete_folder(storage.join(run.output, STAGING))
    return counts


def is_unfinished(output: str) -> bool:
    """Whether the folder holds a run that has not closed: rows of its tables may be missing."""
    has_run = storage.exists(storage.join(output, RUN))
    return has_run and not storage.exists(storage.join(output, SUCCESS))


def count(receipts: list[dict[str, Any]], tables: Iterable[str]) -> dict[str, int]:
    """Sums over receipts: shards, shards cut short, rows in, ok and error, and rows of tables."""
    rows: Counter[str] = Counter()
    for receipt in receipts:
        rows.update({part["table"]: part["rows"] for part in receipt["parts"]})
    return {
        "shards": len(receipts),
        "shards_failed": sum(r["shard_error"] is not None for r in receipts),
        "rows_in": sum(r["rows_in"] for r in receipts),
        "rows_ok": sum(r["rows_ok"] for r in receipts),
        "rows_error": sum(r["rows_error"] for r in receipts),
        **{name: rows[name] for name in tables},
    }


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


def _refuse_foreign_files(output: str) -> None:
    if not storage.is_empty(output):
        raise UsageError(f"{output}: holds files that are not from a run; choose another output")


def _refuse_other_run(output: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UsageError naming each field in which two fingerprints differ."""
    fields = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    if fields:
        differences = "; ".join(
            f"{k} was {_short(found.get(k))}, now {_short(wanted.get(k))}" for k in fields
        )
        raise UsageError(f"{output}: holds another run ({differences}); choose another output")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _discard(output: str, stale: list[str], planned: set[str]) -> None:
    """Forget shards that changed since: their rows are made anew. Others keep what they have."""
    for name in stale:
        if name.split(".")[0] in planned:
            for part in _read_receipt(output, name)["parts"]:
                storage.delete_file(storage.join(output, part["path"]))
            storage.delete_file(storage.join(_receipts(output), name))


def _receipts(output: str) -> str:
    return storage.join(output, RECEIPTS)


def _read_receipt(output: str, name: str) -> dict[str, Any]:
    receipt: dict[str, Any] = json.loads(storage.read_bytes(storage.join(_receipts(output), name)))
    return receipt


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
