"""How far --precision is from float32 at full size, beside transformers in the same type.

    python -m benchmarks.precision [--precision bf16 fp16] [--images 4]

CLIPSeg rd64-refined's size, random weights with the decoder drawn for logits of order 1, then
scaled to a deviation of 4 around their median, as a trained model's; smooth noise as images. On a
CPU. Prints the IoU of all masks together, root mean squares relative to the deviation of the
logits, the least cosine of image embeddings, and seconds per image with one prompt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.encode_once import save_refined
from pipeline.config.options import Precision
from pipeline.infer.device import Device
from pipeline.model.clipseg import CLIPSeg

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def ours(folder: Path, precision: Precision, pixels: Tensor, prompts: Tensor) -> list[Tensor]:
    """Logits (B, P, H, W), embeddings (B, E), and seconds per image with one prompt."""
    model, _ = CLIPSeg.from_folder(folder)
    Device("cpu", precision=precision).place(model)
    logits, vectors = model(pixels, prompts), model.encode_image(pixels)
    start = time.perf_counter()
    model(pixels, prompts[:1])
    return [logits, vectors, torch.tensor((time.perf_counter() - start) / len(pixels))]


@torch.inference_mode()
def main() -> None:
    """Print a line a precision."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=["bf16"])
    parser.add_argument("--images", type=int, default=4)
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(asked.images, 3, 44, 44, generator=generator)
    pixels = torch.nn.functional.interpolate(rough, size=352, mode="bicubic")
    prompts = torch.randn(4, 512, generator=generator) * 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        oracle = save_refined(folder)
        exact, vectors, seconds = ours(folder, "float32", pixels, prompts)
        print(f"float32: {seconds:.2f} s per image")
        for precision in asked.precision:
            dtype = DTYPES[precision]
            found, embedded, seconds = ours(folder, precision, pixels, prompts)
            model = oracle.to(dtype)
            theirs = torch.stack(
                [
                    model(
                        pixel_values=image.to(dtype).expand(len(prompts), -1, -1, -1),
                        conditional_embeddings=prompts.to(dtype),
                        interpolate_pos_encoding=True,
                    ).logits.float()
                    for image in pixels
                ]
            )
            level, scale = exact.median(), exact.std()
            one, other = found > level, exact > level
            iou = (one & other).sum() / (one | other).sum()
            away = [
                ((a - b).square().mean().sqrt() / scale).item()
                for a, b in ((found, exact), (theirs, exact), (found, theirs))
            ]
            cosine = torch.cosine_similarity(embedded, vectors).min()
            print(
                f"{precision}: IoU {iou:.4f}; from float32 {away[0]:.2e}, transformers from it "
                f"{away[1]:.2e}, ours from theirs {away[2]:.2e}; cosine {cosine:.6f}; "
                f"{seconds:.2f} s per image"
            )


if __name__ == "__main__":
    main()
