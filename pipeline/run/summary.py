"""The screen at the end of a run: images, failures, non-empty masks, and what comes next.

Whatever the size of the run, a bounded number of small files is read for it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import one_line
from pipeline.read.shard import Shard
from pipeline.run.failures import sample_failures
from pipeline.run.lifecycle import Run
from pipeline.write.layout import ERRORS, Ledger, shard_id
from pipeline.write.receipts import read_receipt, receipts_of

NAMES = 3  # of a reason
PROMPTS = 8  # in one line
SHARDS = 1000  # whose receipts, and errors, are read

_AT_ONCE = 32


def summary(run: Run, counts: Mapping[str, int], *, report: str | None = None) -> str:
    """Lines for the user of a finished run; `counts` of close_run, `report` the page about it."""
    return "\n".join(
        [
            _first_line(run, counts),
            *_failures(run, counts),
            *_found(run, counts["rows_ok"]),
            *_tables(run, counts),
            *([f"look: {report}"] if report else []),
            *_next_commands(run, counts, "more images" if report else "look"),
        ]
    )


def _first_line(run: Run, counts: Mapping[str, int]) -> str:
    line = (
        f"{_count(counts['rows_in'], 'image')} in {_count(counts['shards'], 'shard')}: "
        f"{counts['rows_ok']:,} done, {counts['rows_error']:,} failed"
    )
    last = run.record.get("throughput", {})
    if not last.get("images"):
        return line
    some = f"{last['images']:,} of them " if last["images"] != counts["rows_in"] else ""
    return f"{line}; {some}in {last['seconds']:,.0f} s, {last['images_per_s']:,.1f} images/s"


def _failures(run: Run, counts: Mapping[str, int]) -> Iterator[str]:
    """Failed images by reason, and what else is in no table."""
    later = counts.get("rows_error_later", 0)
    if counts["rows_error"] or counts["shards_failed"] or later:
        sample = sample_failures(run.output, names=NAMES, shards=SHARDS)
        for reason, count in sample.reasons.most_common():
            names = [failed.name for failed in sample.first[reason]]
            more = ", ..." if count > len(names) else ""
            yield f"  failed: {count:,} {reason} ({', '.join(names)}{more})"
        if sample.unread:
            yield f"  and those of {sample.unread:,} more shards with failures, not counted here"
    if later:
        yield f"  {later:,} images failed when prompts were added, and have no masks of these"
    if cut := counts["shards_failed"]:
        yield f"  {cut:,} shards are damaged: images behind the damage are in no table"
    if skipped := counts["samples_without_image"]:
        yield f"  {skipped:,} samples had no image, and are in no table"


def _found(run: Run, images: int) -> Iterator[str]:
    """How many masks of each prompt are not empty."""
    if "masks" not in run.tables or not images:
        return
    counted = count_found(run, SHARDS)
    if counted is None or not counted.images:
        return
    found, images, shards = counted.found, counted.images, counted.shards
    of = f"in the first {shards:,} shards, " if shards < len(run.first.shards) else ""
    if run.tables["masks"].rows_per_image == 0:  # of prompts of their own
        without = images - counted.prompted
        yield f"  {of}{counted.masks:,} masks; {without:,} images had no prompt"
        return
    prompts = [prompt for each in run.passes for prompt in each.prompts]
    some = [f"{found[i]:,} {_quote(p)}" for i, p in enumerate(prompts) if found[i]]
    none = [_quote(prompt) for i, prompt in enumerate(prompts) if not found[i]]
    if some:
        yield f"  {of}images in which something was found, of {images:,}: {_shorten(some)}"
    if none:
        yield f"  {of}0 of {images:,} images have anything for {_shorten(none)}"


class Found(NamedTuple):
    """Masks of the first shards of a run, from their receipts."""

    found: Counter[int]
    """Masks that are not empty, by prompt_id."""
    masks: int
    images: int
    prompted: int
    """Images with a prompt."""
    shards: int
    """Those that were looked at."""


def count_found(run: Run, shards: int) -> Found | None:
    """Count in the first so many shards.

    None if a receipt does not tell, like one of an earlier version.
    """
    found: Counter[int] = Counter()
    masks = images = prompted = 0
    for each in run.passes:

        def read(shard: Shard, ledger: Ledger = each.ledger) -> list[dict[str, Any]]:
            id_ = shard_id(shard.name)
            return [read_receipt(ledger, id_, receipt) for receipt in receipts_of(ledger, shard)]

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for receipt in chain.from_iterable(pool.map(read, each.shards[:shards])):
                if not {"found", "prompted"} <= receipt.keys():
                    return None
                found.update({int(i): count for i, count in receipt["found"].items()})
                parts = receipt["parts"]
                masks += sum(part["rows"] for part in parts if part["table"] == "masks")
                images += 0 if each.ledger.added else receipt["rows_ok"]
                prompted += receipt["prompted"]
    return Found(found, masks, images, prompted, len(run.first.shards[:shards]))


def _tables(run: Run, counts: Mapping[str, int]) -> Iterator[str]:
    for name in (*run.tables, ERRORS):
        rows = f": {counts[name]:,} rows" if name in counts else ""
        yield f"  table {storage.join(run.output, name)}/*.parquet{rows}"


def _next_commands(run: Run, counts: Mapping[str, int], look: str) -> Iterator[str]:
    output = shlex.quote(run.output)
    if "masks" in run.tables and counts["rows_ok"]:
        yield f"{look}: clipseg-ray view {output}"
    if "annotations" in run.tables:
        yield f"for an annotation tool or a trainer: clipseg-ray export {output} DEST --format coco"
    if "embeddings" in run.tables and counts["rows_ok"]:
        yield f'search: clipseg-ray search {output} --text "..."'
    if "probabilities" in run.tables:
        named = run.record["config"].get("ontology")
        what, ontology = (
            ("labels", shlex.quote(str(named))) if named else ("other thresholds", "FILE")
        )
        yield f"{what}: clipseg-ray label {output} LABELS --ontology {ontology}"
    if counts["rows_error"] or counts["shards_failed"] or counts.get("rows_error_later"):
        yield f"what failed: clipseg-ray status {output} --errors"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _shorten(items: list[str]) -> str:
    more = f" and {len(items) - PROMPTS:,} more" if len(items) > PROMPTS else ""
    return ", ".join(items[:PROMPTS]) + more


def _quote(prompt: str) -> str:
    return f"'{one_line(prompt, 40)}'"
