"""Commit a shard once all its rows are there: decision, parts, receipt.

    _staging/<id>/<version>.decision     the fragments chosen for the shard; create-only
    <table>/<id>.parquet                 the parts, made of these fragments and of no others
    _receipts/<id>/...json               the shard is finished (see receipts); create-only

An attempt after a kill, or beside another one, follows the decision already there. So every attempt
writes the same parts, and their number does not matter. A decision is deleted only after its
receipt exists, so look for a receipt again after creating one; if there is one, delete your
decision.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema, storage
from pipeline.errors import JobError, NotFoundError, StorageError
from pipeline.read.ranges import iter_rows
from pipeline.read.shard import Shard
from pipeline.write.fragments import Fragment, parse_fragment, read_fragment
from pipeline.write.layout import DECISION, ERRORS, Ledger, shard_id
from pipeline.write.merge import merge_fragments
from pipeline.write.parts import PartWriter, schemas_of
from pipeline.write.passes import keep_known_rows
from pipeline.write.receipts import read_receipt, receipts_of, write_receipt


def finish_shard(
    ledger: Ledger,
    shard: Shard,
    fragments: list[str],
    read: tuple[int, int],
    tables: dict[str, schema.Table],
) -> dict[str, Any]:
    """Merge the fragments of a shard into its parts, then write its receipt. Returns the receipt.

    `read`: the numbers of records in the shard, and of samples without an image. Memory is bounded
    by a row group of each table and a few fragments, whatever the shard. Raises JobError if the
    fragments do not hold every record exactly once, as an image or as an error, and every image's
    rows of the other tables; then nothing is decided or written.
    """
    decision = _decision_of(ledger, shard)
    total, skipped = read
    ours: dict[str, Any] = {"fragments": fragments, "total": total, "skipped": skipped}
    ours["attempt"] = uuid.uuid4().hex
    made_of = _checked(shard, ours, tables)
    try:
        storage.write_new(decision, json.dumps(ours).encode())
    except FileExistsError:  # another attempt was first, and may be through
        try:
            ours = _read_decision(decision)
            made_of = _checked(shard, ours, tables)
            return _write(ledger, shard, made_of, ours["skipped"], tables)
        except NotFoundError:
            return _receipt_there(ledger, shard)
    if receipts_of(ledger, shard):
        _empty_staging(ledger, shard)
        return _receipt_there(ledger, shard)
    try:
        return _write(ledger, shard, made_of, skipped, tables)
    except NotFoundError:
        return _receipt_there(ledger, shard)


def _decision_of(ledger: Ledger, shard: Shard) -> str:
    name = ledger.version(shard.version) + DECISION
    return storage.join(ledger.staging, shard_id(shard.name), name)


def _read_decision(uri: str) -> dict[str, Any]:
    """The content of a decision; a damaged one counts as gone. Raises NotFoundError."""
    try:
        content = json.loads(storage.read_bytes(uri))
        return {name: content[name] for name in ("fragments", "total", "skipped")}
    except (ValueError, KeyError, TypeError) as error:
        raise NotFoundError(f"{uri}: was damaged") from error


def _checked(
    shard: Shard, decision: dict[str, Any], tables: dict[str, schema.Table]
) -> list[Fragment]:
    """The fragments of a decision. Raises JobError unless every row is there exactly once."""
    total = decision["total"]
    found = [parse_fragment(name) for name in decision["fragments"]]
    fragments = [fragment for fragment in found if fragment]
    rows = sorted(chain.from_iterable(iter_rows(f.rows) for f in fragments if f.run == 0))
    images, failed = sum(f.images for f in fragments), sum(f.errors for f in fragments)
    outputs = sum(fragment.outputs for fragment in fragments)
    complete = len(fragments) == len(found) and rows == list(range(total))
    if not complete or images + failed != total or outputs != images * outputs_per_image(tables):
        came = f"{images} images with {outputs} rows of other tables, and {failed} errors"
        raise JobError(f"shard {shard.name}: {total} records read, but {came} came out")
    return fragments


def outputs_per_image(tables: dict[str, schema.Table]) -> int:
    """Rows of an image in all tables but `images`."""
    return sum(table.rows_per_image for name, table in tables.items() if name != "images")


def _write(
    ledger: Ledger,
    shard: Shard,
    fragments: Sequence[Fragment],
    skipped: int,
    tables: dict[str, schema.Table],
) -> dict[str, Any]:
    """Write the parts, then the receipt; every attempt writes the same bytes."""
    id_ = shard_id(shard.name)
    schemas = schemas_of(tables)
    merged = merge_fragments(fragments, lambda f: read_fragment(ledger, id_, f), schemas)
    if ledger.added:
        merged = keep_known_rows(ledger, shard, merged)
    with tempfile.TemporaryDirectory(prefix="clipseg-ray-") as folder:
        parts, images, failed, masks = _write_parts(ledger, id_, Path(folder), merged, schemas)
    errors = sum(row is not None for row, _ in failed)
    receipt = {
        "shard": shard.name,
        "uri": shard.uri,
        "version": shard.version,
        "rows_in": images + errors,
        "rows_ok": images,
        "rows_error": errors,
        "samples_without_image": skipped,
        "shard_error": next((reason for row, reason in failed if row is None), None),
        "found": dict(sorted(masks.found.items())),
        "prompted": masks.prompted,
        "parts": parts,
    }
    write_receipt(ledger, shard, receipt)
    _empty_staging(ledger, shard)
    return receipt


@dataclass
class _Masks:
    """Counts of the masks of a shard, for its receipt."""

    found: Counter[int] = field(default_factory=Counter)
    """Masks that are not empty, by prompt_id."""
    prompted: int = 0
    """Images with a first prompt: in a run of their own prompts, not all."""

    def add(self, rows: pa.Table) -> None:
        """Count rows of the table of masks."""
        self.found.update(rows.filter(pc.greater(rows["area"], 0))["prompt_id"].to_pylist())
        self.prompted += pc.sum(pc.equal(rows["prompt_id"], 0)).as_py() or 0


def _write_parts(
    ledger: Ledger,
    id_: str,
    folder: Path,
    merged: Iterable[tuple[str, pa.Table]],
    schemas: dict[str, pa.Schema],
) -> tuple[list[dict[str, Any]], int, list[tuple[int | None, str]], _Masks]:
    """Write the rows of all tables, streamed, and publish the parts.

    Returns the facts of each part for the receipt, the number of images, (row, reason) of errors,
    and counts of masks.
    """
    writers: dict[str, PartWriter] = {}
    failed: list[tuple[int | None, str]] = []
    masks = _Masks()
    images, last = 0, None
    counted = next(iter(schemas))
    for name, rows in merged:
        if name == counted:  # rows of an image stand together
            numbers = pc.unique(rows["row"])
            images += len(numbers) - (numbers[0].as_py() == last)
            last = numbers[-1].as_py()
        elif name == ERRORS:
            pairs = zip(rows["row"].to_pylist(), rows["reason"].to_pylist(), strict=True)
            failed += pairs
        if name == "masks":
            masks.add(rows)
        if name == "images" and ledger.added:
            continue
        if name not in writers:
            writers[name] = PartWriter(folder / f"{name}.parquet", schemas[name])
        writers[name].add(rows)
    parts = []
    for name in schemas:
        if name in writers:
            facts = writers[name].close()
            path = ledger.part(name, id_)
            storage.put_file(writers[name].path, storage.join(ledger.output, path))
            parts.append({"table": name, "path": path, **facts})
    return parts, images, failed, masks


def _receipt_there(ledger: Ledger, shard: Shard) -> dict[str, Any]:
    """Read the receipt of another attempt.

    Without one, delete the decision, as its fragments are gone, and raise JobError.
    """
    for receipt in receipts_of(ledger, shard):
        return read_receipt(ledger, shard_id(shard.name), receipt)
    storage.delete_file(_decision_of(ledger, shard))
    raise JobError(f"shard {shard.name}: its fragments are gone; run it again")


def _empty_staging(ledger: Ledger, shard: Shard) -> None:
    """Delete the staged files of a finished shard; later additions go when the run is closed."""
    with contextlib.suppress(StorageError):
        storage.delete_folder(storage.join(ledger.staging, shard_id(shard.name)))
