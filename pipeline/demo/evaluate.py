"""Measure the bundled CLIPSeg, or one like it, on unseen scenes.

    python -m pipeline.demo.evaluate --images 500

Scenes come from another seed than the training scenes and from all colour-shape pairs, some of them
never shown or named in training. Masks are thresholded at probability 0.5.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.demo import MODEL
from pipeline.demo.scenes import ALL_PAIRS, COLOURS, SHAPES, UNSEEN_PAIRS, Pair, Scene, draw_scene
from pipeline.demo.scenes import phrase as plain_phrase
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.config import CLIPSegConfig
from pipeline.model.tokenizer import Tokenizer
from pipeline.model.weights import load_weights
from pipeline.prepare.processor import ImageProcessor

SEED = 20_000_000  # far from every seed of the training scenes
KINDS = ("pair seen in training", "pair unseen", "colour", "shape")
PHRASES: tuple[Pair, ...] = (*ALL_PAIRS, *((c, "") for c in COLOURS), *(("", s) for s in SHAPES))
FALSE_ALARM = 0.01  # share of the image that an absent phrase may cover
BATCH = 8


def kind_of(pair: Pair) -> str:
    """The one of KINDS for a phrase."""
    colour, shape = pair
    if colour and shape:
        return KINDS[pair in UNSEEN_PAIRS]
    return KINDS[2] if colour else KINDS[3]


@dataclass
class Figures:
    """Measurements: by kind of phrase, one number for each phrase and image.

    `iou` of present phrases; `quiet` whether an absent phrase covered less than FALSE_ALARM;
    `precision_at_10` by colour.
    """

    iou: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    quiet: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    precision_at_10: dict[str, float] = field(default_factory=dict)

    def quiet_share(self) -> float:
        """Over every image and one absent phrase of each kind in it."""
        return float(np.mean([q for kind in KINDS for q in self.quiet[kind]]))

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| phrase | mean IoU | phrases | absent phrase under 1 % of the pixels | images |",
            "| --- | --- | --- | --- | --- |",
        ]
        for kind in KINDS:
            iou, quiet = self.iou[kind], self.quiet[kind]
            lines.append(
                f"| {kind} | {np.mean(iou):.3f} | {len(iou)} "
                f"| {100 * np.mean(quiet):.1f} % | {len(quiet)} |"
            )
        lines.append(f"| any absent phrase | | | {100 * self.quiet_share():.1f} % | |")
        found = self.precision_at_10
        worst = min(found, key=lambda c: found[c])
        lines += [
            "",
            f"Search by embedding, precision in the first 10 images: "
            f'{found["red"]:.2f} for "red", {np.mean(list(found.values())):.2f} over '
            f'{len(found)} colours, worst {found[worst]:.2f} ("{worst}").',
        ]
        return "\n".join(lines)


def load_model(folder: Path) -> CLIPSeg:
    """The segmentation model of a checkpoint folder, in float32 on the CPU."""
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = CLIPSeg(CLIPSegConfig.from_dict(config))
    load_weights(model, folder)
    return model


def evaluate(folder: Path, images: int) -> Figures:
    """Load the checkpoint in `folder` and measure it on so many scenes."""
    model = load_model(folder)
    processor, tokenizer = ImageProcessor.from_folder(folder), Tokenizer.from_folder(folder)
    figures = Figures()
    length = model.config.text_config.max_position_embeddings
    with torch.inference_mode():
        text = model.encode_text(*tokenizer([plain_phrase(*p) for p in PHRASES], length))
        scenes, embeddings = [], []
        for start in range(0, images, BATCH):
            numbers = range(start, min(start + BATCH, images))
            batch = [draw_scene(np.random.default_rng((SEED, i))) for i in numbers]
            pixels = [processor.resize(Image.fromarray(s.image)) for s in batch]
            pixels_BCHW = processor.normalize(torch.from_numpy(np.stack(pixels)))
            embeddings.append(model.encode_image(pixels_BCHW))
            _measure_masks(model, pixels_BCHW, text, batch, numbers, figures)
            scenes += batch
    _measure_search(torch.cat(embeddings), text, scenes, figures)
    return figures


def _measure_masks(
    model: CLIPSeg,
    pixels: torch.Tensor,
    text: torch.Tensor,
    scenes: list[Scene],
    numbers: range,
    figures: Figures,
) -> None:
    """Add, for each scene, the IoU of every phrase present and one absent phrase of each kind."""
    activations, grid = model.activations(pixels), model.grid(pixels)
    for i, (scene, number) in enumerate(zip(scenes, numbers, strict=True)):
        truth = {j: scene.mask(*pair) for j, pair in enumerate(PHRASES)}
        asked = [j for j, mask in truth.items() if mask.any()]
        rng = np.random.default_rng((SEED + 1, number))
        for kind in KINDS:
            absent = [j for j in truth if not truth[j].any() and kind_of(PHRASES[j]) == kind]
            asked.append(int(rng.choice(absent)))
        logits = model.decode([a[i : i + 1] for a in activations], text[asked], grid)[0]
        for j, found in zip(asked, (logits > 0).numpy(), strict=True):
            kind = kind_of(PHRASES[j])
            if truth[j].any():
                union = (found | truth[j]).sum()
                figures.iou[kind].append(float((found & truth[j]).sum() / union))
            else:
                figures.quiet[kind].append(bool(found.mean() < FALSE_ALARM))


def _measure_search(
    embeddings: torch.Tensor, text: torch.Tensor, scenes: list[Scene], figures: Figures
) -> None:
    """Precision among the ten images with the embeddings nearest to a colour's, by cosine."""
    image = torch.nn.functional.normalize(embeddings, dim=-1)
    similarity = image @ torch.nn.functional.normalize(text, dim=-1).T  # (images, phrases)
    for j, (colour, shape) in enumerate(PHRASES):
        if not shape:
            nearest = similarity[:, j].topk(min(10, len(scenes))).indices.tolist()
            hits = [scenes[i].mask(colour).any() for i in nearest]
            figures.precision_at_10[colour] = float(np.mean(hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    parser.add_argument("--images", type=int, default=500, help="scenes to draw")
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"--images {args.images}: must be at least 1")
    sys.stdout.write(evaluate(args.model, args.images).table() + "\n")


if __name__ == "__main__":
    main()
