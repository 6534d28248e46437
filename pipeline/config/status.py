"""Options of the commands on the output of a run: status, verify, retry-failed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, TypeVar

import tyro

from pipeline.config.options import Output, WorkerOptions
from pipeline.errors import UsageError

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Print the progress of a run: shards and rows done, failed and left."""

    output: Output
    """The OUTPUT of a job, local or s3://."""

    errors: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also name images that failed, up to 20 of each reason."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compare the parts of a run with the hashes in their receipts."""

    output: Output
    """The OUTPUT of a job, local or s3://."""

    sample: float = 1.0
    """Share of the finished shards to read; above 0, at most 1. The same share is the same
    shards."""

    recompute: float = 0.0
    """Share of the finished shards to process again, in this process, and compare; at least one
    shard if above 0. Needs the input and the model, and the kind of CPU that the run had."""

    def __post_init__(self) -> None:
        if not 0 < self.sample <= 1:
            raise UsageError(f"--sample {self.sample}: must be above 0, and at most 1")
        if not 0 <= self.recompute <= 1:
            raise UsageError(f"--recompute {self.recompute}: must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Reprocess shards with retryable failures."""

    output: Output
    """The OUTPUT of a job, local or s3://. The options of the job are in its _run.json."""

    every: Annotated[bool, tyro.conf.arg(name="all"), tyro.conf.FlagCreatePairsOff] = False
    """Also reprocess shards with permanent failures, such as broken images."""

    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)


def config_from_record(config: type[Config], values: dict[str, Any]) -> Config:
    """Rebuild a job's config from _run.json. Raises UsageError for one of another version."""
    known: dict[str, Any] = {}
    for item in fields(config):  # type: ignore[arg-type]
        if item.name not in values:
            continue
        value = values[item.name]
        default = item.default_factory() if callable(item.default_factory) else None
        if is_dataclass(default):
            value = config_from_record(type(default), value)
        known[item.name] = tuple(value) if isinstance(value, list) else value
    try:
        return config(**known)
    except TypeError as error:
        raise UsageError(
            f"the run was started by another version of clipseg-ray: {error}"
        ) from error
