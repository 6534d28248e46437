"""Hold the kept maps of a run, or labels, against ground truth.

    python -m jobs.evaluate RUN|LABELS --ground-truth coco.json --output evaluation

`clipseg-ray evaluate` is the same. It runs in this process, without Ray, model and torch, in memory
independent of the number of images; docs/evaluate.md says what the figures are.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from pipeline import storage
from pipeline.annotations.evaluate import evaluate_run, summarize
from pipeline.annotations.evaluation_page import describe_rows, draw_evaluation, evaluation_table
from pipeline.annotations.predicted import open_predictions
from pipeline.annotations.truth_files import open_truth
from pipeline.config.command import run_command
from pipeline.config.evaluate import EvaluateConfig


def evaluate(config: EvaluateConfig) -> None:
    """Read predictions and ground truth side by side -> counts -> table, Parquet and page."""
    predictions = open_predictions(config.source, config.read_ontology())
    truth = open_truth(config.truth)
    console = Console(stderr=True)
    hidden = config.quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("evaluating", total=len(truth.images))
        result = evaluate_run(predictions, truth, lambda: progress.update(bar, advance=1))
    rows = summarize(result)
    title = f"{result.images:,} images of {predictions.source} with {truth.source}"
    print("\n".join([title, *describe_rows(rows), *(f"  {line}" for line in result.lines)]))
    if config.output:
        folder = storage.check_uri(config.output)
        sink = io.BytesIO()
        pq.write_table(evaluation_table(rows), sink, compression="zstd")
        storage.write_bytes(storage.join(folder, "evaluation.parquet"), sink.getvalue())
        page = draw_evaluation(title, rows, result.lines)
        storage.write_bytes(storage.join(folder, "evaluation.html"), page.encode())
        print(f"  {storage.join(folder, 'evaluation.html')}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(EvaluateConfig, evaluate, "clipseg-ray evaluate", argv)


if __name__ == "__main__":
    sys.exit(main())
