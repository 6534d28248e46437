"""Cost of rows that run alone, one a thread: the model's part of a job on a CPU.

    python -m benchmarks.one_row [--repeats 3]

CLIPSeg rd64-refined at 352 x 352 and CLIP B/32 at 224 x 224, full size, random weights, float32.
"batch" is a batch on all of torch's threads, as torch does it by itself; "rows" is Device. They
take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.infer.device import Device
from pipeline.model.clip import CLIP
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.config import CLIPConfig, CLIPSegConfig

REFINED = {"vision_config": {"patch_size": 16}, "use_complex_transposed_convolution": True}


def randomize(model: Any) -> Any:
    """The model, with matrices of a standard deviation of 0.02."""
    for module in model.eval().modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, nn.LayerNorm):
                nn.init.normal_(parameter, std=0.02)
    return model


@torch.inference_mode()
def main() -> None:
    """Print rows a second of each part, both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    threads = torch.get_num_threads()
    device = Device("cpu", threads)
    seg = randomize(CLIPSeg(CLIPSegConfig.from_dict(REFINED)))
    clip = randomize(CLIP(CLIPConfig.from_dict({})))
    texts = torch.randint(3, 49000, (16, 77))
    texts[:, 7:] = 49407  # eight tokens, and padding
    mask = torch.arange(77).le(7).expand(16, 77)
    steps = seg.decoder.reduce(seg.activations(torch.randn(16, 3, 352, 352)))
    pair = (steps, torch.randn(16, 512))

    def decode(rows: slice) -> Tensor:
        return seg.decoder([step[rows].clone() for step in pair[0]], pair[1][rows], (22, 22))

    def rows_of(function: Callable[..., Any], *inputs: Sequence[Tensor]) -> Callable[[], Any]:
        return lambda: device.run(function, *inputs)

    large, small = torch.randn(16, 3, 352, 352), torch.randn(16, 3, 224, 224)
    parts: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "CLIPSeg, images": (
            lambda: seg.activations(large),
            rows_of(seg.activations, large.split(1)),
        ),
        "CLIPSeg, pairs": (
            lambda: decode(slice(16)),
            lambda: device.run(decode, device.split(16, 16)),
        ),
        "CLIP B/32, images": (
            lambda: clip.encode_image(small),
            rows_of(clip.encode_image, small.split(1)),
        ),
        "texts of 8 tokens": (
            lambda: clip.encode_text(texts, mask),
            rows_of(clip.encode_text, texts[:, :8].split(1), mask[:, :8].split(1)),
        ),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(parser.parse_args().repeats):
        for part, both in parts.items():
            for way, call in zip(("batch", "rows"), both, strict=True):
                torch.set_num_threads(threads if way == "batch" else 1)
                start = time.perf_counter()
                call()
                times.setdefault((part, way), []).append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {threads} threads, float32, 16 rows")
    for (part, way), seconds in times.items():
        print(f"{part:20} {way:6} {16 / statistics.median(seconds):8.1f}/s")


if __name__ == "__main__":
    main()
