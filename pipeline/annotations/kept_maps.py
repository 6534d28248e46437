"""The probability maps that a run of `segment` kept, as an input: shards, and records of images.

A shard is one that the run was made of: its parts of `images`, of `probabilities` and of `errors`,
those of prompts that were added later among them. Together they account for every row, so labels
have the rows, and the errors, that the images have.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.errors import CredentialsError, JobError, RowError, StorageError, UsageError
from pipeline.read.records import shard_failure
from pipeline.read.shard import Shard, printable, shard_from_row
from pipeline.run.lifecycle import is_unfinished
from pipeline.run.manifest import read_run
from pipeline.schema import IMAGES, KEPT_MAPS
from pipeline.storage import Stored
from pipeline.write.parts import open_part, read_part
from pipeline.write.passes import read_added

BATCH_BYTES = 2**26  # of maps in a batch
TABLES = ("images", "probabilities", "errors")
_AT_ONCE = 32  # parts whose shard is looked up
_ROWS_AT_ONCE = 64  # of a part: 8 MB of maps of 352 x 352
_WHY = ("stage", "reason", "detail", "retryable")
NO_MAP = RowError("read", "no_map")
_EMPTY: dict[str, Any] = {
    f.name: "" if pa.types.is_string(f.type) else b"" if pa.types.is_large_binary(f.type) else 0
    for f in KEPT_MAPS
} | {"total": -1, "retryable": False}


@dataclass(frozen=True, kw_only=True)
class KeptMaps:
    """A run of `segment` with probability maps."""

    output: str
    prompts: list[str]
    """In the order of their prompt_id."""
    recipes: dict[str, Any]
    """Of prompts that are no phrase alone: see config.prompt.recipes."""
    fingerprint: dict[str, Any]
    unfinished: bool

    @property
    def prompt_ids(self) -> dict[str, int]:
        """By the prompt's name."""
        return {name: i for i, name in enumerate(self.prompts)}

    def facts(self) -> dict[str, Any]:
        """What of the run decides the labels, beside its parts."""
        names = ("weights_hash", "keep_probabilities")
        return {"maps": {name: self.fingerprint.get(name) for name in names}}


def open_kept_maps(source: str) -> KeptMaps:
    """The run in a folder. Raises UsageError where there is none, or it kept no maps."""
    output = storage.check_uri(source)
    record = read_run(output)
    if record is None:
        raise UsageError(f"{output}: not the OUTPUT of `segment`: it has no _run.json")
    asked = record.get("fingerprint", {})
    if asked.get("job") != "segment":
        raise UsageError(
            f"{output}: of the job {asked.get('job')!r}; labels are cut from segment's"
        )
    if asked.get("keep_probabilities", "none") == "none":
        raise UsageError(
            f"{output}: kept no probability maps: run `segment` into another output, with "
            "--ontology or --keep-probabilities"
        )
    added = itertools.chain.from_iterable(read_added(output).values())
    return KeptMaps(
        output=output,
        prompts=[*asked.get("prompts", []), *added],
        recipes=asked.get("recipes", {}),
        fingerprint=asked,
        unfinished=is_unfinished(output),
    )


def plan_kept_maps(kept: KeptMaps) -> list[Shard]:
    """The shards of a run, sorted by name, each with its parts.

    Reads the first row of a part of each. Raises JobError for a damaged part, UsageError where
    there are none.
    """
    parts: dict[str, list[Stored]] = {}
    for table in TABLES:
        for file in storage.list_files(storage.join(kept.output, table), recursive=False):
            name = file.uri.rpartition("/")[2]
            if name.endswith(".parquet") and name[0] not in "_.":
                stem = name.removesuffix(".parquet").partition(".from-")[0]
                parts.setdefault(stem, []).append(file)
    if not parts:
        raise UsageError(f"{kept.output}: no images in it yet")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        names = pool.map(_read_name, [files[0] for files in parts.values()])
        shards = [_shard(kept, *pair) for pair in zip(names, parts.values(), strict=True)]
    return sorted(shards, key=lambda shard: shard.name)


def _read_name(file: Stored) -> str:
    """The shard that a part is of, as its first row says."""
    with open_part(file.uri, file.version) as parquet:
        first = next(parquet.iter_batches(1, columns=["shard"]), None)
        if first is None:
            raise JobError(f"{file.uri}: a part without rows")
        return str(first["shard"][0])


def _shard(kept: KeptMaps, name: str, files: list[Stored]) -> Shard:
    seen = "".join(f"{file.uri}\0{file.size_bytes}\0{file.version}\n" for file in files)
    start = len(kept.output.rstrip("/")) + 1
    return Shard(
        name=name,
        uri=kept.output,
        format="probabilities",
        size_bytes=sum(file.size_bytes for file in files),
        version=hashlib.sha256(seen.encode("utf-8", "surrogateescape")).hexdigest(),
        files=tuple(file.uri[start:] for file in files),
    )


class ReadKeptMaps:
    """The read stage: rows of shard_to_row -> schema.KEPT_MAPS, with the maps of `wanted` prompts
    in that order."""

    def __init__(self, wanted: Sequence[int]):
        self.wanted = list(wanted)

    def __call__(self, shards: pa.Table) -> Iterator[pa.Table]:
        for row in shards.to_pylist():
            yield from read_kept_maps(shard_from_row(row), self.wanted)


def read_kept_maps(
    shard: Shard, wanted: list[int], *, batch_bytes: int = BATCH_BYTES
) -> Iterator[pa.Table]:
    """The images of a shard with their maps, then those that failed, then the end record.

    An image without a map of every wanted prompt fails: as the errors say, or as no_map. Damage and
    failures of storage become a reason of the shard. Raises CredentialsError.
    """
    common = {**_EMPTY, "shard": shard.name, "version": shard.version}
    failed: dict[int | None, dict[str, Any]] = {}
    seen: set[int] = set()
    batch: list[dict[str, Any]] = []
    size_bytes = 0
    try:
        for record in _records(shard, wanted, failed):
            seen.add(record["row"])
            batch.append(common | record)
            size_bytes += len(record.get("maps", b""))
            if size_bytes >= batch_bytes:
                yield pa.Table.from_pylist(batch, schema=KEPT_MAPS)
                batch, size_bytes = [], 0
    except CredentialsError:
        raise
    except StorageError as error:
        failed[None] = _why(shard_failure(error))
    except JobError as error:
        failed[None] = _why(RowError("read", "shard_corrupt", printable(str(error))))
    end = {"row": -1, **_only_why(failed.pop(None, {}))}
    total = max([-1, *seen, *(row for row in failed if row is not None)]) + 1
    lost = {row: {"row": row, **_why(NO_MAP)} for row in range(total)} | failed
    rest = [record for row, record in lost.items() if row not in seen]
    batch += [common | record for record in [*rest, end | {"total": total}]]
    yield pa.Table.from_pylist(batch, schema=KEPT_MAPS)


def _records(
    shard: Shard, wanted: list[int], failed: dict[int | None, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The images of a shard, in order; into `failed`, by row, what the errors say of others.

    None stands for the shard itself. Raises JobError and StorageError where a part is damaged.
    """
    uris: dict[str, list[str]] = {table: [] for table in TABLES}
    for path in shard.files:
        uris[path.partition("/")[0]].append(storage.join(shard.uri, path))
    for uri in sorted(uris["errors"], reverse=True):  # the first pass has the last word
        for error in read_part(uri, ["row", "key", *_WHY]).to_pylist():
            if error["row"] is not None or ".from-" not in uri:
                failed[error["row"]] = error
    images = [
        row
        for uri in uris["images"]
        for row in read_part(uri, IMAGES.names).sort_by("row").to_pylist()
    ]
    for image, found in _with_maps(images, uris["probabilities"], wanted):
        maps = _join(found, wanted)
        error = _only_why(failed.get(image["row"], {})) or _why(NO_MAP)
        yield image | (error if maps is None else maps)


def _with_maps(
    images: list[dict[str, Any]], uris: list[str], wanted: list[int]
) -> Iterator[tuple[dict[str, Any], dict[int, dict[str, Any]]]]:
    """Each image with its maps by prompt_id: rows of schema.PROBABILITIES."""
    streams = [_stream(uri, set(wanted)) for uri in uris]
    heads = [next(stream, None) for stream in streams]
    for image in images:
        found: dict[int, dict[str, Any]] = {}
        for i, stream in enumerate(streams):
            while (head := heads[i]) is not None and head["row"] <= image["row"]:
                if head["row"] == image["row"]:
                    found[head["prompt_id"]] = head
                heads[i] = next(stream, None)
        yield image, found


def _stream(uri: str, wanted: set[int]) -> Iterator[dict[str, Any]]:
    """The rows of a part that are of wanted prompts, sorted by row as they are."""
    with open_part(uri) as parquet:
        for batch in parquet.iter_batches(
            _ROWS_AT_ONCE, columns=["row", "prompt_id", "size", "map"], use_threads=False
        ):
            for i, prompt_id in enumerate(batch["prompt_id"].to_pylist()):
                if prompt_id in wanted:
                    yield {name: batch[name][i].as_py() for name in batch.schema.names}


def _join(found: dict[int, dict[str, Any]], wanted: list[int]) -> dict[str, Any] | None:
    """The maps of an image one after the other; None unless all are there, of one size."""
    rows = [found[i] for i in wanted if i in found]
    sizes = {(*row["size"], len(row["map"])) for row in rows}
    if len(rows) != len(wanted) or len(sizes) != 1:
        return None
    height, width, length = sizes.pop()
    if height < 1 or width < 1 or height * width != length:
        return None
    maps = b"".join(row["map"] for row in rows)
    return {"map_height": height, "map_width": width, "maps": maps}


def _why(error: RowError) -> dict[str, Any]:
    return {name: getattr(error, name) for name in _WHY}


def _only_why(error: dict[str, Any]) -> dict[str, Any]:
    return {name: error[name] for name in _WHY if name in error}
