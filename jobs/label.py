"""Cut annotations from the probability maps that a run of `segment` kept: no model, no torch.

    python -m jobs.label RUN OUTPUT --ontology ontology.yaml

where RUN is the OUTPUT of `clipseg-ray segment` with --ontology, or with --keep-probabilities.

`clipseg-ray label` is the same. RAY_ADDRESS names a running cluster; without it Ray starts here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import ray.data

from pipeline.annotations.kept_maps import KeptMaps, ReadKeptMaps, open_kept_maps, plan_kept_maps
from pipeline.annotations.label import (
    CutAnnotations,
    count_annotations,
    describe_classes,
    refuse_missing_prompts,
)
from pipeline.config.command import run_command
from pipeline.config.label import LabelConfig
from pipeline.run.follow import finish
from pipeline.run.guard import bounded
from pipeline.run.lifecycle import Run, open_run, summary
from pipeline.run.resources import Shares, share_cluster
from pipeline.run.session import ray_session
from pipeline.run.source import dataset_of
from pipeline.storage import set_storage_timeout
from pipeline.write.fragments import WriteFragments
from pipeline.write.rows import make_fragments


def label(config: LabelConfig) -> None:
    """Read the kept maps of each shard -> cut annotations -> Parquet tables."""
    set_storage_timeout(config.run.storage_timeout)
    ontology = config.read_ontology()
    kept = open_kept_maps(config.input)
    refuse_missing_prompts(ontology, kept.output, kept.prompts, kept.recipes)
    tell_unfinished(kept)
    run = open_run(config, plan_kept_maps(kept), model=kept.facts(), tables=config.tables())
    cut = CutAnnotations(ontology, kept.prompt_ids)
    with ray_session():
        streams = [stream(cut, run, share_cluster(config.workers))]
        counts = finish(run, streams, quiet=config.workers.quiet)
    print(summary(run, counts))
    print("\n".join(describe_classes(count_annotations(run.output), ontology)))


def stream(cut: CutAnnotations, run: Run, shares: Shares) -> ray.data.Dataset:
    """The chain over the shards that are left to do."""
    rows = functools.partial(make_fragments, tables_of=cut)
    return (
        dataset_of(run.todo)
        .map_batches(bounded(ReadKeptMaps(cut.wanted)), **shares.read)
        .map_batches(bounded(rows), **shares.task)
        .map_batches(bounded(WriteFragments(run.output)), **shares.task)
    )


def tell_unfinished(kept: KeptMaps) -> None:
    """Say in one line where the run is not finished."""
    if kept.unfinished:
        print(
            f"clipseg-ray label: {kept.output}: its run is not finished; shards that it lacks get "
            "no labels until this command is run again",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(LabelConfig, label, "clipseg-ray label", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
