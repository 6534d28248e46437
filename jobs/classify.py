"""Label every image of a data set with its most probable labels.

    python -m jobs.classify INPUT OUTPUT --labels labels.txt --template "a photo of a {}."

INPUT holds images, or is the output of `clipseg-ray embed`: its vectors are then classified without
reading an image. On the bundled shards with the bundled model:

    printf 'red\\ngreen\\nblue\\n' > labels.txt
    python -m jobs.classify pipeline/demo/shards labels --model demo \\
        --labels labels.txt --template "{}" --top 3

`clipseg-ray classify` is the same. RAY_ADDRESS names a running cluster; without it Ray starts here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline import infer
from pipeline.annotations.report import end_with_report
from pipeline.config.classify import ClassifyConfig
from pipeline.config.command import run_command
from pipeline.config.embed import EmbedConfig
from pipeline.config.options import ImageOptions
from pipeline.embeddings.source import ReadEmbeddings, open_embeddings
from pipeline.embeddings.vectors import EmbeddingTable, check_weights
from pipeline.errors import CheckpointError, UsageError
from pipeline.prepare.images import PrepareImages, fail_crashed_image
from pipeline.read.inputs import Listing, list_shards
from pipeline.read.records import end_crashed_shard, read_batches, read_one_by_one
from pipeline.run.deviation import measure_decode
from pipeline.run.engine import Dataset, Engine
from pipeline.run.finished import list_finished
from pipeline.run.follow import follow_run
from pipeline.run.launch import Progress, load_beside
from pipeline.run.lifecycle import Run, open_run
from pipeline.run.progress import phase, tell
from pipeline.run.summary import summary
from pipeline.storage import set_storage_timeout
from pipeline.write.fragments import WriteFragments
from pipeline.write.rows import MakeLabelRows


def classify(config: ClassifyConfig) -> None:
    """Images or vectors -> the best labels of each -> Parquet tables."""
    set_storage_timeout(config.run.storage_timeout)
    table = open_embeddings(config.input)
    if table:
        if config.precision != "float32":
            raise UsageError("--precision: is of a model on images, and these are embeddings")
        classifier = load_beside(
            config.workers, config.output, lambda encoded: open_for_table(table, config, encoded)
        )
        with phase("listing the input"):
            listing = Listing(list_finished(table.output, table.uri.rpartition("/")[2]), {})
    else:
        model = config.model or EmbedConfig.model
        classifier = load_beside(
            config.workers,
            config.output,
            lambda encoded: infer.open_classifier(model, config, on_progress=encoded),
        )
        with phase("listing the input"):
            listing = list_shards(
                config.input,
                image_column=config.images.image_column,
                member_suffix=config.images.member_suffix,
                strict=config.run.strict,
            )
    tell([f"clipseg-ray classify: {note}" for note in classifier.notes])
    tables = config.tables(classifier.facts(), classifier.top, images=table is None)
    run = open_run(config, *listing, model=classifier.fingerprint(), tables=tables)
    if not table:
        measure_decode(run, config.images, classifier.checkpoint.processor)
    tell(run.notes)
    rows = MakeLabelRows(tables, classifier.labels)

    def stream(engine: Engine) -> Dataset:
        if table:
            ranked = classify_vectors(run, engine, table, classifier)
        else:
            ranked = classify_images(run, engine, config.images, classifier)
        write = WriteFragments(run.first.ledger, rows)
        return ranked.map_batches(engine.guard(write), **engine.task)

    counts = follow_run(run, lambda _, engine: stream(engine), config.workers)
    tell(run.notes)
    print(summary(run, counts, report=end_with_report(run)))


def classify_images(
    run: Run, engine: Engine, images: ImageOptions, classifier: infer.Classifier
) -> Dataset:
    """Read shards -> decode and resize -> classify: schema.RANKED."""
    prepare = PrepareImages(classifier.checkpoint.processor, images.max_pixels, images.decode)
    return (
        engine.dataset(run.first.todo)
        .map_batches(engine.guard(read_batches, end_crashed_shard, read_one_by_one), **engine.read)
        .map_batches(engine.guard(prepare, fail_crashed_image), **engine.task)
        .map_batches(
            infer.ClassifyImages,
            fn_constructor_args=(classifier, engine.device, engine.threads),
            **engine.actor,
        )
    )


def classify_vectors(
    run: Run, engine: Engine, table: EmbeddingTable, classifier: infer.Classifier
) -> Dataset:
    """Read the table -> classify: schema.RANKED, without a model on any worker."""
    return (
        engine.dataset(run.first.todo)
        .map_batches(engine.guard(ReadEmbeddings(table)), **engine.read)
        .map_batches(engine.guard(infer.ClassifyVectors(classifier)), **engine.task)
    )


def open_for_table(
    table: EmbeddingTable, config: ClassifyConfig, encoded: Progress
) -> infer.Classifier:
    """Open the classifier of a table's own model, under --model if given.

    Prints one line if the run of the table is not finished. Raises UsageError for the vectors of
    another model, and for an unloadable one.
    """
    try:
        classifier = infer.open_classifier(config.model or table.model, config, on_progress=encoded)
    except CheckpointError as error:
        hint = "" if config.model else "; --model says where the model of this table is"
        raise UsageError(f"{error}{hint}") from error
    checkpoint = classifier.checkpoint
    if classifier.head:
        raise UsageError(
            f"{checkpoint.name}: its head classifies images, and {table.uri} holds embeddings"
        )
    check_weights(table, checkpoint.name, checkpoint.weights_hash)
    if table.unfinished:
        said = "what it has so far is classified, and the same command later adds the rest"
        tell([f"clipseg-ray classify: {table.output}: its run is not finished; {said}"])
    return classifier


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ClassifyConfig, classify, "clipseg-ray classify", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
