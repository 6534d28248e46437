"""Segment every image of a data set with every prompt.

    python -m jobs.segment INPUT OUTPUT --prompt "a cat" --prompt "a remote"

and, on the bundled shards with the bundled model, in well under a minute on two cores:

    python -m jobs.segment pipeline/demo/shards demo-output --model demo \\
        --prompt blue --prompt star --contact-sheet demo-output/contact-sheet.png

`clipseg-ray segment` is the same. RAY_ADDRESS names a running cluster; without it Ray starts here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from pipeline import infer
from pipeline.annotations.report import end_with_report
from pipeline.config.command import run_command
from pipeline.config.segment import SegmentConfig
from pipeline.prepare.images import PrepareImages, fail_crashed_image
from pipeline.prepare.windows import PrepareLooks
from pipeline.read.inputs import list_shards
from pipeline.read.records import end_crashed_shard, read_batches, read_one_by_one
from pipeline.read.shard import as_phrases
from pipeline.run.deviation import measure_decode
from pipeline.run.engine import Dataset, Engine
from pipeline.run.follow import follow_run
from pipeline.run.guard import Stage
from pipeline.run.launch import load_beside
from pipeline.run.lifecycle import Pass, open_run
from pipeline.run.progress import phase, tell
from pipeline.run.summary import summary
from pipeline.storage import set_storage_timeout
from pipeline.write.fragments import WriteFragments
from pipeline.write.passes import write_prompt_vectors
from pipeline.write.rows import MakeMaskRows


def segment(config: SegmentConfig) -> None:
    """Read shards -> decode and resize -> segment -> masks at image size -> Parquet tables."""
    set_storage_timeout(config.run.storage_timeout)
    config = config.resolve()
    with phase("listing the input"):
        listing = list_shards(
            config.input,
            image_column=config.images.image_column,
            text_column=as_phrases(config.prompt_column) if config.prompt_column else None,
            member_suffix=config.images.member_suffix,
            strict=config.run.strict,
        )
    max_pixels = config.images.max_pixels
    spec = load_beside(
        config.workers,
        config.output,
        lambda encoded: infer.open_segmenter(
            config.model,
            config.asked(),
            per_row=config.prompt_column is not None,
            embed=config.embed,
            fine=config.fine,
            max_pixels=max_pixels,
            precision=config.precision,
            on_progress=encoded,
        ),
    )
    tell([f"clipseg-ray segment: {note}" for note in spec.notes])
    checkpoint = spec.checkpoint
    tables = config.tables(checkpoint.dimension, checkpoint.weights_hash)
    run = open_run(config, *listing, model=checkpoint.fingerprint(), tables=tables)
    measure_decode(run, config.images, checkpoint.processor)
    tell(run.notes)
    conditional = [spec.only(each.prompts, embed=False).conditional for each in run.passes]
    write_prompt_vectors(run.output, np.concatenate(conditional))
    # One pass over the shards, and one more for each time that prompts were added.
    counts = follow_run(
        run, lambda each, engine: stream(config, spec, each, engine), config.workers
    )
    tell(run.notes)
    print(summary(run, counts, report=end_with_report(run)))
    if config.contact_sheet:
        from pipeline.annotations.contact_sheet import write_contact_sheet  # 0.3 s of --help

        total = counts["rows_ok"]
        write_contact_sheet(config.contact_sheet, run.output, listing.shards, max_pixels, total)
        print(f"contact sheet: {config.contact_sheet}")


def stream(
    config: SegmentConfig, spec: infer.SegmentSpec, of_pass: Pass, engine: Engine
) -> Dataset:
    """The chain of one pass, with its prompts, over its unfinished shards."""
    embed = "embeddings" in of_pass.tables
    asked = spec.only(of_pass.prompts, embed=embed, rule=config.rule)
    max_pixels, actor = config.images.max_pixels, engine.actor
    prepare: Stage = PrepareImages(spec.checkpoint.processor, max_pixels, config.images.decode)
    if asked.looks:
        prepare = PrepareLooks(asked.looks, max_pixels)
        fewer = min(actor["batch_size"], asked.looks.images_at_once)
        actor = actor | {"batch_size": config.workers.batch_size or fewer}
    rows = MakeMaskRows(config, of_pass.tables, of_pass.prompts, of_pass.ledger.first_prompt)
    uncounted = [name for name, table in of_pass.tables.items() if not table.rows_per_image]
    write = WriteFragments(of_pass.ledger, rows, uncounted)
    return (
        engine.dataset(of_pass.todo)
        .map_batches(engine.guard(read_batches, end_crashed_shard, read_one_by_one), **engine.read)
        .map_batches(engine.guard(prepare, fail_crashed_image), **engine.task)
        .map_batches(
            infer.SegmentImages,
            fn_constructor_args=(asked, engine.device, engine.threads),
            **actor,
        )
        .map_batches(engine.guard(write), **engine.task)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(SegmentConfig, segment, "clipseg-ray segment", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
