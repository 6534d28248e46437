"""Compare the parts of a run with the hashes in their receipts.

    python -m jobs.verify OUTPUT
    python -m jobs.verify OUTPUT --sample 0.01 --recompute 0.001

`clipseg-ray verify` is the same. The exit code is 1 if a part differs; the command of the run then
makes its shard again.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from pipeline.config.command import run_command
from pipeline.config.options import WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.config.status import VerifyConfig
from pipeline.errors import JobError
from pipeline.run.rerun import config_of_run
from pipeline.run.status import open_output
from pipeline.run.verify import describe, read_parts, verify_run


def verify(config: VerifyConfig) -> None:
    """List the receipts -> read and hash the parts -> print the account."""
    output, record = open_output(config.output)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("verifying", total=None)
        found = verify_run(output, share=config.sample, on_shard=lambda: progress.advance(bar))
    print(describe(output, found, record))
    differences = len(found.differences)
    if config.recompute:
        differences += recompute(output, record, config.recompute)
    if differences:
        what = (
            "the command of the run makes those shards again" if found.differences else "see above"
        )
        raise JobError(f"{differences:,} differences; {what}")


def recompute(output: str, record: dict[str, Any], share: float) -> int:
    """Process a share of the shards again, and compare the parts; returns how many differ."""
    name, job = config_of_run(output, record, added=False)
    parts = read_parts(output, share)
    with tempfile.TemporaryDirectory(prefix="clipseg-ray-verify-") as folder:
        run = replace(job.run, restart=False, retry="none", only=tuple(parts), max_error_rate=1.0)
        workers = WorkerOptions(local=True, quiet=True)
        again = replace(job, output=folder, workers=workers, run=run)
        if isinstance(again, SegmentConfig):
            again = replace(again, contact_sheet=None)
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(importlib.import_module(f"jobs.{name}"), name)(again)
        made = read_parts(folder, 1.0)
    differ = [
        f"{path} of {shard}"
        for shard, hashes in parts.items()
        for path, digest in hashes.items()
        if made.get(shard, {}).get(path) != digest
    ]
    count = sum(map(len, parts.values()))
    print(f"  {len(parts):,} shards recomputed: {count:,} parts, {len(differ):,} differ")
    for line in differ[:20]:
        print(f"  recomputed differently: {line}")
    return len(differ)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(VerifyConfig, verify, "clipseg-ray verify", argv)


if __name__ == "__main__":
    sys.exit(main())
