"""How far masks cut from kept probability maps are from masks of the full logits, by their size.

    python -m benchmarks.kept_maps

On the bundled shards with the bundled model, at its own 160 pixels and at 352, the input of the
hub's CLIPSeg. Prints Markdown, for docs/labels.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from pipeline.annotations.cut import ask, cut_image
from pipeline.config.ontology import Ontology, OntologyClass
from pipeline.demo import MODEL, SHARDS
from pipeline.demo.scenes import COLOURS, SHAPES
from pipeline.infer.masks import mask_from_logits, mask_from_probabilities, probability_map
from pipeline.infer.segment import open_segmenter
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.images import decode_image
from pipeline.read.inputs import list_shards
from pipeline.read.records import read_shard

SIDES = (88, 176, 352)
THRESHOLDS = (0.3, 0.5, 0.7)
PHRASES = [*COLOURS, *SHAPES]


def bundled_images(count: int) -> list[Image.Image]:
    """The first images of the bundled shards."""
    found: list[Image.Image] = []
    for shard in list_shards(str(SHARDS)).shards:
        data = [record["image"] for record in read_shard(shard) if record["image"]]
        found += [decode_image(each, max_pixels=10**7).image for each in data]
    return found[:count]


@torch.inference_mode()
def measure(images: list[Image.Image], input_px: int, image_px: int) -> list[str]:
    """A row of the table for each side, at one size of the model's input and of the images."""
    prompted = open_segmenter(str(MODEL), PHRASES)
    model, _ = CLIPSeg.from_folder(MODEL)
    processor = replace(prompted.checkpoint.processor, size=(input_px, input_px))
    conditional = torch.from_numpy(prompted.conditional)
    iou: dict[tuple[int, float], list[float]] = {(s, t): [] for s in SIDES for t in THRESHOLDS}
    cut_s = dict.fromkeys(SIDES, 0.0)
    ontology = Ontology(classes=tuple(OntologyClass(name=p, phrases=(p,)) for p in PHRASES))
    asked = ask(ontology, {p: i for i, p in enumerate(PHRASES)})
    for image in images:
        logits = model(processor([image]), conditional)[0]
        size = (image_px, image_px)
        for side in SIDES:
            maps = {i: probability_map(grid, side) for i, grid in enumerate(logits)}
            started = time.perf_counter()
            cut_image(maps, size, asked, ontology)
            cut_s[side] += time.perf_counter() - started
            for i, grid in enumerate(logits):
                for threshold in THRESHOLDS:
                    direct = mask_from_logits(grid, size, threshold)
                    kept = mask_from_probabilities(maps[i], size, threshold)
                    if union := int((direct | kept).sum()):
                        iou[side, threshold].append(int((direct & kept).sum()) / union)
    return [
        f"| {input_px} | {image_px} | {side} | "
        + " | ".join(f"{np.mean(iou[side, t]):.4f}" for t in THRESHOLDS)
        + f" | {len(iou[side, 0.5])} | {1000 * cut_s[side] / len(images):.1f} |"
        for side in SIDES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48, help="of the bundled shards")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = bundled_images(args.images)
    columns = " | ".join(f"mean IoU at {t}" for t in THRESHOLDS)
    lines = [
        f"| input px | image px | map | {columns} | masks | cut, ms an image |",
        "| --- | --- | --- | " + "--- | " * (len(THRESHOLDS) + 2),
    ]
    for input_px, image_px in ((160, 160), (160, 640), (352, 640)):
        lines += measure(images, input_px, image_px)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
