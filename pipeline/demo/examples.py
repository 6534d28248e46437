"""Measure the bundled CLIPSeg with example images as prompts, beside the phrases themselves.

    python -m pipeline.demo.examples --images 200

On the scenes of `evaluate`; examples, each with its mask, are from scenes of a third seed.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.demo import MODEL
from pipeline.demo.evaluate import KINDS, PHRASES, SEED, kind_of, load_model
from pipeline.demo.scenes import Pair, draw_scene
from pipeline.demo.scenes import phrase as plain_phrase
from pipeline.infer.visual_prompt import prepare_example
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.tokenizer import Tokenizer
from pipeline.prepare.processor import ImageProcessor

EXAMPLES = 4  # of a phrase
EXAMPLE_SEED = 30_000_000
MIN_AREA_PX = 200  # of what an example shows
PROMPTS = ("the phrase", "one example", "four examples", "four examples and the phrase")


def find_examples(pair: Pair, processor: ImageProcessor) -> Tensor:
    """Visual prompts (EXAMPLES, 3, H, W) of what a colour, a shape or both name."""
    found: list[Tensor] = []
    number = 0
    while len(found) < EXAMPLES:
        scene = draw_scene(np.random.default_rng((EXAMPLE_SEED, number)))
        number += 1
        mask = scene.mask(*pair)
        if mask.sum() >= MIN_AREA_PX:
            image = Image.fromarray(scene.image)
            found.append(prepare_example(image, mask, processor, "crop_blur_highlight"))
    return torch.stack(found)


def encode(model: CLIPSeg, processor: ImageProcessor, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Conditional embeddings (phrases, E) for each of PROMPTS."""
    length = model.config.text_config.max_position_embeddings
    text = model.encode_text(*tokenizer([plain_phrase(*p) for p in PHRASES], length))
    shown = torch.stack([model.encode_image(find_examples(p, processor)) for p in PHRASES])
    of_four = shown.mean(1)
    return dict(zip(PROMPTS, (text, shown[:, 0], of_four, (text + of_four) / 2), strict=True))


@torch.inference_mode()
def measure(images: int) -> dict[str, dict[str, list[float]]]:
    """IoU at probability 0.5 of every true phrase of a scene, by kind and prompt."""
    model, processor = load_model(MODEL), ImageProcessor.from_folder(MODEL)
    prompts = encode(model, processor, Tokenizer.from_folder(MODEL))
    iou: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(images):
        scene = draw_scene(np.random.default_rng((SEED, number)))
        pixels = processor([Image.fromarray(scene.image)])
        there = [j for j, pair in enumerate(PHRASES) if scene.mask(*pair).any()]
        activations, grid = model.activations(pixels), model.grid(pixels)
        for name, conditional in prompts.items():
            found = (model.decode(activations, conditional[there], grid)[0] > 0).numpy()
            for j, mask in zip(there, found, strict=True):
                truth = scene.mask(*PHRASES[j])
                value = float((mask & truth).sum() / (mask | truth).sum())
                iou[kind_of(PHRASES[j])][name].append(value)
    return iou


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="scenes to draw")
    args = parser.parse_args()
    iou = measure(args.images)
    lines = [f"| mean IoU | {' | '.join(PROMPTS)} | phrases |", "| --- " * 6 + "|"]
    for kind in KINDS:
        values = " | ".join(f"{np.mean(iou[kind][name]):.3f}" for name in PROMPTS)
        lines.append(f"| {kind} | {values} | {len(iou[kind][PROMPTS[0]])} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
