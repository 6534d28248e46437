"""Cut annotations from the kept probability maps of a `segment` run: no model, no torch.

    python -m jobs.label RUN OUTPUT --ontology ontology.yaml

RUN is the OUTPUT of `clipseg-ray segment` with --ontology, or with --keep-probabilities. With
--model RUN may be images: they are segmented first, into OUTPUT/segment.

`clipseg-ray label` is the same. RAY_ADDRESS names a running cluster; without it Ray starts here.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from pipeline import storage
from pipeline.annotations.kept_maps import KeptMaps, ReadKeptMaps, open_kept_maps
from pipeline.annotations.label import (
    CutAnnotations,
    count_annotations,
    describe_classes,
    refuse_missing_prompts,
    refuse_missing_vectors,
)
from pipeline.annotations.report import end_with_report
from pipeline.config.command import run_command
from pipeline.config.label import LabelConfig
from pipeline.errors import UsageError
from pipeline.run.engine import Dataset, Engine
from pipeline.run.finished import list_finished
from pipeline.run.follow import follow_run
from pipeline.run.lifecycle import Run, open_run
from pipeline.run.manifest import is_free, read_run, refuse_other_run
from pipeline.run.progress import phase, tell
from pipeline.run.summary import summary
from pipeline.storage import set_storage_timeout
from pipeline.write.fragments import WriteFragments
from pipeline.write.passes import read_prompt_vectors


def label(config: LabelConfig) -> None:
    """Read the kept maps of each shard -> cut annotations -> Parquet tables."""
    set_storage_timeout(config.run.storage_timeout)
    ontology = config.read_ontology()
    if config.model is not None:
        segment_images(config)
        config = config.of_maps()
    kept = open_kept_maps(config.input)
    refuse_missing_prompts(ontology, kept.output, kept.prompts, kept.recipes)
    wants_vectors = refuse_missing_vectors(ontology, kept.output, embedded=kept.embedded)
    vectors = read_prompt_vectors(kept.output) if wants_vectors else None
    tell_unfinished(kept)
    with phase("listing the input"):
        shards = list_finished(kept.output, "probabilities")
    run = open_run(config, shards, model=kept.facts(), tables=config.tables())
    tell(run.notes)
    cut = CutAnnotations(ontology, kept.prompt_ids, vectors)
    counts = follow_run(run, lambda _, engine: stream(cut, run, engine), config.workers)
    tell(run.notes)
    print(summary(run, counts, report=end_with_report(run)))
    print("\n".join(describe_classes(count_annotations(run.output), ontology)))


def segment_images(config: LabelConfig) -> None:
    """Keep the maps of images, in a run of `segment`, before they are cut.

    Raises UsageError, before, if the labels could not be written.
    """
    output, asked = storage.check_uri(config.output), config.of_images()
    if read_run(storage.check_uri(config.input)) is not None:
        raise UsageError(f"{config.input}: is a run, whose maps are cut; leave out --model")
    found = read_run(output)
    if found is None and not is_free(output, asked.output, config.tables()):
        raise UsageError(f"{output}: holds files that are not from a run; choose another output")
    if found is not None and not config.run.restart:
        before = found.get("fingerprint", {})
        asked_again = json.loads(json.dumps(config.of_maps().fingerprint()))  # as it was written
        versions = dict.fromkeys(("schema_version", "results_version"))
        refuse_other_run(output, before, {**versions, **before, **asked_again})
    importlib.import_module("jobs.segment").segment(asked)


def stream(cut: CutAnnotations, run: Run, engine: Engine) -> Dataset:
    """The chain over the shards left to do."""
    read = ReadKeptMaps(cut.wanted, vectors=bool(cut.text_vectors))
    write = WriteFragments(run.first.ledger, cut, ["annotations"])
    return (
        engine.dataset(run.first.todo)
        .map_batches(engine.guard(read), **engine.read)
        .map_batches(engine.guard(write), **engine.task)
    )


def tell_unfinished(kept: KeptMaps) -> None:
    """Say so in one line if the run is not finished."""
    if kept.unfinished:
        said = "shards that it lacks get no labels until this command is run again"
        tell([f"clipseg-ray label: {kept.output}: its run is not finished; {said}"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(LabelConfig, label, "clipseg-ray label", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
