"""What a finished shard leaves behind: the names of its files, and its receipt.

    OUTPUT/<table>/<stem>.parquet                         its parts
    OUTPUT/_receipts/<stem>/<version>.<ok>-<error>-<bytes>.json   written last, never overwritten

Of prompts that were added later, <stem> ends in `.from-<number of the first of them>`.

A receipt's name tells which shard of which content and run it is of, how many rows came out well
and how many failed (`.cut` where the shard could not be read to its end), and how many bytes its
parts have together: so listings alone close the account of a million shards, and show where a part
is gone or of another attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.read.shard import Shard, file_of

RECEIPTS = "_receipts"
_AT_ONCE = 32  # receipts that are read
_NAME = re.compile(r"([0-9a-f]{8})\.(\d+)-(\d+)-(\d+)(\.cut)?\.json")


class Receipt(NamedTuple):
    """What the name of a receipt tells."""

    version: str
    """As version_hash gives it."""
    ok: int
    error: int
    size_bytes: int
    """Of its parts in all tables."""
    cut: bool
    """Whether the shard was not read to its end."""

    @property
    def name(self) -> str:
        """The file name."""
        counts = f"{self.ok}-{self.error}-{self.size_bytes}"
        return f"{self.version}.{counts}{'.cut' if self.cut else ''}.json"


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


def without_pass(stem: str) -> str:
    """The stem of the shard's first pass."""
    return stem.partition(".from-")[0]


def covers(added: Receipt, first: list[Receipt]) -> bool:
    """Whether an added pass accounts for every image of the first one, whose receipts are given.

    It does not when the first was discarded and made anew meanwhile, with another outcome.
    """
    wanted = (added.version, added.ok + added.error)
    return [(receipt.version, receipt.ok) for receipt in first] == [wanted]


def is_borne_out(found: list[Receipt], version: str, size_bytes: int) -> bool:
    """Whether a pass has one receipt, of this version, and the bytes of its parts are as it says.

    They are not where a driver was killed while it discarded the pass, or where one that did not
    know of another's input wrote parts over the other's.
    """
    return [(receipt.version, receipt.size_bytes) for receipt in found] == [(version, size_bytes)]


def stem_of(shard: Shard) -> str:
    """See stem."""
    return stem(shard.name, shard.first_prompt)


def version_hash(shard: Shard) -> str:
    """It changes when the shard's content does, and from run to run."""
    return hashlib.sha256(f"{shard.run}{shard.version}".encode()).hexdigest()[:8]


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


def list_parts(output: str, tables: list[str]) -> dict[str, int]:
    """The bytes of all parts of each pass over a shard, by its stem; one listing per table."""
    found: dict[str, int] = defaultdict(int)
    for table in (*tables, "errors"):
        for file in storage.list_files(storage.join(output, table), recursive=False):
            found[file.uri.rpartition("/")[2].removesuffix(".parquet")] += file.size_bytes
    return found


def read_receipt(output: str, stem: str, receipt: Receipt) -> dict[str, Any]:
    """The content of a receipt: what was read, and each part with rows, bytes and hash."""
    uri = storage.join(output, RECEIPTS, stem, receipt.name)
    content: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return content


def find_replaced(output: str, plan: list[Shard], receipts: dict[str, list[Receipt]]) -> set[str]:
    """The stems of finished shards that hold rows of what is planned, and are not in the plan.

    They are of a large Parquet file that changed and is split in another way now, or of images of
    a folder that has fewer groups of them now. Reads the receipts of such shards alone.
    """
    planned = {stem(shard.name) for shard in plan}
    gone = [name for name in receipts if without_pass(name) not in planned]
    files = {file_of(shard.name) for shard in plan}
    rows = [name for name in gone if "-rows-" in name or "images-" in name]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        read = pool.map(lambda name: read_receipt(output, name, receipts[name][0]), rows)
        found = {n for n, r in zip(rows, read, strict=True) if file_of(r["shard"]) in files}
    whole = {stem(file) for file in files}
    return found | {name for name in gone if without_pass(name) in whole}


def write_receipt(output: str, shard: Shard, content: dict[str, Any]) -> None:
    """Write the receipt of a shard, unless this very one is there.

    Several attempts at one shard follow one decision (see commit), so theirs are the same.
    """
    receipt = Receipt(
        version_hash(shard),
        content["rows_ok"],
        content["rows_error"],
        sum(part["bytes"] for part in content["parts"]),
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
    version, ok, error, size_bytes, cut = match.groups()
    return Receipt(version, int(ok), int(error), int(size_bytes), bool(cut))
