"""The decode stage against a tight Pillow loop, and exact against fast decoding, on one core.

    python -m benchmarks.decode [--images 32] [--rounds 15]

JPEGs as heavy as photographs, to CLIPSeg's 352 x 352 (bicubic here, as heavy as any) and to CLIP's
224 x 224 centre. The loop is Image.open, convert, resize, crop and np.array; the stage is
PrepareImages as the jobs run it, from Arrow records to Arrow pixels, with every check. Both run on
the same bytes, a batch of 16 in turns; figures are medians over the rounds, in CPU time, which a
busy machine changes least. Ends with the deviation of fast from exact pixels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.shards import photos
from pipeline import schema
from pipeline.prepare.images import PrepareImages
from pipeline.prepare.processor import ImageProcessor
from pipeline.prepare.resize import crop_center

SIZES = ((500, 375), (640, 480), (1920, 1080))
MAX_PIXELS = 50_000_000
BATCH = 16
MODELS = {
    "CLIPSeg": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 352, "width": 352},
        "resample": 3,
    },
    "CLIP": {"image_processor_type": "CLIPImageProcessor"},
}


def records(images: list[bytes]) -> pa.Table:
    """Images as the read stage hands them on."""
    known = {
        **dict.fromkeys(("key", "member", "text", "stage", "reason", "detail"), ""),
        **{"shard": "a.tar", "version": "1", "total": -1, "skipped": 0, "retryable": False},
    }
    rows = [known | {"row": i, "image": data} for i, data in enumerate(images)]
    return pa.Table.from_pylist(rows, schema=schema.RECORDS)


def tight_loop(images: list[bytes], processor: ImageProcessor) -> list[np.ndarray]:
    """The pixels, without a check."""
    found = []
    for data in images:
        image = Image.open(BytesIO(data)).convert("RGB")
        if isinstance(processor.size, tuple):
            size = processor.size[::-1]
        else:
            scale = processor.size / min(image.size)
            size = (int(image.width * scale), int(image.height * scale))
        image = image.resize(size, Image.Resampling(processor.resample))
        if processor.do_center_crop:
            image = crop_center(image, processor.crop_size)
        found.append(np.array(image))
    return found


def pixels(table: pa.Table) -> np.ndarray:
    """(N, H x W x 3) of the stage's output."""
    return np.stack([np.frombuffer(p.as_buffer(), np.uint8) for p in table["pixels"]])


def seconds(function: Callable[..., object], *arguments: object) -> float:
    """CPU time of a call."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def main() -> None:
    """Print images a second and core, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print("                        images/s and core          ratio to the loop   |fast - exact|")
    print("model    size          loop    exact    fast       exact   fast        mean   max")
    for width, height in SIZES:
        images = list(photos(arguments.images, width, height))
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        tables = [records(batch) for batch in batches]
        for name, config in MODELS.items():
            processor = ImageProcessor.from_dict(config)
            exact = PrepareImages(processor, MAX_PIXELS)
            fast = PrepareImages(processor, MAX_PIXELS, "fast")
            rates: list[list[float]] = []
            for _ in range(arguments.rounds):
                spent = [0.0, 0.0, 0.0]
                for batch, table in zip(batches, tables, strict=True):
                    spent[0] += seconds(tight_loop, batch, processor)
                    spent[1] += seconds(exact, table)
                    spent[2] += seconds(fast, table)
                rates.append([len(images) / each for each in spent])
            loop, ours, faster = (statistics.median(each) for each in zip(*rates, strict=True))
            ratios = [statistics.median(r[i] / r[0] for r in rates) for i in (1, 2)]
            apart = np.abs(pixels(exact(tables[0])).astype(int) - pixels(fast(tables[0])))
            print(
                f"{name:8} {width:4} x {height:4} {loop:7.0f} {ours:8.0f} {faster:7.0f} "
                f"{ratios[0]:11.3f} {ratios[1]:6.2f} {apart.mean():11.2f} {apart.max():5}",
                flush=True,
            )


if __name__ == "__main__":
    main()
