"""CLIP's encoders: transformers against ours, on the same weights.

    python -m benchmarks.encoders [--models base-patch32 base-patch16] [--batch 16] [--repeats 5]

Random weights of the shapes of openai/clip-vit-*, saved by transformers; the same pixels and token
ids; one process, the two taking turns. Prints median rates, the median and each of the ratios of
two calls in a row, and the largest difference of the embeddings relative to the largest value;
exits with 1 when that is above 1e-4 (float32; 2e-2 for bfloat16).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from pipeline.model.encoders import ImageEncoder, TextEncoder

# What differs from transformers' defaults, which are those of base-patch32.
MODELS: dict[str, dict[str, dict[str, int] | int]] = {
    "base-patch32": {},
    "base-patch16": {"vision_config": {"patch_size": 16}},
    "large-patch14": {
        "projection_dim": 768,
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
        },
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    },
}
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
TEXT_TOKENS = 16  # of a caption

Peer = Callable[[], Tensor]


def save_clip(folder: Path, name: str) -> transformers.CLIPModel:
    """A random CLIP of a known size, saved as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**MODELS[name])).eval()
    model.save_pretrained(folder)
    return model


def peers_of(
    name: str, batch: int, device: str, dtype: torch.dtype
) -> dict[str, tuple[Peer, Peer]]:
    """(transformers, ours) for each encoder: what calls it on the same batch."""
    with tempfile.TemporaryDirectory() as folder:
        clip = save_clip(Path(folder), name).to(device, dtype)
        image_encoder, _ = ImageEncoder.from_folder(Path(folder))
        text_encoder, _ = TextEncoder.from_folder(Path(folder))
    image_encoder.to(device, dtype)
    text_encoder.to(device, dtype)
    pixels = torch.randn(batch, 3, 224, 224, dtype=dtype, device=device)
    ids = torch.randint(1000, 40000, (batch, TEXT_TOKENS), device=device)
    ids[:, 0], ids[:, -1] = 49406, 49407
    return {
        "image": (
            lambda: clip.get_image_features(pixel_values=pixels).pooler_output,
            lambda: image_encoder.encode_image(pixels),
        ),
        "text": (
            lambda: clip.get_text_features(input_ids=ids).pooler_output,
            lambda: text_encoder.encode_text(ids),
        ),
    }


def seconds_of(peer: Peer, device: str) -> float:
    """One call, until the device has done it."""
    start = time.perf_counter()
    peer()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(peers: tuple[Peer, Peer], device: str, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each call; the order changes from one repeat to the next."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for peer in peers:
        seconds_of(peer, device)  # warm up
    for repeat in range(repeats):
        for i in (0, 1) if repeat % 2 else (1, 0):
            seconds[i].append(seconds_of(peers[i], device))
    return seconds


@torch.inference_mode()
def main() -> int:
    """Print images and texts per second of both; the exit code says whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:2])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=LIMITS, default="float32")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=found)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.device}")
    print(f"{torch.get_num_threads()} threads, {args.dtype}, batches of {args.batch}")
    transformers.logging.disable_progress_bar()
    agree = True
    for name in args.models:
        dtype = getattr(torch, args.dtype)
        for encoder, peers in peers_of(name, args.batch, args.device, dtype).items():
            a, b = peers[0]().float(), peers[1]().float()
            difference = ((a - b).abs().max() / a.abs().max()).item()
            agree &= difference <= LIMITS[args.dtype]
            theirs, ours = compare(peers, args.device, args.repeats)
            rates = [args.batch / statistics.median(seconds) for seconds in (theirs, ours)]
            ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            print(
                f"{name:13} {encoder:5}  transformers {rates[0]:8.1f}/s  ours {rates[1]:8.1f}/s"
                f"  ratio {statistics.median(ratios):.2f} ({each})  difference {difference:.1e}",
                flush=True,
            )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
