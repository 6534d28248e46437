"""Deviation of `--decode fast` from exact decoding, on a few images when a run starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.config.options import ImageOptions
from pipeline.errors import RowError
from pipeline.prepare.images import decode_image
from pipeline.prepare.processor import ImageProcessor
from pipeline.read.records import read_shard
from pipeline.read.shard import Shard
from pipeline.run.isolate import ProcessDiedError, run_apart
from pipeline.run.lifecycle import Run
from pipeline.run.manifest import replace_run

IMAGES = 32
SHARDS = 4  # spread over the input
LIMIT_S = 5.0


def measure_decode(run: Run, options: ImageOptions, processor: ImageProcessor) -> None:
    """Note in _run.json, and for the user, by how much prepared pixels differ from exact ones.

    Once a run, and not if images are decoded exactly. At most IMAGES are decoded both ways, in a
    process of their own, for LIMIT_S and one image at most.
    """
    if options.decode == "exact" or run.is_done or "decode" in run.record:
        return
    todo = run.first.todo
    some = [todo[i * len(todo) // SHARDS] for i in range(SHARDS)] if len(todo) > SHARDS else todo
    found: list[tuple[bool, float, int]] = []
    with contextlib.suppress(ProcessDiedError):  # over an image that the job will meet, and name
        for each in run_apart(compare_decoders, some, processor, options.max_pixels):
            found.append(each)
    reduced = [(mean, most) for smaller, mean, most in found if smaller]
    facts: dict[str, Any] = {"images": len(found), "reduced": len(reduced)}
    if reduced:
        facts["mean_difference"] = round(float(np.mean([mean for mean, _ in reduced])), 3)
        facts["largest_difference"] = max(most for _, most in reduced)
    run.record["decode"] = facts
    replace_run(run.output, run.record)
    run.notes.append(f"--decode fast: {_describe(facts)}")


def compare_decoders(
    shards: Sequence[Shard], processor: ImageProcessor, max_pixels: int, *, limit_s: float = LIMIT_S
) -> Iterator[tuple[bool, float, int]]:
    """Of up to IMAGES images: whether fast decoding reduces it, and the mean and the largest
    difference of its prepared pixels, of 0..255. The same number of each shard, but for short ones.
    """
    end = time.monotonic() + limit_s
    left = IMAGES
    for before, shard in enumerate(shards):
        share = left // (len(shards) - before)
        for record in read_shard(shard):
            if not share or time.monotonic() > end:
                break
            if record["reason"] or record["row"] < 0:
                continue
            try:
                yield _compare(record["image"], processor, max_pixels)
            except (RowError, MemoryError):
                continue
            share, left = share - 1, left - 1


def _compare(data: Any, processor: ImageProcessor, max_pixels: int) -> tuple[bool, float, int]:
    fast = decode_image(data, max_pixels=max_pixels, at_least=processor.least_size)
    if not fast.box:
        return False, 0.0, 0
    exact = processor.fit(decode_image(data, max_pixels=max_pixels).image)
    found = processor.fit(fast.image, (fast.height, fast.width), fast.box)
    difference = np.abs(np.asarray(exact, np.int16) - np.asarray(found, np.int16))
    return True, float(difference.mean()), int(difference.max())


def _describe(facts: dict[str, Any]) -> str:
    if not facts["images"]:
        return "no image could be compared with its exact pixels"
    of = f"{facts['reduced']} of {facts['images']} sampled images are decoded smaller"
    if not facts["reduced"]:
        return f"{of}: it makes no difference to them"
    mean, most = facts["mean_difference"], facts["largest_difference"]
    return f"{of}; their pixels differ by {mean:.2f} of 255 on average, by {most} at most"
