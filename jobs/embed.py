"""Embed every image of a data set with CLIP.

    python -m jobs.embed INPUT OUTPUT --model openai/clip-vit-base-patch16

and, on the bundled shards with the bundled model, in well under a minute on two cores:

    python -m jobs.embed pipeline/demo/shards embeddings --model demo

`clipseg-ray embed` is the same. RAY_ADDRESS names a running cluster; without it Ray starts here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline import infer
from pipeline.annotations.report import end_with_report
from pipeline.config.command import run_command
from pipeline.config.embed import EmbedConfig
from pipeline.prepare.images import PrepareImages, fail_crashed_image
from pipeline.read.inputs import list_shards
from pipeline.read.records import end_crashed_shard, read_batches, read_one_by_one
from pipeline.run.deviation import measure_decode
from pipeline.run.engine import Dataset, Engine
from pipeline.run.follow import follow_run
from pipeline.run.launch import load_beside
from pipeline.run.lifecycle import open_run
from pipeline.run.progress import phase, tell
from pipeline.run.summary import summary
from pipeline.storage import set_storage_timeout
from pipeline.write.fragments import WriteFragments
from pipeline.write.rows import MakeEmbeddingRows


def embed(config: EmbedConfig) -> None:
    """Read shards -> decode and resize -> embed -> Parquet tables."""
    set_storage_timeout(config.run.storage_timeout)
    with phase("listing the input"):
        listing = list_shards(
            config.input,
            image_column=config.images.image_column,
            text_column=config.text_column,
            member_suffix=config.images.member_suffix,
            strict=config.run.strict,
        )
    spec = load_beside(
        config.workers,
        config.output,
        lambda _: infer.open_embedder(
            config.model,
            text=config.text_column is not None,
            normalize=config.normalize,
            dtype=config.dtype,
            precision=config.precision,
        ),
    )
    checkpoint = spec.checkpoint
    tables = config.tables(checkpoint.dimension, checkpoint.weights_hash)
    run = open_run(config, *listing, model=checkpoint.fingerprint(), tables=tables)
    measure_decode(run, config.images, checkpoint.processor)
    tell(run.notes)
    prepare = PrepareImages(checkpoint.processor, config.images.max_pixels, config.images.decode)
    rows = MakeEmbeddingRows(tables["embeddings"].schema)

    def stream(engine: Engine) -> Dataset:
        read = engine.guard(read_batches, end_crashed_shard, read_one_by_one)
        return (
            engine.dataset(run.first.todo)
            .map_batches(read, **engine.read)
            .map_batches(engine.guard(prepare, fail_crashed_image), **engine.task)
            .map_batches(
                infer.EmbedImages,
                fn_constructor_args=(spec, engine.device, engine.threads),
                **engine.actor,
            )
            .map_batches(engine.guard(WriteFragments(run.first.ledger, rows)), **engine.task)
        )

    counts = follow_run(run, lambda _, engine: stream(engine), config.workers)
    tell(run.notes)
    print(summary(run, counts, report=end_with_report(run)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(EmbedConfig, embed, "clipseg-ray embed", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
