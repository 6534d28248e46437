"""Images a second that one driver can follow: a job on Ray, with stubs in the place of its work.

    python -m benchmarks.driver                      # shards of 1,024 images, blocks of 64, 256
    python -m benchmarks.driver --profile            # and where the driver's main threads are

The stages are those of a job (read, prepare, actor, write, finish), with its resources, its account
and its receipts, but they hand on small made-up tables at once. What counts is CPU time of the
driver's process: images / CPU seconds is what one driver can follow while its core is its own. The
time of the workers is none of it, so two cores measure what a cluster's driver does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import pyarrow as pa
import ray

from pipeline import schema
from pipeline.config.options import WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.read.shard import Shard
from pipeline.run.engine import Dataset, Engine
from pipeline.run.follow import follow_run
from pipeline.run.lifecycle import Pass, open_run
from pipeline.run.session import start_ray
from pipeline.write.receipts import write_receipt

TABLES = {
    "images": schema.Table(schema.IMAGES, 1),
    "masks": schema.Table(schema.MASKS, 1, per_prompt=True),
}
PERIOD_S = 0.005


def read_stub(shards: pa.Table, *, images: int, block: int) -> Iterator[pa.Table]:
    """Tables of `block` records of each shard; its total is on the last one."""
    for name in shards["name"].to_pylist():
        for start in range(0, images, block):
            count = min(block, images - start)
            total = images if start + count == images else -1
            yield pa.table({"shard": [name] * count, "total": [total] * count})


def pass_stub(batch: pa.Table) -> pa.Table:
    """The batch as it is."""
    return batch


class ActorStub:
    """Stands for the model."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch as it is."""
        return batch


def write_stub(batch: pa.Table) -> pa.Table:
    """The account row of a batch of one shard."""
    row: dict[str, Any] = dict.fromkeys(("errors", "size_bytes", "skipped"), 0)
    row |= {"shard": batch["shard"][0].as_py(), "images": len(batch), "outputs": len(batch)}
    row |= {"total": batch["total"][-1].as_py(), "reason": "", "fault": "", "fragment": "x"}
    return pa.Table.from_pylist([row], schema=schema.ACCOUNTS)


def finish_stub(
    function: Any, ledger: Any, shard: Shard, fragments: list[str], read: Any, tables: Any
) -> Future[Any]:
    """A receipt without parts, at once."""
    content = {"rows_ok": read[0], "rows_error": 0, "samples_without_image": 0}
    write_receipt(ledger, shard, content | {"parts": [], "shard_error": None})
    future: Future[Any] = Future()
    future.set_result({})
    return future


def stream(of_pass: Pass, engine: Engine, *, images: int, block: int) -> Dataset:
    """The chain of jobs/segment.py, of stubs."""
    actor = engine.actor | {"batch_size": block}
    return (
        engine.dataset(of_pass.todo)
        .map_batches(engine.guard(partial(read_stub, images=images, block=block)), **engine.read)
        .map_batches(engine.guard(pass_stub), **engine.task)
        .map_batches(ActorStub, **actor)
        .map_batches(engine.guard(write_stub), **engine.task)
    )


def measure(count: int, images: int, block: int, profile: bool) -> None:
    """Follow one run, and print a row of the table."""
    shards = [
        Shard(name=f"{i:06}.tar", uri=f"/in/{i:06}.tar", format="tar", size_bytes=1, version="v")
        for i in range(count)
    ]
    with tempfile.TemporaryDirectory() as output, sampled(profile) as seen:
        config = SegmentConfig(input="in", output=output, prompt=("x",))
        run = open_run(config, shards, model={}, tables=TABLES)
        parts = [time.process_time()]

        def stubbed(of_pass: Pass, engine: Engine) -> Dataset:
            parts.append(time.process_time())
            made = stream(of_pass, engine, images=images, block=block)
            parts.append(time.process_time())
            return made

        started = time.monotonic()
        follow_run(
            run,
            stubbed,
            WorkerOptions(quiet=True),
            engine=lambda engine: replace(engine, submit=finish_stub),
        )
        seconds, used = time.monotonic() - started, time.process_time() - parts[1]
    planned, blocks = parts[2] - parts[1], count * -(-images // block)
    print(
        f"| {count:,} x {images:,} | {block} | {seconds:.1f} | {used:.1f} | {planned:.1f} | "
        f"{1000 * planned / count:.1f} | {1000 * (used - planned) / blocks:.1f} | "
        f"{count * images / used:,.0f} |",
        flush=True,
    )
    for line, hits in seen.most_common(40):
        print(f"    {hits * PERIOD_S:6.2f} s {line}")


@contextmanager
def sampled(wanted: bool) -> Iterator[Counter[str]]:
    """How often each function was on the stack of a thread that Ray Data or we run."""
    seen: Counter[str] = Counter()
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(PERIOD_S):
            for number, frame in sys._current_frames().items():
                if number != threading.get_ident():
                    seen.update(set(_lines(frame)))

    if wanted:
        threading.Thread(target=sample, daemon=True).start()
    yield seen
    ended.set()


def _lines(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        code = frame.f_code
        if "/ray/data/" in code.co_filename or "/pipeline/" in code.co_filename:
            yield f"{code.co_filename.split('site-packages/')[-1][-60:]}:{code.co_name}"
        frame = frame.f_back


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--images", type=int, default=1024, help="of a shard")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    start_ray()
    print(
        "| shards x images | block | s | driver CPU s | of it planning | ms a shard | "
        "ms a block | images/s to follow |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for _ in range(options.repeats):
        for block in options.blocks:
            measure(options.shards, options.images, block, options.profile)


if __name__ == "__main__":
    main()
