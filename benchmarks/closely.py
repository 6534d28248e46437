"""Peak memory of `segment --tile` on images of 1, 12 and 50 megapixels, with many prompts.

    python -m benchmarks.closely [--megapixels 1 12 50] [--images 2] [--prompts 20] [--ray]

The bundled model at 352 x 352 pixels, CLIPSeg's own size, so that images have as many windows as
with the hub's. Every image is a shard of its own. --ray: on Ray, with an object store of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.watch import Watched, run_watched
from pipeline.config.fine import FineOptions
from pipeline.demo import MODEL
from pipeline.demo.scenes import draw_scene
from pipeline.prepare.processor import ImageProcessor
from pipeline.prepare.windows import Looks

WINDOW_PX = 352


def write_model(folder: Path) -> None:
    """The bundled checkpoint at CLIPSeg's own size."""
    shutil.copytree(MODEL, folder)
    path = folder / "preprocessor_config.json"
    size = {"size": {"height": WINDOW_PX, "width": WINDOW_PX}}
    path.write_text(json.dumps(json.loads(path.read_text()) | size))


def write_images(folder: Path, megapixels: float, count: int) -> tuple[int, int]:
    """Scenes of 3 : 2 as JPEG; returns their (height, width)."""
    height = round(math.sqrt(megapixels * 1e6 * 2 / 3))
    size = (height, int(megapixels * 1e6) // height)
    for i in range(count):
        # A folder of its own: images of one are one shard.
        (folder / str(i)).mkdir(parents=True)
        scene = draw_scene(np.random.default_rng(i), size=(640, 960), diameters=(0.1, 0.2))
        Image.fromarray(scene.image).resize(size[::-1]).save(folder / str(i) / "scene.jpg")
    return size


def run_job(source: Path, output: Path, model: Path, prompts: int, *, ray: bool) -> Watched:
    """The command, with so many prompts."""
    env = {**os.environ, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(2**30)}
    asked = [text for i in range(prompts) for text in ("--prompt", f"star {i}")]
    options = ["--model", str(model), "--tile", "--quiet", *asked, *([] if ray else ["--local"])]
    command = [sys.executable, "-m", "jobs.segment", str(source), str(output), *options]
    return run_watched(command, env=env)


def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 12, 50])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()
    processor = ImageProcessor.from_folder(MODEL)
    window = (WINDOW_PX, WINDOW_PX)
    processor = ImageProcessor(**{**vars(processor), "size": window})
    looks = Looks(processor=processor, patch=16, options=FineOptions(tile=True))
    print("| megapixels | image px | seen at | windows | peak PSS, MiB | private | seconds |")
    print("| --- " * 7 + "|")
    for megapixels in arguments.megapixels:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder / "model")
            size = write_images(folder / "in", megapixels, arguments.images)
            found = run_job(
                folder / "in",
                folder / "out",
                folder / "model",
                arguments.prompts,
                ray=arguments.ray,
            )
        fine = looks.fine_size(*size) or window
        windows = math.prod(map(len, looks.windows(fine)))
        print(
            f"| {megapixels:g} | {size[0]} x {size[1]} | {fine[0]} x {fine[1]} | {windows} "
            f"| {found.peak_pss_mib:,.0f} | {found.peak_private_mib:,.0f} | {found.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
