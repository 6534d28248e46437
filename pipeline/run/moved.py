"""An input in another place than the run read it from, held against the run's receipts."""

from __future__ import annotations

import re

from pipeline.read.shard import Shard
from pipeline.run.images import Images
from pipeline.write.layout import Ledger, shard_id
from pipeline.write.receipts import list_receipts_of, read_receipt

DOUBT = (
    "cannot be proved to be what the run read: times or ETags are a copy's; name and bytes of each "
    "image shown agree"
)
_LOCAL = re.compile(r"(\d+)-(-?\d+)-(-?\d+)")  # storage.local.local_version


def compare_moved(images: Images, shard: Shard) -> tuple[str, bool]:
    """Why a shard is not the one read by the run, or ""; and whether it is proved to be the same.

    Recorded are the size of a local file and its times, the ETag of an object, and the number of
    loose images. Equal times or ETags prove it; other ones prove nothing: copies have them, too.
    """
    ledger = Ledger(output=images.output, run=images.run)
    id_ = shard_id(shard.name)
    receipts = list_receipts_of(ledger, shard.name)
    contents = [(receipt, read_receipt(ledger, id_, receipt)) for receipt in receipts]
    # Of this run, and not of one before it in the same folder.
    known = [
        c for receipt, c in contents if receipt.version == ledger.version(c.get("version", ""))
    ]
    if not known:
        return "the run has not finished this shard", False
    version = str(known[0]["version"])
    if version == shard.version:
        return "", True
    if shard.format == "images":
        same = known[0]["rows_in"] == len(shard.files)
        return "" if same else "another number of images is there now", False
    before, now = _LOCAL.fullmatch(version), _LOCAL.fullmatch(shard.version)
    if before is None:  # an ETag, which says nothing of the size
        return "", False
    size = now[1] if now else "" if shard.row_groups else str(shard.size_bytes)
    if size and size != before[1]:
        return "another shard is there now: its size has changed", False
    return "", bool(now and now[2] == before[2])
