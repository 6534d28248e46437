"""Reprocess the shards of a run with retryable failures.

    python -m jobs.retry_failed OUTPUT

`clipseg-ray retry-failed` is the same. The job runs with the options in OUTPUT/_run.json and does
not read its other shards. The rows of a shard are missing from the tables until it is finished;
nothing is deleted before the job is known to run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config.command import run_command
from pipeline.config.status import RetryConfig
from pipeline.run.lifecycle import is_unfinished
from pipeline.run.rerun import config_of_run
from pipeline.run.resume import read_failures
from pipeline.run.status import open_output


def retry_failed(config: RetryConfig) -> None:
    """Run the job again over the shards with failures, as if they were not done."""
    output, record = open_output(config.output)
    name, job = config_of_run(output, record)
    shards = read_failures(output).choose(every=config.every)
    failures = "failures" if config.every else "retryable failures"
    if not shards and not is_unfinished(output):
        hint = "" if config.every else "; --all reprocesses those with other failures, too"
        print(f"{output}: no shard has {failures}{hint}")
        return
    said = f"{len(shards):,} shards have {failures}; those still in the input are reprocessed"
    print(f"{output}: {said}")
    # What fails again is most of what is read here, and stops nothing.
    retry = replace(
        job.run, restart=False, retry="all" if config.every else "retryable", max_error_rate=1.0
    )
    job = replace(job, workers=config.workers, run=retry)
    getattr(importlib.import_module(f"jobs.{name}"), name)(job)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(RetryConfig, retry_failed, "clipseg-ray retry-failed", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
