"""Choose the threshold and the presence gate of each class by ground truth.

    python -m jobs.calibrate RUN --ground-truth coco.json --ontology in.yaml --output out.yaml

`clipseg-ray calibrate` is the same. It runs in this process, without Ray, model and torch;
docs/evaluate.md says how it chooses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from pipeline import storage
from pipeline.annotations.calibrate import Calibration, Choice, describe_gains, is_chosen_on
from pipeline.annotations.evaluate import Matched, shared_classes
from pipeline.annotations.kept_maps import open_kept_maps
from pipeline.annotations.predicted import open_maps, without_gates
from pipeline.annotations.truth import Truth
from pipeline.annotations.truth_files import open_truth
from pipeline.config.command import run_command
from pipeline.config.evaluate import CalibrateConfig
from pipeline.config.ontology import OntologyClass, read_ontology
from pipeline.config.ontology_edit import edit_ontology
from pipeline.errors import UsageError, one_line


def calibrate(config: CalibrateConfig) -> None:
    """Count both halves of the labelled images -> choose on one -> hold it against the other."""
    ontology, output = read_ontology(config.ontology), storage.check_uri(config.output)
    if storage.is_file(output):
        raise UsageError(f"--output {output}: exists already; choose another name")
    kept = open_kept_maps(config.source)
    predictions = open_maps(kept, without_gates(ontology))
    truth = open_truth(config.truth)
    class_ids = shared_classes(predictions, truth)
    counted = Calibration([ontology.classes[i] for i in class_ids])
    matched = Matched(predictions, truth)
    console = Console(stderr=True)
    hidden = config.quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("calibrating", total=len(truth.images))
        for image, drawn, size in matched:
            counted.add(
                is_chosen_on(image.shard, image.names[0]),
                lambda k, image=image, size=size: image.find(class_ids[k], size),  # type: ignore[misc]
                lambda k, drawn=drawn, size=size: drawn.mask_at(counted.classes[k].name, size),  # type: ignore[misc]
                drawn.void,
            )
            progress.update(bar, advance=1)
    if not counted.chosen_on or not counted.held_out:
        raise UsageError(
            f"{truth.source}: {counted.chosen_on + counted.held_out} images of the run have ground "
            "truth; choosing and checking need a few dozen; " + "; ".join(matched.lines())
        )
    choices = counted.choose()
    lines = describe(counted, choices, truth)
    data = storage.read_bytes(storage.check_uri(config.ontology))
    changes = {
        each.name: {
            name: getattr(choice, name)
            for name in ("threshold", "presence")
            if getattr(choice, name) != getattr(each, name)
        }
        for each, choice in zip(counted.classes, choices, strict=True)
    }
    text = edit_ontology(data, config.ontology, output, changes, lines)
    storage.write_bytes(output, text.encode())
    print("\n".join([*lines, *matched.lines(), output]))


def describe(counted: Calibration, choices: list[Choice], truth: Truth) -> list[str]:
    """Lines on the choice, its source and its gain."""
    lines = [
        f"thresholds and presence gates chosen by clipseg-ray calibrate on {counted.chosen_on:,} "
        f"images of {truth.source}; figures of the {counted.held_out:,} other images:",
        *(f"  {line}" for line in describe_gains(counted.gains(choices))),
    ]
    for each, choice in zip(counted.classes, choices, strict=True):
        lines.append(f"  {one_line(each.name, 100)}: {_describe_choice(each, choice)}")
    return lines


def _describe_choice(each: OntologyClass, choice: Choice) -> str:
    if not choice.images:
        return "in no image of that half; left as it was"
    return (
        f"threshold {each.threshold:g} -> {choice.threshold:g}, presence {each.presence:g} -> "
        f"{choice.presence:g} (in {choice.images:,} images, IoU {choice.iou:.4f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(CalibrateConfig, calibrate, "clipseg-ray calibrate", argv)


if __name__ == "__main__":
    sys.exit(main())
