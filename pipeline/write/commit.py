"""A shard whose rows are all there becomes final: decision, parts, receipt.

    _staging/<stem>/<version>.decision   which fragments the shard is made of; create-only
    <table>/<stem>.parquet               the parts, made of these fragments and of no others
    _receipts/<stem>/...json             the shard is finished (see receipts); create-only

Whoever is killed in between, or works on the same shard at the same time, follows the decision that
is there: every attempt writes the same parts, so it does not matter how many do, or how often. A
decision goes only after its receipt is there; whoever makes one therefore looks for a receipt
afterwards, and a decision that came too late is taken back.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema, storage
from pipeline.errors import JobError, NotFoundError, StorageError
from pipeline.read.shard import Shard
from pipeline.write.fragments import STAGING, assemble, schemas_of, write_part
from pipeline.write.passes import only_known_rows
from pipeline.write.receipts import read_receipt, receipts_of, stem_of, version_hash, write_receipt

DECISION = ".decision"


def finish_shard(
    output: str,
    shard: Shard,
    fragments: list[str],
    total: int,
    tables: dict[str, schema.Table],
) -> dict[str, Any]:
    """Make a shard's fragments its parts, and write its receipt, which is returned.

    Raises JobError if the fragments do not hold records 0..total-1 exactly once each, as images or
    as errors, and every image's rows of the other tables; then nothing is decided or written.
    """
    decision = _decision_of(output, shard)
    ours = {"attempt": uuid.uuid4().hex, "fragments": fragments, "total": total}
    try:
        found = _checked(output, shard, ours, tables)
        storage.write_new(decision, json.dumps(ours).encode())
    except (FileExistsError, NotFoundError):  # another attempt was first, and may be through
        try:
            theirs = json.loads(storage.read_bytes(decision))
            found = _checked(output, shard, theirs, tables)
        except NotFoundError:
            return _receipt_there(output, shard)
        return _write(output, shard, found, tables)
    if receipts_of(output, shard):
        _empty_staging(output, shard)
        return _receipt_there(output, shard)
    return _write(output, shard, found, tables)


def _decision_of(output: str, shard: Shard) -> str:
    return storage.join(output, STAGING, stem_of(shard), version_hash(shard) + DECISION)


def _checked(
    output: str, shard: Shard, decision: dict[str, Any], tables: dict[str, schema.Table]
) -> dict[str, pa.Table]:
    """All tables of a shard. Raises JobError unless every row is there exactly once."""
    found = assemble(output, decision["fragments"], schemas_of(tables))
    images = _images(found, tables)
    rows = sorted([*images.to_pylist(), *found["errors"]["row"].drop_null().to_pylist()])
    wanted = {name: len(images) * table.rows_per_image for name, table in tables.items()}
    complete = rows == list(range(decision["total"]))
    if not complete or any(len(found[name]) != n for name, n in wanted.items()):
        counts = {name: len(table) for name, table in found.items()}
        total = decision["total"]
        raise JobError(f"shard {shard.name}: {total} records read, but {counts} came out")
    return only_known_rows(output, shard, found) if shard.first_prompt else found


def _images(found: dict[str, pa.Table], tables: dict[str, schema.Table]) -> pa.Array:
    """The rows that came out well: every table has them, and `images`, where it is, once."""
    return pc.unique(found[next(iter(tables))]["row"])


def _write(
    output: str, shard: Shard, found: dict[str, pa.Table], tables: dict[str, schema.Table]
) -> dict[str, Any]:
    """The parts, then the receipt; the same bytes whoever does it."""
    failed = found["errors"]
    of_shard = failed.filter(pc.is_null(failed["row"]))
    images, errors = len(_images(found, tables)), len(failed) - len(of_shard)
    receipt = {
        "shard": shard.name,
        "uri": shard.uri,
        "version": shard.version,
        "rows_in": images + errors,
        "rows_ok": images,
        "rows_error": errors,
        "shard_error": next(iter(of_shard["reason"].to_pylist()), None),
        "parts": [
            write_part(output, name, stem_of(shard), table)
            for name, table in found.items()
            if len(table) and not (name == "images" and shard.first_prompt)
        ],
    }
    write_receipt(output, shard, receipt)
    _empty_staging(output, shard)
    return receipt


def _receipt_there(output: str, shard: Shard) -> dict[str, Any]:
    """The receipt that another attempt wrote.

    Raises JobError where there is none; a decision that cannot be followed any more is taken back.
    """
    for receipt in receipts_of(output, shard):
        return read_receipt(output, stem_of(shard), receipt)
    storage.delete_file(_decision_of(output, shard))
    raise JobError(f"shard {shard.name}: its fragments are gone; run it again")


def _empty_staging(output: str, shard: Shard) -> None:
    """Delete what is finished; what another driver is just adding goes when the run is closed."""
    with contextlib.suppress(StorageError):
        storage.delete_folder(storage.join(output, STAGING, stem_of(shard)))
