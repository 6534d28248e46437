"""Measure `clipseg-ray calibrate` with the bundled CLIPSeg and a badly set ontology.

    python -m pipeline.demo.calibrate --images 400

On the scenes of `evaluate`, their drawing as ground truth: thresholds and presence gates of colours
and shapes are chosen on one half and held against the other.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from PIL import Image

from pipeline.annotations.calibrate import SETTINGS, Calibration, is_chosen_on
from pipeline.annotations.cut import ask
from pipeline.annotations.predicted import find_class, without_gates
from pipeline.config.ontology import Ontology, OntologyClass
from pipeline.demo import MODEL
from pipeline.demo.evaluate import SEED, load_model
from pipeline.demo.scenes import COLOURS, SHAPES, Pair, draw_scene, phrase
from pipeline.model.tokenizer import Tokenizer
from pipeline.prepare.processor import ImageProcessor

# Too high for half of the classes, too low for the others.
BADLY = (0.9, 0.06)
PAIRS: tuple[Pair, ...] = (*((c, "") for c in COLOURS), *(("", s) for s in SHAPES))
NAMES = [phrase(*pair) for pair in PAIRS]


def badly_set() -> Ontology:
    """A class of each of PAIRS."""
    return Ontology(
        classes=tuple(
            OntologyClass(name=name, phrases=(name,), threshold=BADLY[i % 2])
            for i, name in enumerate(NAMES)
        )
    )


@torch.inference_mode()
def measure(images: int) -> Calibration:
    """Count so many scenes."""
    model, processor = load_model(MODEL), ImageProcessor.from_folder(MODEL)
    length = model.config.text_config.max_position_embeddings
    text = model.encode_text(*Tokenizer.from_folder(MODEL)(NAMES, length))
    ontology = badly_set()
    asked = ask(without_gates(ontology), {name: i for i, name in enumerate(NAMES)})
    counted = Calibration(list(ontology.classes))
    for number in range(images):
        scene = draw_scene(np.random.default_rng((SEED, number)))
        pixels = processor([Image.fromarray(scene.image)])
        logits = model.decode(model.activations(pixels), text, model.grid(pixels))[0]
        maps = dict(enumerate((255 * logits.sigmoid()).round().to(torch.uint8).numpy()))
        size = scene.labels.shape
        truth = [scene.mask(*pair).T for pair in PAIRS]
        counted.add(
            is_chosen_on("scenes", str(number)),
            lambda k, maps=maps, size=size: find_class(maps, asked[k], size),  # type: ignore[misc]
            lambda k, truth=truth: truth[k],  # type: ignore[misc]
        )
    return counted


def table(counted: Calibration) -> str:
    """Markdown."""
    lines = [
        f"| {counted.held_out} images | {' | '.join(SETTINGS)} | change from 0.5, 95 % | "
        "change from as given, 95 % |",
        "| --- " * (len(SETTINGS) + 3) + "|",
    ]
    for name, gain in counted.gains(counted.choose()).items():
        values = " | ".join(f"{value:.3f}" for value in gain.values)
        spread = " | ".join(
            f"{gain.values[-1] - v:+.3f} ({low:+.3f} to {high:+.3f})"
            for v, low, high in list(zip(gain.values, gain.low, gain.high, strict=True))[:-1]
        )
        lines.append(f"| {name} | {values} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400, help="scenes to draw")
    sys.stdout.write(table(measure(parser.parse_args().images)) + "\n")


if __name__ == "__main__":
    main()
