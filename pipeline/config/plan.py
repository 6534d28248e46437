"""Options of `clipseg-ray plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pipeline.config.classify import ClassifyConfig
from pipeline.config.embed import EmbedConfig
from pipeline.config.options import WorkerOptions, check_positive
from pipeline.config.segment import SegmentConfig
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Machines of a plan, and the sample to make it from."""

    gpus: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Ask what so many GPUs would do, instead of this machine; 0 for none."""

    cpus_per_gpu: Annotated[int, tyro.conf.arg(metavar="N")] = 16
    """CPUs beside each of these GPUs; with --gpus 0, of all machines together."""

    gpu_tflops: Annotated[float, tyro.conf.arg(metavar="X")] = 48.0
    """Arithmetic that a GPU sustains, in TFLOP/s, where none is here to be measured: an assumption.
    48 is an H100 in float32, 350 in bf16."""

    price_per_hour: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Price of an hour of all machines together, in any currency."""

    seconds: float = 20.0
    """Time to measure, after the model is loaded."""

    def __post_init__(self) -> None:
        check_positive(self, "cpus_per_gpu")
        if self.gpus is not None and self.gpus < 0:
            raise UsageError(f"--gpus {self.gpus}: must be at least 0")
        for name in ("gpu_tflops", "price_per_hour", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be above 0")


@tyro.conf.configure(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes)
@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Measure a few images here, and say how long a job takes, what limits it, and what it costs.

    The job's own command follows, with all its options. Nothing is written to its OUTPUT.
    """

    job: (
        Annotated[SegmentConfig, tyro.conf.subcommand("segment")]
        | Annotated[EmbedConfig, tyro.conf.subcommand("embed")]
        | Annotated[ClassifyConfig, tyro.conf.subcommand("classify")]
    )
    plan: tyro.conf.OmitArgPrefixes[PlanOptions] = field(default_factory=PlanOptions)

    @property
    def workers(self) -> WorkerOptions:
        """How lines are said; and the run outlives a decoder ending the process, as with
        --local."""
        asked = self.job.workers
        return WorkerOptions(local=True, quiet=asked.quiet, log_format=asked.log_format)


JOBS: dict[str, type[SegmentConfig | EmbedConfig | ClassifyConfig]] = {
    "segment": SegmentConfig,
    "embed": EmbedConfig,
    "classify": ClassifyConfig,
}
