"""Write the ground truth of the bundled shards, as they were drawn: COCO instances.

    python -m pipeline.demo.truth truth.json

An object is an instance of its colour and of its shape.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from pipeline.demo.make_shards import PARQUET_IMAGES, TAR_IMAGES, draw_sample, make_sample
from pipeline.demo.scenes import COLOURS, SHAPES

NAMES = (*COLOURS, *SHAPES)


def draw_truth() -> dict[str, Any]:
    """The content of the file."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(TAR_IMAGES + PARQUET_IMAGES):
        scene, sample = draw_sample(index), make_sample(index)
        height, width = scene.labels.shape
        file = f"{sample.key}.{sample.suffix}"
        images.append({"id": index + 1, "file_name": file, "height": height, "width": width})
        for i, pair in enumerate(scene.objects, 1):
            rle = coco.encode(np.asfortranarray(scene.labels == i).view(np.uint8))
            shape = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
            for name in pair:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": NAMES.index(name) + 1,
                        "segmentation": shape,
                        "bbox": coco.toBbox(rle).tolist(),
                        "area": int(coco.area(rle)),
                        "iscrowd": 0,
                    }
                )
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    return {"categories": categories, "images": images, "annotations": annotations}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the file")
    parser.parse_args(argv).output.write_text(json.dumps(draw_truth()))


if __name__ == "__main__":
    main()
