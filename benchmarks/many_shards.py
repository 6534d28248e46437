"""What a command over very many shards costs before and after its images.

    python -m benchmarks.many_shards --shards 100000 1000000           # on local disk
    python -m benchmarks.many_shards --shards 100000 --on s3           # 30 ms a request

An input of empty tars, and the output of a run that is done with all of them: names as a run has
them, files without content. Then, each in a process of its own, seconds and peak of resident memory
of listing the input (`plan`), of `status`, and of the same command again (`resume`): listing,
comparing, closing. On S3 in memory (stub_s3) requests are counted, too, and `--pause` is theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.stub_s3 import StubS3
from pipeline import schema
from pipeline.config.segment import SegmentConfig
from pipeline.read.inputs import list_shards
from pipeline.read.shard import Shard
from pipeline.run import status
from pipeline.run.close import close_run
from pipeline.run.lifecycle import open_run
from pipeline.write.layout import Ledger, shard_id
from pipeline.write.receipts import Receipt

TABLES = {
    "images": schema.Table(schema.IMAGES, 1),
    "masks": schema.Table(schema.MASKS, 1, per_prompt=True),
}
PHASES = ("plan", "status", "resume")


def config_of(folder: str) -> SegmentConfig:
    """The run of the benchmark."""
    return SegmentConfig(input=f"{folder}/in", output=f"{folder}/out", prompt=("x",))


def plan(folder: str) -> list[Shard]:
    """The shards of the input."""
    return list_shards(f"{folder}/in").shards


def resume(folder: str) -> None:
    """The same command again over a run whose shards are done."""
    run = open_run(config_of(folder), plan(folder), model={}, tables=TABLES)
    assert run.is_done, len(run.first.todo)
    close_run(run, 1.0)


def tell_status(folder: str) -> None:
    """`clipseg-ray status`."""
    print(status.describe(*status.open_output(f"{folder}/out")), file=sys.stderr)


def names_of(ledger: Ledger, shards: list[Shard]) -> Iterator[str]:
    """The files of a finished run below its output."""
    for shard in shards:
        id_ = shard_id(shard.name)
        receipt = Receipt(ledger.version(shard.version), 1000, 0, 0, 0, False)
        yield f"_receipts/{id_}/{receipt.name}"
        yield from (ledger.part(table, id_) for table in TABLES)


@contextlib.contextmanager
def made(count: int, on_s3: bool, pause_s: float) -> Iterator[tuple[str, StubS3 | None]]:
    """A folder with the input and the output of a run."""
    inputs = [f"in/{i:08}.tar" for i in range(count)]
    if not on_s3:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "in").mkdir()
            for name in inputs:
                touch(Path(folder, name))
            ledger, shards = begin(folder)
            for name in names_of(ledger, shards):
                touch(Path(folder, "out", name))
            del shards
            yield folder, None
        return
    keys = {"ACCESS_KEY_ID": "some-key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "x"}
    with StubS3(0.0) as s3:
        os.environ.update({f"AWS_{name}": value for name, value in keys.items()})
        os.environ["AWS_ENDPOINT_URL"] = s3.endpoint
        for name in inputs:
            s3.put(f"bucket/{name}")
        ledger, shards = begin("s3://bucket")
        for name in names_of(ledger, shards):
            s3.put(f"bucket/out/{name}")
        del shards
        s3.pause_s = pause_s
        yield "s3://bucket", s3


def begin(folder: str) -> tuple[Ledger, list[Shard]]:
    """Start the run."""
    run = open_run(config_of(folder), plan(folder), model={}, tables=TABLES)
    return run.first.ledger, run.first.shards


def touch(path: Path) -> None:
    """An empty file."""
    if path.parent.parent.name == "_receipts":
        path.parent.mkdir(parents=True)
    with path.open("wb"):
        pass


def run_phase(name: str, folder: str) -> None:
    """Run one phase in this process; print seconds and MiB."""
    call: Any = {"plan": plan, "status": tell_status, "resume": resume}[name]
    started, used = time.monotonic(), time.process_time()
    kept = call(folder)
    seconds, used = time.monotonic() - started, time.process_time() - used
    del kept
    print(f"{seconds:.1f} {used:.1f} {peak_mib():.0f}", flush=True)
    os._exit(0)  # millions of objects need not be freed one by one


def peak_mib() -> float:
    """Peak of resident memory; ru_maxrss would begin with that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Print a row of a table for each phase."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[100_000])
    parser.add_argument("--on", choices=["disk", "s3"], default="disk")
    parser.add_argument("--pause", type=float, default=0.03, help="seconds of a request on S3")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--phase", nargs=2, metavar=("NAME", "FOLDER"), help="run one phase here")
    options = parser.parse_args()
    if options.phase:
        run_phase(*options.phase)
    print("| shards | on | what | seconds | of it CPU | peak MiB | requests |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for count in options.shards:
        with made(count, options.on == "s3", options.pause) as (folder, s3):
            for name in options.phases:
                if s3:
                    s3.counts.clear()
                command = [sys.executable, "-m", "benchmarks.many_shards", "--phase", name, folder]
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                seconds, used, peak = said.split()
                sent = f"{s3.counts.total():,}" if s3 else "-"
                print(
                    f"| {count:,} | {options.on} | {name} | {seconds} | {used} | {peak} | {sent} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
