"""Embed every image of a data set with CLIP.

    python -m jobs.embed INPUT OUTPUT --model openai/clip-vit-base-patch16

and, on the bundled shards with the bundled model, in well under a minute on two cores:

    python -m jobs.embed pipeline/demo/shards embeddings --model pipeline/demo/model

`clipseg-ray embed` is the same. RAY_ADDRESS names a running cluster; without it Ray starts here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.config.command import run_command
from pipeline.config.embed import EmbedConfig
from pipeline.infer.embed import EmbedImages, open_embedder
from pipeline.prepare.images import PrepareImages
from pipeline.read.records import plan_shards, read_batches
from pipeline.run.follow import finish
from pipeline.run.guard import bounded
from pipeline.run.lifecycle import open_run, summary
from pipeline.run.resources import share_cluster
from pipeline.run.session import ray_session
from pipeline.run.source import dataset_of
from pipeline.storage import set_storage_timeout
from pipeline.write.fragments import WriteFragments
from pipeline.write.rows import MakeEmbeddingTables


def embed(config: EmbedConfig) -> None:
    """Read shards -> decode and resize -> embed -> Parquet tables."""
    set_storage_timeout(config.run.storage_timeout)
    column = config.images.image_column
    shards = plan_shards(config.input, image_column=column, text_column=config.text_column)
    embedder = open_embedder(
        config.model,
        text=config.text_column is not None,
        normalize=config.normalize,
        dtype=config.dtype,
    )
    checkpoint = embedder.checkpoint
    tables = config.tables(checkpoint.dimension, checkpoint.weights_hash)
    run = open_run(config, shards, model=checkpoint.fingerprint(), tables=tables)
    with ray_session():
        shares = share_cluster(config.workers)
        prepare = PrepareImages(checkpoint.processor, config.images.max_pixels)
        accounts = (
            dataset_of(run.todo)
            .map_batches(bounded(read_batches, apart=True), **shares.read)
            .map_batches(bounded(prepare, apart=True), **shares.task)
            .map_batches(
                EmbedImages,
                fn_constructor_args=(embedder, shares.device, shares.threads),
                **shares.actor,
            )
            .map_batches(bounded(MakeEmbeddingTables(tables["embeddings"].schema)), **shares.task)
            .map_batches(bounded(WriteFragments(run.output)), **shares.task)
        )
        counts = finish(run, [accounts], quiet=config.workers.quiet)
    print(summary(run, counts))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(EmbedConfig, embed, "clipseg-ray embed", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
