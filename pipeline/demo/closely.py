"""Measure --size, --tile and --refine with the bundled CLIPSeg, on scenes with small objects.

    python -m pipeline.demo.closely --images 24 [--objects quarter] [--ways plain tile]

The scenes of `evaluate`, drawn four times as large, 640 x 640 pixels, with objects of a quarter, of
half and of all of the usual size. The model's own size is 160 x 160.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.annotations.metrics import find_boundary
from pipeline.config.fine import FineOptions
from pipeline.demo import MODEL
from pipeline.demo.evaluate import FALSE_ALARM, KINDS, PHRASES, SEED, kind_of
from pipeline.demo.scenes import DIAMETERS, draw_scene, phrase
from pipeline.infer.blend import BlendLooks, open_looks
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.device import Device
from pipeline.infer.masks import mask_from_logits
from pipeline.model.clipseg import CLIPSeg

SIDE = 640
SCALES = {"quarter": 0.25, "half": 0.5, "usual": 1.0}
WAYS = {
    "plain": FineOptions(),
    "refine": FineOptions(refine=True),
    "size": FineOptions(size=str(SIDE)),
    "tile": FineOptions(tile=True),
    "tile-refine": FineOptions(tile=True, refine=True),
}


@dataclass
class Figures:
    """Of one size of objects and one way: a number for each phrase and image, and the time."""

    iou: list[float] = field(default_factory=list)
    boundary_iou: list[float] = field(default_factory=list)
    quiet: list[bool] = field(default_factory=list)
    """Whether an absent phrase covered less than FALSE_ALARM."""
    seconds: float = 0.0
    """Of CPU time."""
    images: int = 0


def measure(
    images: int, scales: dict[str, float] = SCALES, ways: dict[str, FineOptions] = WAYS
) -> dict[tuple[str, str], Figures]:
    """By size of the objects and way."""
    opened = OpenModel(str(MODEL), CLIPSeg.from_folder, Device("cpu", threads=1))
    text = opened.encode_texts([phrase(*pair) for pair in PHRASES])
    found: dict[tuple[str, str], Figures] = defaultdict(Figures)
    for number in range(images):
        for scale, factor in scales.items():
            rng = np.random.default_rng((SEED, number))
            diameters = (DIAMETERS[0] * factor, DIAMETERS[1] * factor)
            scene = draw_scene(rng, size=(SIDE, SIDE), diameters=diameters)
            asked = _choose(number, [bool(scene.mask(*pair).any()) for pair in PHRASES])
            for way, options in ways.items():
                figures = found[scale, way]
                before = time.process_time()
                logits = _segment(opened, options, scene.image, text[asked])
                figures.seconds += time.process_time() - before
                figures.images += 1
                for j, grid in zip(asked, logits, strict=True):
                    mask = mask_from_logits(grid, scene.labels.shape, 0.5).astype(bool)
                    _count(figures, mask, scene.mask(*PHRASES[j]))
    return found


def _choose(number: int, present: list[bool]) -> list[int]:
    """The phrases that a scene answers to, and one absent phrase of each kind."""
    rng = np.random.default_rng((SEED + 1, number))
    asked = [j for j, there in enumerate(present) if there]
    for kind in KINDS:
        absent = [j for j, there in enumerate(present) if not there and kind_of(PHRASES[j]) == kind]
        asked.append(int(rng.choice(absent)))
    return asked


def _segment(
    opened: OpenModel[CLIPSeg], options: FineOptions, image: np.ndarray, conditional: Tensor
) -> np.ndarray:
    """Logits (P, h, w) of one image, as in the job."""
    looks = open_looks(opened, options, embed=False)
    blend = BlendLooks(looks, opened.model, opened.device)
    (looked,) = blend.look([(looks.fit(Image.fromarray(image)), *image.shape[:2])])
    return blend.logits(looked, conditional).numpy()


def _count(figures: Figures, mask: np.ndarray, truth: np.ndarray) -> None:
    if not truth.any():
        figures.quiet.append(bool(mask.mean() < FALSE_ALARM))
        return
    figures.iou.append(_iou(mask, truth))
    figures.boundary_iou.append(_iou(find_boundary(mask), find_boundary(truth)))


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def table(found: dict[tuple[str, str], Figures]) -> str:
    """Markdown."""
    lines = [
        "| objects | | mean IoU | boundary IoU | phrases | absent phrase under 1 % of the pixels "
        "| images a second of one core |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (scale, way), each in found.items():
        means = [f"{np.mean(values):.3f}" for values in (each.iou, each.boundary_iou)]
        quiet, speed = f"{100 * np.mean(each.quiet):.1f} %", f"{each.images / each.seconds:.1f}"
        lines.append(f"| {' | '.join([scale, way, *means, str(len(each.iou)), quiet, speed])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="scenes to draw of each size")
    parser.add_argument("--objects", nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"--images {args.images}: must be at least 1")
    torch.set_num_threads(1)
    scales = {name: SCALES[name] for name in args.objects}
    found = measure(args.images, scales, {name: WAYS[name] for name in args.ways})
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
