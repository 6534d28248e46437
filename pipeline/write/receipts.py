"""Receipts, the commit markers of shards: the name of each closes an account.

A receipt's name, `<version>.<ok>-<error>-<skipped>-<bytes>[.cut].json`, tells the content and run
of the shard, how many rows came out well and how many failed (`.cut` if damage in the shard ended
it early), how many samples had no image, and how many bytes its parts have together. So listings
alone close the account of a million shards, and show parts gone or of another attempt.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.read.shard import Shard, file_of
from pipeline.write.layout import ERRORS, Ledger, parse_part, shard_id

_AT_ONCE = 32  # receipts that are read
_NAME = re.compile(r"([0-9a-f]{8})\.(\d+)-(\d+)-(\d+)-(\d+)(\.cut)?\.json")


class Receipt(NamedTuple):
    """Contents of a receipt, as its name tells."""

    version: str
    """As Ledger.version gives it."""
    ok: int
    error: int
    skipped: int
    """Samples without an image."""
    size_bytes: int
    """Of its parts in all tables."""
    cut: bool
    """Whether the shard was not read to its end."""

    @property
    def name(self) -> str:
        """The file name."""
        counts = f"{self.ok}-{self.error}-{self.skipped}-{self.size_bytes}"
        return f"{self.version}.{counts}{'.cut' if self.cut else ''}.json"


def covers(added: Receipt, first: list[Receipt]) -> bool:
    """Whether an added pass accounts for every image of the first one, whose receipts are given.

    It does not when the first was discarded and made anew meanwhile, with another outcome.
    """
    wanted = (added.version, added.ok + added.error)
    return [(receipt.version, receipt.ok) for receipt in first] == [wanted]


def is_borne_out(found: list[Receipt], version: str, size_bytes: int) -> bool:
    """Whether a pass has one receipt, of this version, and the bytes of its parts are as it says.

    They are not if a driver was killed while discarding the pass, or wrote parts over another's
    without knowing of the other's input.
    """
    return [(receipt.version, receipt.size_bytes) for receipt in found] == [(version, size_bytes)]


def receipts_of(ledger: Ledger, shard: Shard) -> list[Receipt]:
    """The receipts of a shard with this content: none or one, unless a storage broke its word."""
    found = list_receipts_of(ledger, shard.name)
    return [receipt for receipt in found if receipt.version == ledger.version(shard.version)]


def list_receipts_of(ledger: Ledger, name: str) -> list[Receipt]:
    """Every receipt of the shard of this name, whatever its content and run."""
    folder = storage.join(ledger.receipts, shard_id(name))
    names = [uri.rpartition("/")[2] for uri in storage.list_names(folder)]
    return [receipt for name in names if (receipt := _parse(name))]


class Receipts(Mapping[str, list[Receipt]]):
    """The receipts of shards by their ids, kept as the names of their files: half the memory."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def add(self, id_: str, name: str) -> None:
        """Add a receipt by its file name."""
        before = self._names.get(id_)
        self._names[id_] = f"{before}/{name}" if before else name

    def __getitem__(self, id_: str) -> list[Receipt]:
        parsed = map(_parse, self._names[id_].split("/"))
        return [receipt for receipt in parsed if receipt]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def list_receipts(ledger: Ledger, *, others: list[str] | None = None) -> Receipts:
    """Every receipt of a pass, by the id of its shard; one listing.

    URIs of other files are added to `others`.
    """
    found = Receipts()
    for uri in storage.list_names(ledger.receipts):
        folder, name = uri.rsplit("/", 2)[1:]
        if _NAME.fullmatch(name):
            found.add(folder, name)
        elif others is not None:
            others.append(uri)
    return found


def list_parts(
    output: str, tables: Iterable[str], *, others: list[str] | None = None
) -> dict[int, dict[str, int]]:
    """The bytes of all parts of each shard: by the first prompt of a pass, and the shard's id.

    One listing per table serves all passes. The table of errors is always among them. URIs of other
    files are added to `others`.
    """
    found: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for table in {*tables, ERRORS}:
        for name, size_bytes in storage.list_sizes(storage.join(output, table)):
            if part := parse_part(name):
                first, id_ = part
                found[first][id_] += size_bytes
            elif others is not None:
                others.append(storage.join(output, table, name))
    return found


def read_receipt(ledger: Ledger, id_: str, receipt: Receipt) -> dict[str, Any]:
    """The content of a receipt: the shard, and each part with rows, bytes and hash."""
    uri = storage.join(ledger.receipts, id_, receipt.name)
    content: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return content


def find_replaced(ledger: Ledger, shards: list[Shard], gone: dict[str, list[Receipt]]) -> set[str]:
    """The ids of finished shards with rows of the input under a name it no longer has.

    `gone`: the receipts of shards not among these.
    They are of a large Parquet file changed and split in another way now, or of images of a folder
    with fewer groups of them now. Reads the receipts of such shards alone.
    """
    if not gone:
        return set()
    files = {file_of(shard.name) for shard in shards}
    rows = sorted(name for name in gone if "-rows-" in name or "images-" in name)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        read = pool.map(lambda name: read_receipt(ledger, name, gone[name][0]), rows)
        found = {n for n, r in zip(rows, read, strict=True) if file_of(r["shard"]) in files}
    return found | (gone.keys() & {shard_id(file) for file in files})


def write_receipt(ledger: Ledger, shard: Shard, content: dict[str, Any]) -> None:
    """Write the receipt of a shard, unless this very one is there.

    Several attempts at one shard follow one decision (see commit), so theirs are the same.
    """
    receipt = Receipt(
        ledger.version(shard.version),
        content["rows_ok"],
        content["rows_error"],
        content["samples_without_image"],
        sum(part["bytes"] for part in content["parts"]),
        content["shard_error"] is not None,
    )
    uri = storage.join(ledger.receipts, shard_id(shard.name), receipt.name)
    with contextlib.suppress(FileExistsError):
        storage.write_new(uri, json.dumps(content, indent=1).encode())


def _parse(name: str) -> Receipt | None:
    """None for other files, such as the unfinished one of a killed writer."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    version, *numbers, cut = match.groups()
    ok, error, skipped, size_bytes = map(int, numbers)
    return Receipt(version, ok, error, skipped, size_bytes, bool(cut))
