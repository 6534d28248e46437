"""Segment every image of a data set with every prompt.

    python -m jobs.segment INPUT OUTPUT --prompt "a cat" --prompt "a remote"

and, on the bundled shards with the bundled model, in well under a minute on two cores:

    python -m jobs.segment pipeline/demo/shards demo-output --model pipeline/demo/model \\
        --prompt blue --prompt star --contact-sheet demo-output/contact-sheet.png

`clipseg-ray segment` is the same. RAY_ADDRESS names a running cluster; without it Ray starts here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import ray.data

from pipeline.annotations.contact_sheet import write_contact_sheet
from pipeline.config.command import run_command
from pipeline.config.segment import SegmentConfig
from pipeline.infer.segment import PromptedModel, SegmentImages, encode_prompts
from pipeline.prepare.images import PrepareImages
from pipeline.read.records import plan_shards, read_batches
from pipeline.run.follow import finish
from pipeline.run.guard import bounded
from pipeline.run.lifecycle import Run, open_run, summary
from pipeline.run.resources import Shares, share_cluster
from pipeline.run.session import ray_session
from pipeline.run.source import dataset_of
from pipeline.storage import set_storage_timeout
from pipeline.write.fragments import WriteFragments
from pipeline.write.rows import MakeTables


def segment(config: SegmentConfig) -> None:
    """Read shards -> decode and resize -> segment -> masks at image size -> Parquet tables."""
    set_storage_timeout(config.run.storage_timeout)
    shards = plan_shards(config.input, image_column=config.images.image_column)
    prompted = encode_prompts(config.model, config.all_prompts(), embed=config.embed)
    checkpoint = prompted.checkpoint
    tables = config.tables(checkpoint.dimension, checkpoint.weights_hash)
    run = open_run(config, shards, model=checkpoint.fingerprint(), tables=tables)
    with ray_session():
        shares = share_cluster(config.workers)
        # One pass over the shards, and one more for each time that prompts were added.
        streams = [stream(config, prompted, each, shares) for each in run.passes]
        counts = finish(run, streams, quiet=config.workers.quiet)
    print(summary(run, counts))
    if config.contact_sheet:
        max_pixels = config.images.max_pixels
        write_contact_sheet(config.contact_sheet, run.output, shards, max_pixels)


def stream(
    config: SegmentConfig, prompted: PromptedModel, run: Run, shares: Shares
) -> ray.data.Dataset:
    """What is left to do in one pass, with its prompts."""
    asked = prompted.only(run.prompts, embed="embeddings" in run.tables)
    prepare = PrepareImages(prompted.checkpoint.processor, config.images.max_pixels)
    tables = MakeTables(config, run.tables, run.prompts, run.first_prompt)
    return (
        dataset_of(run.todo)
        .map_batches(bounded(read_batches, apart=True), **shares.read)
        .map_batches(bounded(prepare, apart=True), **shares.task)
        .map_batches(
            SegmentImages,
            fn_constructor_args=(asked, shares.device, shares.threads),
            **shares.actor,
        )
        .map_batches(bounded(tables), **shares.task)
        .map_batches(bounded(WriteFragments(run.output, run.first_prompt)), **shares.task)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(SegmentConfig, segment, "clipseg-ray segment", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
