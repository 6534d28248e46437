"""Measure a CLIPSeg on a data set of its paper, by the paper's settings, beside its figures.

    python -m jobs.reproduce phrasecut --data VGPhraseCut_v0 --model CIDAS/clipseg-rd64

`clipseg-ray reproduce` is the same. It runs in this process, without Ray; docs/reproduce.md says
what the layouts and settings are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.progress import Progress

from pipeline.annotations.episodes import VOID, Fold, open_folds
from pipeline.annotations.published import PUBLISHED, Scores, describe_figures
from pipeline.config.command import run_command
from pipeline.config.reproduce import ReproduceConfig
from pipeline.errors import UsageError
from pipeline.run.progress import phase


def reproduce(config: ReproduceConfig) -> None:
    """Open the folds -> probabilities of every sample -> figures beside the published ones."""
    found, folds, samples = measure(config)
    published = PUBLISHED.get((config.data_set, config.kind))
    part = f", the first {config.limit:,} of each fold alone" if config.limit else ""
    print(
        f"{config.data_set}: {samples:,} samples, {len(folds)} folds, {config.kind} prompts{part}"
    )
    print("\n".join(describe_figures(found, published)))
    notes = [note for fold in folds for note in fold.notes]
    print("\n".join(f"  {note}" for note in [*notes, *([published.caution] if published else [])]))


def measure(config: ReproduceConfig) -> tuple[dict[str, float], list[Fold], int]:
    """Means of the figures over the folds, 0..1; the folds; and the number of samples.

    Raises UsageError, CheckpointError.
    """
    # The model's libraries take seconds, which --help and mistakes do without.
    module = importlib.import_module("pipeline.annotations.predict_episode")
    predict = module.Predict(config.model, config.device)
    with phase("listing the data set", quiet=config.quiet):
        folds = open_folds(config, predict.side)
    published = PUBLISHED.get((config.data_set, config.kind))
    threshold = published.threshold if published else 0.5
    console = Console(stderr=True)
    hidden = config.quiet or not console.is_terminal
    scores = []
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("measuring", total=sum(fold.total for fold in folds))
        for fold in folds:
            score = Scores(apart=config.data_set == "phrasecut")
            for episode in fold.episodes():
                if config.kind == "image" and episode.example is None:
                    raise UsageError(
                        f"--data {config.data}: {fold.name}: no second image of "
                        f"{episode.text!r} to show as an example"
                    )
                counted = episode.truth != VOID
                probability = predict(episode)
                score.add(probability[counted], episode.truth[counted] == 1, episode.of_class)
                progress.update(bar, advance=1)
            if not score.samples:
                raise UsageError(f"--data {config.data}: {fold.name}: no sample of it")
            scores.append(score)
    values = [score.value(threshold) for score in scores]
    means = {name: float(np.mean([each[name] for each in values])) for name in values[0]}
    return means, folds, sum(score.samples for score in scores)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ReproduceConfig, reproduce, "clipseg-ray reproduce", argv)


if __name__ == "__main__":
    sys.exit(main())
