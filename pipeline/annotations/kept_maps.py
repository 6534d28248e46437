"""The probability maps kept by a run of `segment`, as an input: shards, and records of images.

A shard is one of the run's own input (see run.finished): its parts of `images`, of `probabilities`,
with those of later added prompts, and of `errors`. So labels have the rows and the errors of the
images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config.fine import FINE
from pipeline.errors import UsageError
from pipeline.read.shard import Shard, shard_from_row
from pipeline.run.finished import empty_record, read_finished
from pipeline.run.lifecycle import is_unfinished
from pipeline.run.manifest import read_run
from pipeline.schema import IMAGES, KEPT_MAPS
from pipeline.write.parts import open_part, read_part
from pipeline.write.passes import read_added

BATCH_BYTES = 2**26  # of maps in a batch
_ROWS_AT_ONCE = 64  # of a part: 8 MB of maps of 352 x 352,
_BYTES_AT_ONCE = 2**25  # and about as many of larger ones


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
    def embedded(self) -> bool:
        """Whether the run has embeddings of its images, too."""
        return bool(self.fingerprint.get("embed"))

    @property
    def prompt_ids(self) -> dict[str, int]:
        """By the prompt's name."""
        return {name: i for i, name in enumerate(self.prompts)}

    def facts(self) -> dict[str, Any]:
        """Facts of the run deciding the labels, beside its parts."""
        known = {n: self.fingerprint.get(n) for n in ("weights_hash", "keep_probabilities")}
        finer = {n: self.fingerprint[n] for n in FINE if n in self.fingerprint}
        return {"maps": known | finer}


def open_kept_maps(source: str) -> KeptMaps:
    """The run in a folder. Raises UsageError without one, or if it kept no maps."""
    output = storage.check_uri(source)
    record = read_run(output)
    if record is None:
        raise UsageError(
            f"{output}: not the OUTPUT of `segment`: it has no _run.json; to label images, name "
            "the --model that segments them first"
        )
    asked = record.get("fingerprint", {})
    if asked.get("job") != "segment":
        raise UsageError(
            f"{output}: of the job {asked.get('job')!r}; labels are cut from segment's"
        )
    if asked.get("prompt_column"):
        raise UsageError(
            f"{output}: its images have prompts of their own, from {asked['prompt_column']!r}: an "
            "ontology's classes need the same prompts for all"
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


class ReadKeptMaps:
    """The read stage: rows of shard_to_row -> schema.KEPT_MAPS, with the maps of `wanted` prompts
    in their order, and with the images' embeddings if `vectors`."""

    def __init__(self, wanted: Sequence[int], *, vectors: bool = False):
        self.wanted, self.vectors = list(wanted), vectors

    def __call__(self, shards: pa.Table) -> Iterator[pa.Table]:
        for row in shards.to_pylist():
            yield from read_kept_maps(shard_from_row(row), self.wanted, vectors=self.vectors)


def read_kept_maps(
    shard: Shard, wanted: list[int], *, vectors: bool = False, batch_bytes: int = BATCH_BYTES
) -> Iterator[pa.Table]:
    """The images of a shard with their maps, then failed ones, then the end record.

    An image without a map of every wanted prompt fails as no_map, one without a wanted embedding as
    no_vector; otherwise as read_finished has it. Raises CredentialsError.
    """

    def read(parts: list[str]) -> Iterator[pa.Table]:
        batch: list[dict[str, Any]] = []
        size_bytes = 0
        for record in _records(parts, wanted, vectors):
            batch.append(empty | record)
            size_bytes += len(batch[-1]["maps"])
            if size_bytes >= batch_bytes:
                yield pa.Table.from_pylist(batch, schema=KEPT_MAPS)
                batch, size_bytes = [], 0
        yield pa.Table.from_pylist(batch, schema=KEPT_MAPS)

    empty = empty_record(KEPT_MAPS)
    yield from read_finished(shard, read, KEPT_MAPS, lost="no_map")


def _records(parts: list[str], wanted: list[int], vectors: bool) -> Iterator[dict[str, Any]]:
    """The images of a shard, in order, of its parts of probabilities; without maps if one lacks.

    Raises JobError and StorageError for a damaged or missing part.
    """
    if not parts:
        return
    folder, _, name = min(parts, key=len).rpartition("/")  # of the first pass
    beside = storage.parent(folder)
    images = read_part(storage.join(beside, "images", name), IMAGES.names)
    known = _vectors(storage.join(beside, "embeddings", name)) if vectors else {}
    for image, found in _with_maps(images.sort_by("row").to_pylist(), parts, wanted):
        record = image | (_join(found, wanted) or {"stage": "read", "reason": "no_map"})
        if vectors:
            lost = {"maps": b"", "stage": "read", "reason": "no_vector"}
            record |= {"vector": known[image["row"]]} if image["row"] in known else lost
        yield record


def _vectors(uri: str) -> dict[int, bytes]:
    """The embedding of each row in a part, as float32."""
    part = read_part(uri, ["row", "vector"])
    vectors = part["vector"].combine_chunks().flatten().to_numpy().astype(np.float32)
    rows = part["row"].to_pylist()
    return {
        row: each.tobytes() for row, each in zip(rows, vectors.reshape(len(rows), -1), strict=True)
    }


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
    """The rows of a part for wanted prompts, sorted by row as they are."""
    with open_part(uri) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        size_bytes, rows = (sum(g.total_byte_size for g in groups), parquet.metadata.num_rows)
        at_once = min(_ROWS_AT_ONCE, max(1, _BYTES_AT_ONCE * rows // max(1, size_bytes)))
        for batch in parquet.iter_batches(
            at_once, columns=["row", "prompt_id", "size", "map"], use_threads=False
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
