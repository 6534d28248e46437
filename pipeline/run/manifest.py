"""The manifest of a run, `_run.json`: configuration, fingerprint, versions, counts."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, ClassVar, Protocol

from pipeline import __version__, storage
from pipeline.config.options import RunOptions
from pipeline.config.prompt import locate_image_prompts
from pipeline.errors import ChangedError, JobError, NotFoundError, UsageError
from pipeline.read.shard import Shard
from pipeline.schema import SCHEMA_VERSION, Table
from pipeline.write.layout import ERRORS, PROMPTS, RECEIPTS, REPORT, RUN, STAGING, SUCCESS
from pipeline.write.passes import read_added

INNER_RUN = "segment"  # in the output of label: the run that it made itself, and is cut from
DELETING = "being deleted"
"""The status of a run half deleted by --restart: the next command does the rest."""

_TRIES = 10
# Raised whenever the same configuration gives other rows: another rule of reading, decoding or of
# masks, another bound on what is decoded.
RESULTS_VERSION = 3


class JobConfig(Protocol):
    """The interface of a job's configuration."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def input(self) -> str:
        """The input, as the user wrote it."""
        ...

    @property
    def output(self) -> str:
        """Folder of the tables, as the user wrote it."""
        ...

    @property
    def run(self) -> RunOptions:
        """How the run deals with failures."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Options deciding the results."""
        ...


def new_record(
    config: JobConfig,
    shards: list[Shard],
    source: str,
    output: str,
    model: dict[str, Any],
    tables: dict[str, Table],
) -> dict[str, Any]:
    """The content of _run.json while the run is going on."""
    versions = {"schema_version": SCHEMA_VERSION, "results_version": RESULTS_VERSION}
    decides = {**config.fingerprint(), "input": source, **model, **versions}
    asked = asdict(config) | {"input": source, "output": output}
    # retry-failed may run in another folder
    for name in ("model", "labels", "ontology", "contact_sheet"):
        if isinstance(path := asked.get(name), str) and os.path.exists(path):
            asked[name] = os.path.abspath(path)
    if asked.get("image_prompt"):
        asked["image_prompt"] = locate_image_prompts(asked["image_prompt"])
    return {
        "status": "running",
        "fingerprint": json.loads(json.dumps(decides)),  # as it will be read back
        "config": asked,
        "input": {"shards": len(shards), "bytes": sum(shard.size_bytes for shard in shards)},
        "tables": list(tables),
        "versions": _versions(),
        "started_at": now(),
    }


def read_run(output: str) -> dict[str, Any] | None:
    """The content of _run.json; None if there is none. Raises UsageError if it is damaged."""
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


def is_free(output: str, source: str, tables: Iterable[str]) -> bool:
    """Whether a run with these tables may start in a folder: it is empty, or of the run it is cut
    from."""
    if source != storage.join(output, INNER_RUN):
        return storage.is_empty(output)
    folders = (*tables, ERRORS, STAGING, RECEIPTS, PROMPTS, REPORT)
    nothing = all(storage.is_empty(storage.join(output, name)) for name in folders)
    return nothing and not storage.list_files(output, recursive=False)


def write_run(output: str, record: dict[str, Any]) -> None:
    """Write _run.json, or replace any run's."""
    storage.write_bytes(storage.join(output, RUN), to_json(record))


def replace_run(output: str, record: dict[str, Any]) -> None:
    """Replace the _run.json of the same run.

    Raises JobError if another command has started it over or is deleting it: the other's record is
    never overwritten.
    """
    uri = storage.join(output, RUN)
    for _ in range(_TRIES):
        try:
            version = storage.stat_file(uri).version
            refuse_another_start(output, record)
            return storage.replace_file(uri, to_json(record), version)
        except (ChangedError, NotFoundError):
            continue  # another driver of the same run, or none of it: look again
    raise JobError(f"{output}: other commands are writing to it; run it again")


def refuse_another_start(output: str, record: dict[str, Any]) -> None:
    """Raise JobError unless _run.json is of the same run, and nobody is deleting it."""
    found = read_run(output)
    if found is None or found.get("status") == DELETING or name_run(found) != name_run(record):
        raise JobError(f"{output}: another command has started it over meanwhile")


def is_complete(output: str, record: dict[str, Any]) -> bool:
    """Whether _SUCCESS is there, of this run and of all prompts added to it.

    One of an earlier start says nothing, nor one from before an addition whose driver was killed.
    """
    try:
        said = storage.read_bytes(storage.join(output, SUCCESS)).decode("ascii", "replace")
    except NotFoundError:
        return False
    added = list(read_added(output))
    return said == name_success(record, added) and record.get("status") != DELETING


def name_success(record: dict[str, Any], added: Sequence[int]) -> str:
    """Content of _SUCCESS: the name of the run, and the first prompt of each addition."""
    return "+".join([name_run(record), *map(str, sorted(added))])


def refuse_other_run(output: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UsageError naming each field in which two fingerprints differ."""
    for name in ("schema_version", "results_version"):
        if found.get(name) != wanted[name]:
            raise UsageError(
                f"{output}: made by another version of clipseg-ray ({name} was {found.get(name)}, "
                f"now {wanted[name]}), whose layout or rows differ; choose another output, or "
                "--restart to delete it and start over"
            )
    fields = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    if fields:
        differences = "; ".join(
            f"{k} was {_short(found.get(k))}, now {_short(wanted.get(k))}" for k in fields
        )
        raise UsageError(
            f"{output}: holds another run ({differences}); "
            "choose another output, or --restart to delete it and start over"
            + (_hint_at_label(output, found) if fields == ["threshold"] else "")
        )


def _hint_at_label(output: str, found: dict[str, Any]) -> str:
    """Say how to have masks of another threshold without the model."""
    command = f"clipseg-ray label {shlex.quote(output)} LABELS --ontology FILE"
    if found.get("keep_probabilities", "none") != "none":
        return f". Or cut labels at any threshold, without the model: {command}"
    return (
        ". A run with --keep-probabilities 352 has labels of any threshold without the model: "
        f"{command}"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def to_json(record: dict[str, Any]) -> bytes:
    """The content of _run.json."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # of a path that is not UTF-8; valid JSON, too


def name_run(record: dict[str, Any]) -> str:
    """Hash the fingerprint and the start of a run: --restart makes it another run."""
    decides = json.dumps([record.get("fingerprint"), record.get("started_at")], sort_keys=True)
    return hashlib.sha256(decides.encode()).hexdigest()[:16]


def now() -> str:
    """The time as ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    names = ("ray", "torch", "pyarrow", "pillow", "numpy", "scipy", "tokenizers", "pycocotools")
    found = {name: version(name) for name in names}
    return {"clipseg_ray": __version__, "python": platform.python_version(), **found}
