"""Say how long a job takes, what limits it and what it costs, before it runs.

    python -m jobs.plan segment INPUT OUTPUT --prompt "a cat" --gpus 8 --cpus-per-gpu 16

and for this machine, on the bundled shards with the bundled model:

    python -m jobs.plan segment pipeline/demo/shards masks --model pipeline/demo/model --prompt star

`clipseg-ray plan` is the same. The job's own stages run in this process, without Ray, over the
first images of a few shards, into a temporary folder; nothing is written to OUTPUT.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config import log
from pipeline.config.classify import ClassifyConfig
from pipeline.config.command import run_command
from pipeline.config.options import WorkerOptions
from pipeline.config.plan import JOBS, PlanConfig
from pipeline.config.segment import SegmentConfig
from pipeline.embeddings.source import open_embeddings
from pipeline.errors import UsageError
from pipeline.run.plan import Machine, Sample, read_sample
from pipeline.run.plan_text import describe_plan


def plan(config: PlanConfig) -> None:
    """Run the job over a sample -> measure its stages -> print the estimate."""
    sample = measure(config)
    machine = Machine.here(sample)
    if config.plan.gpus is not None:
        cpus = config.plan.cpus_per_gpu * max(config.plan.gpus, 1)
        machine = Machine(cpus=cpus, gpus=config.plan.gpus)
    print("\n".join(describe_plan(sample, machine, config.job.workers, config.plan)))


def measure(config: PlanConfig) -> Sample:
    """The job's stages over a few images, in this process."""
    name = next(name for name, kind in JOBS.items() if isinstance(config.job, kind))
    if isinstance(config.job, ClassifyConfig) and open_embeddings(config.job.input):
        raise UsageError(
            f"{config.job.input}: holds embeddings, and these are classified at once, without a "
            "model on images; a plan is for images"
        )
    asked = config.job.workers
    workers = WorkerOptions(
        local=True,
        quiet=True,
        device="cpu" if asked.device == "cpu" else "auto",
        batch_size=asked.batch_size,
    )
    limits = replace(
        config.job.run, restart=False, max_error_rate=1.0, sample_s=config.plan.seconds
    )
    with tempfile.TemporaryDirectory(prefix="clipseg-ray-plan-") as folder:
        job = replace(config.job, output=folder, workers=workers, run=limits)
        if isinstance(job, SegmentConfig):
            job = replace(job, contact_sheet=None)
        log.say("note", f"measuring a few images, for {config.plan.seconds:g} s at most ...")
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(importlib.import_module(f"jobs.{name}"), name)(job)
        return read_sample(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in JOBS:
        known = ", ".join(JOBS)
        said = f"no job {arguments[0]!r} to plan; put `plan` in front of one of {known}"
        print(f"clipseg-ray plan: error: {said}", file=sys.stderr)
        return 2
    return run_command(PlanConfig, plan, "clipseg-ray plan", argv)


if __name__ == "__main__":
    sys.exit(main())
