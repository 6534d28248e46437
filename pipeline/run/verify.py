"""The parts of a run held against the hashes in their receipts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.errors import NotFoundError
from pipeline.write.layout import RECEIPTS, SUCCESS, Ledger, shard_id
from pipeline.write.passes import read_added
from pipeline.write.receipts import Receipt, list_receipts, read_receipt

_AT_ONCE = 16  # shards that are read
_BLOCK_BYTES = 2**20


@dataclass
class Verified:
    """Account of a verification."""

    shards: int = 0
    """Of the run; each pass over a shard counts."""
    looked_at: int = 0
    parts: int = 0
    size_bytes: int = 0
    differences: list[str] = field(default_factory=list)
    """One line for each part that is not as its receipt says, or receipt that cannot be read."""


def verify_run(
    output: str, *, share: float = 1.0, on_shard: Callable[[], object] = lambda: None
) -> Verified:
    """Read the parts of a share of the finished shards, and compare size and hash.

    Shards with a difference count as not done from now on: their receipts are deleted, and
    _SUCCESS, for the command of the run to make them again. Shards are chosen by a hash of
    their names: the same share is the same shards. Raises StorageError.
    """
    found = Verified()
    work = []
    for first in (0, *read_added(output)):
        ledger = Ledger(output=output, first_prompt=first)
        for id_, receipts in sorted(list_receipts(ledger).items()):
            found.shards += 1
            if _chosen(id_, share):
                work.append((ledger, id_, receipts))
    damaged = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for (ledger, id_, _), checked in zip(
            work, pool.map(lambda args: _check_shard(*args), work), strict=True
        ):
            found.looked_at += 1
            found.parts += checked.parts
            found.size_bytes += checked.size_bytes
            found.differences += checked.differences
            if checked.differences:
                damaged.append((ledger, id_))
            on_shard()
    if damaged:
        storage.delete_file(storage.join(output, SUCCESS))
    for ledger, id_ in damaged:
        storage.delete_folder(storage.join(ledger.folder, RECEIPTS, id_))
    return found


def _chosen(id_: str, share: float) -> bool:
    digest = hashlib.sha256(f"verify {id_}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _check_shard(ledger: Ledger, id_: str, receipts: list[Receipt]) -> Verified:
    found = Verified()
    for receipt in receipts:
        try:
            content = read_receipt(ledger, id_, receipt)
            parts = [(str(p["path"]), int(p["bytes"]), str(p["sha256"])) for p in content["parts"]]
            known = shard_id(content["shard"]) == id_
        except (ValueError, KeyError, TypeError, NotFoundError):
            parts, known = [], False
        total = sum(size for _, size, _ in parts)
        if not known or total != receipt.size_bytes:
            found.differences.append(f"{ledger.receipts}/{id_}/{receipt.name}: damaged")
        for path, size, digest in parts:
            found.parts += 1
            uri = storage.join(ledger.output, path)
            if (why := _check_part(uri, size, digest)) is not None:
                found.differences.append(f"{uri}: {why}")
            found.size_bytes += size
    return found


def _check_part(uri: str, size_bytes: int, digest: str) -> str | None:
    """None, or the difference in words."""
    try:
        actual, count = hashlib.sha256(), 0
        for block in _read(uri):
            actual.update(block)
            count += len(block)
    except NotFoundError:
        return "gone"
    if count != size_bytes:
        return f"has {count:,} bytes, its receipt says {size_bytes:,}"
    return None if actual.hexdigest() == digest else "its bytes are not those of its receipt"


def _read(uri: str) -> Iterator[bytes]:
    with storage.open_read(uri) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def read_parts(output: str, share: float) -> dict[str, dict[str, str]]:
    """A share of the shards of the first pass, at least one: name -> path of a part -> sha256."""
    ledger = Ledger(output=output)
    receipts = sorted(list_receipts(ledger).items())
    chosen = [(id_, found) for id_, found in receipts if _chosen(id_, share)] or receipts[:1]
    contents = [read_receipt(ledger, id_, found[0]) for id_, found in chosen]
    return {c["shard"]: {p["path"]: p["sha256"] for p in c["parts"]} for c in contents}


def describe(output: str, found: Verified, record: dict[str, Any]) -> str:
    """Some lines on a verification."""
    job = record.get("fingerprint", {}).get("job", "?")
    lines = [
        f"{output}: {job}, {found.looked_at:,} of {found.shards:,} finished shards looked at: "
        f"{found.parts:,} parts, {found.size_bytes:,} bytes, {len(found.differences):,} differences"
    ]
    lines += [f"  {line}" for line in found.differences[:20]]
    return "\n".join(lines)
