"""What a finished shard leaves behind: the names of its files, and its receipt.

    OUTPUT/<table>/<stem>.parquet                         its parts
    OUTPUT/_receipts/<stem>/<version>.<ok>-<error>.json   written last, and never overwritten

Of prompts that were added later, <stem> ends in `.from-<number of the first of them>`.

A receipt's name tells which shard of which content it is of, and how many rows came out well and
how many failed (`.cut` where the shard could not be read to its end): so the account of a million
shards is closed by one listing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.shard import Shard

RECEIPTS = "_receipts"
_NAME = re.compile(r"(?P<version>[0-9a-f]{8})\.(?P<ok>\d+)-(?P<error>\d+)(?P<cut>\.cut)?\.json")


class Receipt(NamedTuple):
    """What the name of a receipt tells."""

    version: str
    """As version_hash gives it."""
    ok: int
    error: int
    cut: bool
    """Whether the shard was not read to its end."""

    @property
    def name(self) -> str:
        """The file name."""
        return f"{self.version}.{self.ok}-{self.error}{'.cut' if self.cut else ''}.json"


def stem(shard: str, first_prompt: int = 0) -> str:
    """The file name, without ending, of everything a pass over this shard leaves behind.

    The readable part is cut and cleaned, since shard names are whatever the storage holds; the
    hash makes it unique.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "-", shard).strip("-")[-60:]
    return f"{readable}-{hashlib.sha256(shard.encode()).hexdigest()[:16]}{of_pass(first_prompt)}"


def of_pass(first_prompt: int) -> str:
    """How the stem of a pass ends."""
    return f".from-{first_prompt}" if first_prompt else ""


def is_added(stem: str) -> bool:
    """Whether a stem is of prompts that were added."""
    return ".from-" in stem


def stem_of(shard: Shard) -> str:
    """See stem."""
    return stem(shard.name, shard.first_prompt)


def version_hash(shard: Shard) -> str:
    """It changes when the shard's content does."""
    return hashlib.sha256(shard.version.encode()).hexdigest()[:8]


def receipts_of(output: str, shard: Shard) -> list[Receipt]:
    """The receipts of a shard with this content: none or one, unless a storage broke its word."""
    folder = storage.join(output, RECEIPTS, stem_of(shard))
    names = [file.uri.rpartition("/")[2] for file in storage.list_files(folder)]
    found = [receipt for name in names if (receipt := _parse(name))]
    return [receipt for receipt in found if receipt.version == version_hash(shard)]


def list_receipts(output: str) -> dict[str, list[Receipt]]:
    """Every receipt of a run, by the stem of its shard; one listing."""
    found: dict[str, list[Receipt]] = defaultdict(list)
    for file in storage.list_files(storage.join(output, RECEIPTS)):
        folder, name = file.uri.rsplit("/", 2)[1:]
        if receipt := _parse(name):
            found[folder].append(receipt)
    return dict(found)


def read_receipt(output: str, stem: str, receipt: Receipt) -> dict[str, Any]:
    """The content of a receipt: what was read, and each part with rows, bytes and hash."""
    uri = storage.join(output, RECEIPTS, stem, receipt.name)
    content: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return content


def write_receipt(output: str, shard: Shard, content: dict[str, Any]) -> None:
    """Write the receipt of a shard, unless this very one is there.

    Several attempts at one shard follow one decision (see commit), so theirs are the same.
    """
    receipt = Receipt(
        version_hash(shard),
        content["rows_ok"],
        content["rows_error"],
        content["shard_error"] is not None,
    )
    uri = storage.join(output, RECEIPTS, stem_of(shard), receipt.name)
    with contextlib.suppress(FileExistsError):
        storage.write_new(uri, json.dumps(content, indent=1).encode())


def _parse(name: str) -> Receipt | None:
    """None for what is no receipt: the unfinished file of a writer that was killed."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    return Receipt(match["version"], int(match["ok"]), int(match["error"]), bool(match["cut"]))
