"""Prompts added to a run: one more pass over the shards, with a ledger of its own.

An addition covers the images of the run's first pass; rows failed there are accounted for.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema, storage
from pipeline.errors import JobError, NotFoundError, UsageError
from pipeline.read.shard import Shard
from pipeline.schema import Table
from pipeline.write.layout import ERRORS, PROMPT_VECTORS, PROMPTS, Ledger, shard_id
from pipeline.write.parts import read_part
from pipeline.write.receipts import receipts_of


def read_added(output: str) -> dict[int, list[str]]:
    """The additions to a run in their order: number of the first prompt -> prompts."""
    files = storage.list_files(storage.join(output, PROMPTS), recursive=False)
    uris = [file.uri for file in files]
    firsts = [uri.rpartition("/")[2].removesuffix(".json") for uri in uris]
    found = {int(first): uri for first, uri in zip(firsts, uris, strict=True) if first.isdigit()}
    return {first: json.loads(storage.read_bytes(found[first])) for first in sorted(found)}


def add_prompts(output: str, first: int, prompts: list[str]) -> None:
    """Add prompts to a run. Raises UsageError if another command was faster with others."""
    uri = storage.join(output, PROMPTS, f"{first}.json")
    try:
        storage.write_new(uri, json.dumps(prompts, ensure_ascii=False).encode())
    except FileExistsError as error:
        if json.loads(storage.read_bytes(uri)) != prompts:
            message = f"{output}: another command is adding other prompts; try again when it ends"
            raise UsageError(message) from error


def write_prompt_vectors(output: str, vectors: np.ndarray) -> None:
    """Keep the embeddings (P, E) float32 of a run's prompts, in the order of their prompt_id."""
    data = io.BytesIO()
    np.save(data, vectors)
    storage.write_bytes(storage.join(output, PROMPT_VECTORS), data.getvalue())


def read_prompt_vectors(output: str) -> np.ndarray:
    """Vectors kept by write_prompt_vectors. Raises JobError if they are gone or damaged."""
    uri = storage.join(output, PROMPT_VECTORS)
    try:
        vectors: np.ndarray = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
    except (NotFoundError, ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise JobError(
            f"{uri}: gone or damaged; the command that made the run writes it"
        ) from error
    return vectors


def tables_of_pass(tables: dict[str, Table], ledger: Ledger, prompts: int) -> dict[str, Table]:
    """The tables of a pass; in an added one the images are only looked at, not written."""
    wanted = {n: t for n, t in tables.items() if not ledger.added or t.per_prompt or n == "images"}
    return {
        name: table._replace(rows_per_image=prompts) if table.per_prompt else table
        for name, table in wanted.items()
    }


def keep_known_rows(
    ledger: Ledger, shard: Shard, merged: Iterable[tuple[str, pa.Table]]
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of an added pass (see merge), exactly those with images in the first pass.

    Such a row, if missing now since the shard could not be read to its end, is an error with the
    shard's reason. Raises JobError if there is no reason.
    """
    images = _first_images(ledger, shard)
    failed = [schema.ERRORS.empty_table()]
    seen = [pa.array([], pa.int64())]
    for name, rows in merged:
        known = rows.filter(pc.is_in(rows["row"], images["row"]))
        if name == ERRORS:
            failed += [known, rows.filter(pc.is_null(rows["row"]))]
        elif len(known):
            yield name, known
        if name in ("images", ERRORS):
            seen += known["row"].chunks
    errors = pa.concat_tables(failed)
    of_shard: list[dict[str, Any]] = errors.filter(pc.is_null(errors["row"])).to_pylist()
    errors = errors.filter(pc.is_valid(errors["row"]))
    missing = images.filter(pc.invert(pc.is_in(images["row"], pa.concat_arrays(seen))))
    if len(missing):
        if not of_shard:
            raise JobError(f"shard {shard.name}: {len(missing)} rows of the first pass are gone")
        more = [of_shard[0] | row for row in missing.to_pylist()]
        errors = pa.concat_tables([errors, pa.Table.from_pylist(more, schema=schema.ERRORS)])
    if len(errors):
        yield ERRORS, errors.sort_by("row")


def _first_images(ledger: Ledger, shard: Shard) -> pa.Table:
    """Row and key of the images of the first pass."""
    first = replace(ledger, first_prompt=0)
    uri = storage.join(ledger.output, first.part("images", shard_id(shard.name)))
    images = pa.table({"row": pa.array([], pa.int64()), "key": pa.array([], pa.string())})
    with contextlib.suppress(NotFoundError):  # no image at all, if the receipt agrees
        images = read_part(uri, ["row", "key"]).combine_chunks()
    receipts = receipts_of(first, shard)
    if [receipt.ok for receipt in receipts] != [len(images)]:
        raise JobError(f"shard {shard.name}: being made anew by another command; run it again")
    return images
