"""Masks of many prompts: transformers as its documentation shows it, against ours.

    python -m benchmarks.encode_once [--repeats 3] [--images 1] [--prompts 1 5 20]

Same weights (random, of the full size of CIDAS/clipseg-rd64-refined), same pixels, same token
ids, float32, one process. The two take turns, so that a noisy machine is noisy for both; medians
are printed, and the largest difference of their logits beside them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from pipeline.model.clipseg import CLIPSeg


def save_refined(folder: Path) -> transformers.CLIPSegForImageSegmentation:
    """A checkpoint of rd64-refined's size with logits of order 1."""
    config = transformers.CLIPSegConfig(
        text_config={"eos_token_id": 2, "bos_token_id": 0},
        vision_config={"patch_size": 16},
        use_complex_transposed_convolution=True,
    )
    torch.manual_seed(0)
    model = transformers.CLIPSegForImageSegmentation(config).eval()
    for module in model.decoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # its own initialisation gives logits of thousands
    model.save_pretrained(folder)
    return model


def theirs(model: transformers.CLIPSegForImageSegmentation, pixels: Tensor, ids: Tensor) -> Tensor:
    """As documented: the image repeated once per prompt."""
    logits = [
        model(pixel_values=image.expand(len(ids), -1, -1, -1), input_ids=ids).logits
        for image in pixels
    ]
    return torch.stack(logits).reshape(len(pixels), len(ids), *pixels.shape[2:])


def ours(model: CLIPSeg, pixels: Tensor, ids: Tensor) -> Tensor:
    """Prompts encoded (also timed, although a job does it once), each image encoded once."""
    return model(pixels, model.encode_text(ids))


@torch.inference_mode()
def main() -> None:
    """Print seconds per image of both, and their ratio, for each number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 5, 20])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        oracle = save_refined(Path(folder))
        model, _ = CLIPSeg.from_folder(Path(folder))
    pixels = torch.randn(arguments.images, 3, 352, 352)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, 352 x 352 px")
    print("prompts   transformers       ours    ratio   largest difference")
    for prompts in arguments.prompts:
        ids = torch.randint(1000, 40000, (prompts, 12))
        ids[:, 8:] = 49407
        peers: list[tuple[Callable[[], Tensor], list[float]]] = [
            (lambda ids=ids: theirs(oracle, pixels, ids), []),
            (lambda ids=ids: ours(model, pixels, ids), []),
        ]
        for peer, _ in peers:
            peer()  # warm up
        for _ in range(arguments.repeats):
            for peer, seconds in peers:
                start = time.perf_counter()
                peer()
                seconds.append((time.perf_counter() - start) / arguments.images)
        a, b = (statistics.median(seconds) for _, seconds in peers)
        difference = (peers[0][0]() - peers[1][0]()).abs().max().item()
        print(
            f"{prompts:7} {a:10.3f} s/im {b:6.3f} s/im {a / b:6.1f} x   {difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
