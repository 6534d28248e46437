"""Prompts that were added to a run: what each addition asks, and what of a shard it counts.

    OUTPUT/_prompts/<first>.json    create-only; the prompts from number <first> on

An addition is one more pass over the shards, with fragments, parts and receipts of its own. It
covers the rows that came out well in the run's first pass: what failed there is accounted for.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import JobError, NotFoundError, UsageError
from pipeline.read.shard import Shard
from pipeline.schema import Table
from pipeline.write.parts import read_part
from pipeline.write.receipts import receipts_of, stem

PROMPTS = "_prompts"


def read_added(output: str) -> dict[int, list[str]]:
    """The additions to a run in their order: number of the first prompt -> prompts."""
    uris = [file.uri for file in storage.list_files(storage.join(output, PROMPTS))]
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


def tables_of_pass(tables: dict[str, Table], first: int, prompts: int) -> dict[str, Table]:
    """The tables of a pass; in an added one the images are only looked at, not written."""
    wanted = {n: t for n, t in tables.items() if first == 0 or t.per_prompt or n == "images"}
    return {
        name: table._replace(rows_per_image=prompts) if table.per_prompt else table
        for name, table in wanted.items()
    }


def only_known_rows(output: str, shard: Shard, found: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables of an added pass, with exactly the rows that the first pass has images of.

    Such a row of which nothing came this time, since the shard could not be read to its end, is
    an error with the shard's reason. Raises JobError where there is no reason.
    """
    images = _first_images(output, shard)
    kept = {n: t.filter(pc.is_in(t["row"], images["row"])) for n, t in found.items()}
    seen = pa.array(
        kept["images"]["row"].to_pylist() + kept["errors"]["row"].to_pylist(), pa.int64()
    )
    missing = images.filter(pc.invert(pc.is_in(images["row"], seen)))
    if len(missing):
        failed = found["errors"]
        why: list[dict[str, Any]] = failed.filter(pc.is_null(failed["row"])).to_pylist()
        if not why:
            raise JobError(f"shard {shard.name}: {len(missing)} rows of the first pass are gone")
        errors = [why[0] | row for row in missing.to_pylist()]
        more = pa.Table.from_pylist(errors, schema=failed.schema)
        kept["errors"] = pa.concat_tables([kept["errors"], more]).sort_by("row")
    return kept


def _first_images(output: str, shard: Shard) -> pa.Table:
    """Row and key of the images that came out well in the first pass."""
    uri = storage.join(output, "images", f"{stem(shard.name)}.parquet")
    images = pa.table({"row": pa.array([], pa.int64()), "key": pa.array([], pa.string())})
    with contextlib.suppress(NotFoundError):  # no image at all, if the receipt agrees
        images = read_part(uri, ["row", "key"]).combine_chunks()
    receipts = receipts_of(output, replace(shard, first_prompt=0))
    if [receipt.ok for receipt in receipts] != [len(images)]:
        raise JobError(f"shard {shard.name}: being made anew by another command; run it again")
    return images
