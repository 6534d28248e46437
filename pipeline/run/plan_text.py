"""The estimate of a job in lines, as `clipseg-ray plan` prints them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from pipeline.config.options import WorkerOptions
from pipeline.config.plan import PlanOptions
from pipeline.run.plan import Machine, Sample, estimate, gpu_seconds
from pipeline.run.progress import duration
from pipeline.run.resources import divide

BUSY = 1.25  # above which a machine is called busy
START_RAY_S, START_LOCAL_S = 8.0, 2.0


def describe_plan(
    sample: Sample, machine: Machine, options: WorkerOptions, asked: PlanOptions
) -> Iterator[str]:
    """Lines for the user."""
    about = "" if sample.is_exact else "about "
    failed = f", {sample.failed:,} of them failed" if sample.failed else ""
    yield (
        f"{about}{sample.total:,} images in {sample.shards:,} shards, "
        f"{_size(sample.input_bytes)}; {sample.images:,} of them measured here{failed}"
    )
    stages = [f"{name} {seconds * 1000:.2g}" for name, seconds in sample.tasks.items()]
    where = "model on a GPU here" if sample.device == "cuda" else "model"
    model = sample.model_wall if sample.device == "cuda" else sample.model_cpu
    yield (
        f"  an image of {_size(sample.image_bytes)}, in ms of one CPU: {', '.join(stages)}; "
        f"{where} {model * 1000:.3g}"
    )
    found = estimate(sample, machine, options, tflops=asked.gpu_tflops)
    yield f"on {_describe(machine, options)}: {found.rate:,.1f} images/s; the limit: {found.limit}"
    if machine.gpus and sample.device == "cpu":
        yield (
            f"  assumed, not measured: a GPU that sustains {asked.gpu_tflops:g} TFLOP/s, "
            f"{sample.flop / 1e9:.3g} GFLOP an image"
        )
    if sample.busy > BUSY:
        yield (
            f"  this machine is busy: a second of CPU takes {sample.busy:.1f} s here now, and the "
            "rate above is that of a machine that does nothing else"
        )
    start = START_LOCAL_S if options.local else START_RAY_S
    seconds = sample.total / found.rate + start
    yield f"time: {duration(seconds)}, about {start:.0f} s of it to start"
    each = f"{_size(sample.output / max(sample.total, 1))} an image"
    yield f"output: {_size(sample.output)}, {each}"
    if asked.price_per_hour is not None:
        price = seconds / 3600 * asked.price_per_hour
        yield f"price: {price:,.2f} at {asked.price_per_hour:g} an hour"
    if not options.local:
        yield from _describe_balance(sample, asked.gpu_tflops)
        yield f"settings: {_settings(machine, options)}"


def _describe(machine: Machine, options: WorkerOptions) -> str:
    if options.local:
        return "this machine, in one process (--local)"
    gpus = f"{machine.gpus} GPUs and " if machine.gpus else ""
    return f"{gpus}{machine.cpus} CPUs"


def _describe_balance(sample: Sample, tflops: float) -> Iterator[str]:
    """How many CPUs keep a GPU busy."""
    rate = 1 / gpu_seconds(sample, tflops)
    cpus = rate * sample.cpu + 1
    how = "as here" if sample.device == "cuda" else f"of {tflops:g} TFLOP/s"
    yield f"balance: {cpus:,.0f} CPUs keep a GPU {how} busy, at {rate:,.0f} images/s"


def _settings(machine: Machine, options: WorkerOptions) -> str:
    """The options chosen by the job itself."""
    device = "cuda" if machine.gpus else "cpu"
    actor = divide(options, device, cpus=machine.cpus, gpus=machine.gpus)["actor"]
    found = ["--device", device, "--actors", actor["actors"], "--batch-size", actor["batch_size"]]
    return shlex.join(map(str, found))


def _size(size_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"
