"""The estimate of a job, from its stages over a sample: rate, limit, time, size, price, balance.

Everything on the CPUs counts in seconds of one CPU an image. If the model runs on the CPUs, too,
the rate is of all stages together; beside GPUs it is the least of three: the GPUs, the CPUs for the
other stages, and the driver.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.options import WorkerOptions
from pipeline.errors import JobError
from pipeline.model.config import VisionConfig
from pipeline.read.records import BATCH_ROWS
from pipeline.run.failures import sample_failures
from pipeline.run.manifest import read_run
from pipeline.run.resources import divide
from pipeline.run.sample import SHARDS
from pipeline.write.layout import EMPTY_PART
from pipeline.write.parts import read_part

STAGES = {
    "read_batches": "read",
    "PrepareImages": "decode and resize",
    "WriteFragments": "tables",
    "finish_shard": "parts",
}
"""Names of the stages beside the model's, and what they are called."""
TAR_BYTES = 768  # of a member beside its data: a header, and half a block
# Of Ray itself, beside the stages: from measurements of jobs, see benchmarks/NOTES.md.
DRIVER_BLOCK_S = 0.0026  # of the driver, for each block of up to BATCH_ROWS images
RAY_BLOCK_S = 0.05  # of one CPU, for each of them, in all processes
RAY_SHARD_S = 0.15  # of one CPU, for each shard, in all processes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """CPUs and GPUs of a job."""

    cpus: int
    gpus: int

    @classmethod
    def here(cls, sample: Sample) -> Machine:
        """This one, with GPUs if the sample ran on one."""
        allowed = getattr(os, "sched_getaffinity", None)
        cpus = len(allowed(0)) if allowed else os.cpu_count() or 1
        if sample.device == "cpu":
            return cls(cpus=cpus, gpus=0)
        import torch

        return cls(cpus=cpus, gpus=torch.cuda.device_count())


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Facts of a sample, and of the whole input. Times are seconds an image."""

    images: int
    failed: int
    device: str
    """Of the model: "cpu" or "cuda"."""
    tasks: dict[str, float]
    """Of one CPU, for each of STAGES by what it is called."""
    model_cpu: float
    """Of one CPU, summed over threads."""
    model_wall: float
    wait: float
    """For the storage, in reading."""
    busy: float
    """Seconds that a second of one CPU takes on this machine, beside its other work; 1 or more."""
    flop: float
    """Operations of the model an image, those of a decoder twice: it is bound by memory."""
    image_bytes: float
    total: int
    is_exact: bool
    """Whether `total` is known, and no estimate by bytes."""
    shards: int
    input_bytes: int
    output_bytes: float
    """An image, of all tables."""
    shard_bytes: float
    """Output of a shard, however few images it has."""

    @property
    def cpu(self) -> float:
        """Of one CPU, for everything but the model, and for Ray.

        A reading task has half the CPU of another, so it may wait as long as it works.
        """
        waits = max(0.0, (self.wait - self.tasks["read"]) / 2)
        return sum(self.tasks.values()) + waits + self.ray

    @property
    def ray(self) -> float:
        """Of one CPU, for Ray."""
        shards = self.shards / max(self.total, 1)
        return RAY_BLOCK_S * max(1 / BATCH_ROWS, shards) + RAY_SHARD_S * shards

    @property
    def output(self) -> float:
        """Bytes of the tables of the whole job."""
        return self.total * self.output_bytes + self.shards * self.shard_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The rate of a job on a machine, in images/s, and what limits it."""

    rate: float
    limit: str


def read_sample(output: str) -> Sample:
    """The sample left by a job in a local folder. Raises JobError for one without an image."""
    record = read_run(output) or {}
    counts, whole = record["counts"], record["input"]["whole"]
    images, good = counts["rows_in"], counts["rows_ok"]
    if not good:
        raise JobError(f"none of the first {images:,} images came out well: {_reasons(output)}")
    stages: dict[str, dict[str, float]] = record["stages"]
    read_whole = stages.pop("whole")
    (model,) = [stages[name] for name in stages if name not in STAGES]
    alone = [stages[name] for name in ("PrepareImages", "WriteFragments")]
    busy = max(1.0, sum(s["wall_s"] for s in alone) / max(sum(s["cpu_s"] for s in alone), 1e-9))
    read = stages["read_batches"]
    image_bytes = _mean_image_bytes(Path(output))
    by_bytes = read_whole["rows"] / read_whole["bytes"] if read_whole["bytes"] else 0.0
    by_bytes = by_bytes or 1 / (image_bytes + TAR_BYTES)
    columns, footers = _part_bytes(Path(output))
    return Sample(
        images=images,
        failed=counts["rows_error"],
        device=record["device"],
        tasks={STAGES[name]: s["cpu_s"] / images for name, s in stages.items() if name in STAGES},
        model_cpu=model["cpu_s"] / images,
        model_wall=model["wall_s"] / (1 if record["device"] == "cuda" else busy) / images,
        wait=max(0.0, read["wall_s"] - busy * read["cpu_s"]) / images,
        busy=busy,
        flop=count_flop(record["fingerprint"]),
        image_bytes=image_bytes,
        total=whole["rows"] + round(whole["bytes_of_unknown"] * by_bytes),
        is_exact=whole["bytes_of_unknown"] == read_whole["bytes"],
        shards=whole["shards"],
        input_bytes=whole["bytes"],
        output_bytes=columns / images,
        shard_bytes=footers / counts["shards"],
    )


def _reasons(output: str) -> str:
    reasons = sample_failures(output, names=0, shards=SHARDS).reasons.most_common()
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons) or "there are none"


def _mean_image_bytes(output: Path) -> float:
    tables = [
        read_part(str(path), ["size_bytes"]) for path in (output / "images").glob("*.parquet")
    ]
    sums = [(pc.sum(table["size_bytes"]).as_py() or 0, len(table)) for table in tables]
    return sum(size for size, _ in sums) / max(sum(count for _, count in sums), 1)


def _part_bytes(output: Path) -> tuple[int, int]:
    """Bytes of the columns in all parts, and of what a part has beside them, its footer."""
    parts = [path for path in output.glob("*/*.parquet") if path.name != EMPTY_PART]
    columns = 0
    for path in parts:
        about = pq.read_metadata(path)
        groups = map(about.row_group, range(about.num_row_groups))
        columns += sum(
            g.column(i).total_compressed_size for g in groups for i in range(g.num_columns)
        )
    return columns, sum(path.stat().st_size for path in parts) - columns


def count_flop(fingerprint: dict[str, Any]) -> float:
    """Operations of the model for an image, by its configuration.

    A block of L tokens, width D and hidden width M: 8 L D^2 + 4 L D M + 4 L^2 D.
    """
    config = fingerprint["model_config"]
    size = fingerprint["preprocessing"]["size"]
    side = size[0] if isinstance(size, list) else size
    vision = config.get("vision_config") or config
    known = {name: vision.get(name) for name in VisionConfig.__dataclass_fields__}
    tower = VisionConfig(**{name: value for name, value in known.items() if value is not None})
    tokens = (side // tower.patch_size) ** 2 + 1
    prompts = len(fingerprint.get("prompts", ()))
    extract = config.get("extract_layers") or (3, 6, 9)
    layers = tower.num_hidden_layers
    if fingerprint["job"] == "segment" and not fingerprint["embed"]:
        layers = max(extract) + 1
    encoder = layers * _block(tokens, tower.hidden_size, tower.intermediate_size)
    if fingerprint["job"] != "segment":
        return encoder
    width, hidden = config.get("reduce_dim", 64), config.get("decoder_intermediate_size", 2048)
    return encoder + 2 * max(prompts, 1) * len(extract) * _block(tokens, width, hidden)


def _block(tokens: int, width: int, hidden: int) -> float:
    return 8.0 * tokens * width**2 + 4.0 * tokens * width * hidden + 4.0 * tokens**2 * width


def estimate(
    sample: Sample, machine: Machine, options: WorkerOptions, *, tflops: float
) -> Estimate:
    """The rate of the job on a machine, as its options ask for it."""
    if options.local:
        seconds = {**sample.tasks, "the storage": sample.wait, "the model": sample.model_wall}
        return Estimate(rate=1 / sum(seconds.values()), limit=_largest(seconds))
    if not machine.gpus:
        work = {**sample.tasks, "the model": sample.model_cpu}
        rate = machine.cpus / (sample.cpu + sample.model_cpu)
        return Estimate(rate=rate, limit=_largest(work))
    share = divide(options, "cuda", cpus=machine.cpus, gpus=machine.gpus)["actor"]
    left = machine.cpus - share["actors"] * share["num_cpus"]
    rates = {
        "the GPUs": share["actors"] / gpu_seconds(sample, tflops),
        f"the CPUs ({_largest(sample.tasks)})": left / sample.cpu,
        "the driver, which follows every block": BATCH_ROWS / DRIVER_BLOCK_S,
    }
    limit = min(rates, key=lambda name: rates[name])
    return Estimate(rate=rates[limit], limit=limit)


def gpu_seconds(sample: Sample, tflops: float) -> float:
    """Of a GPU, an image: measured if one was here, or by arithmetic at an assumed rate."""
    return sample.model_wall if sample.device == "cuda" else sample.flop / (tflops * 1e12)


def _largest(seconds: dict[str, float]) -> str:
    name = max(seconds, key=lambda name: seconds[name])
    return f"{name}, {seconds[name] / sum(seconds.values()):.0%} of the work"
