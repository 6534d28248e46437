"""The configuration of a run, to run its job again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

from pipeline.config.classify import ClassifyConfig
from pipeline.config.embed import EmbedConfig
from pipeline.config.label import LabelConfig
from pipeline.config.segment import SegmentConfig
from pipeline.config.status import config_from_record
from pipeline.errors import UsageError
from pipeline.write.passes import read_added

JobConfig = SegmentConfig | EmbedConfig | ClassifyConfig | LabelConfig

JOBS: dict[str, type[JobConfig]] = {
    "segment": SegmentConfig,
    "embed": EmbedConfig,
    "classify": ClassifyConfig,
    "label": LabelConfig,
}


def config_of_run(
    output: str, record: dict[str, Any], *, added: bool = True
) -> tuple[str, JobConfig]:
    """The name of the job of a run, and its config with every prompt.

    `added`: also the prompts added to it. Raises UsageError for a record of another version.
    """
    name = record.get("fingerprint", {}).get("job")
    if name not in JOBS:
        raise UsageError(f"{output}/_run.json: of an unknown job {name!r}")
    job = config_from_record(JOBS[name], record["config"])
    if isinstance(job, SegmentConfig):
        more = chain(*read_added(output).values()) if added else ()
        job = with_all_phrases(job, record["fingerprint"], more)
    return name, job


def with_all_phrases(
    job: SegmentConfig, fingerprint: dict[str, Any], added: Iterable[str]
) -> SegmentConfig:
    """The config with every phrase of its run; other prompts keep their sources."""
    prompts = [*fingerprint["prompts"], *added]
    phrases = [prompt for prompt in prompts if prompt not in fingerprint.get("recipes", {})]
    return replace(job, prompt=tuple(phrases), prompts=None)
