"""How much of a card the actor of `segment` uses, and what it would take to use the rest.

    python -m benchmarks.gpu [--device cuda|cpu] [--precision float32 bf16] [--output gpu.json]

CLIPSeg rd64-refined at 352 x 352 with random weights, scaled so that a twentieth of the cells is
in a mask, over noise; no network. In one run: the rate of a large matrix product, of the vision
tower and of the decoder on what lies on the device already, of the whole actor fed from memory
(pixels in, run lengths out), and of decoding and resizing JPEGs on one core. Shares are of the
matrix rate, and of the time that the model alone would take. Writes JSON, and a plot beside it
(.svg). On a CPU a small model runs, to try the script: its figures say nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.one_row import REFINED, randomize
from pipeline import schema
from pipeline.config.options import Precision
from pipeline.infer.device import Device
from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.config import CLIPSegConfig
from pipeline.prepare.images import PrepareImages

DEMO = Path(__file__).parent.parent / "pipeline" / "demo" / "model"
SMALL: dict[str, Any] = {
    "vision_config": {"patch_size": 16, "hidden_size": 96, "intermediate_size": 192}
    | {"num_attention_heads": 4, "num_hidden_layers": 10, "image_size": 96},
    "text_config": {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    | {"num_hidden_layers": 1},
    "reduce_dim": 16,
    "use_complex_transposed_convolution": True,
}
PROMPTS = (1, 5, 20)
SIZE = (480, 640)  # of the images, of which noise is made


class Card:
    """A device, the sizes that suit it, and how time is taken there."""

    def __init__(self, kind: str):
        self.kind, on_gpu = kind, kind == "cuda"
        self.images, self.matrix, self.repeats = (256, 8192, 9) if on_gpu else (3, 256, 1)
        self.pairs, self.side = (256, 352) if on_gpu else (8, 96)
        self.name = torch.cuda.get_device_name() if on_gpu else "a CPU, with a small model"

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median time of a call, its kernels included."""
        times = []
        for _ in range(self.repeats + 1):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def wait(self) -> None:
        """Let the device finish what it has been given."""
        if self.kind == "cuda":
            torch.cuda.synchronize()


def save_checkpoint(folder: Path, card: Card) -> Path:
    """A random checkpoint whose logits have a deviation of 4, a twentieth of them above 0."""
    values = REFINED if card.kind == "cuda" else SMALL
    torch.manual_seed(0)
    model = randomize(CLIPSeg(CLIPSegConfig.from_dict(values)))
    with torch.inference_mode():
        dimension = model.config.projection_dim
        logits = model(torch.randn(1, 3, card.side, card.side), torch.randn(2, dimension))
    last = model.decoder.transposed_convolution[-1]
    scale = 4 / logits.std()
    last.weight.data *= scale
    last.bias.data = (last.bias.data - logits.quantile(0.95)) * scale
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "clipseg", **values}))
    save_file(model.state_dict(), folder / "model.safetensors")
    processor = json.loads((DEMO / "preprocessor_config.json").read_text())
    processor["size"] = {"height": card.side, "width": card.side}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_pixels(card: Card) -> pa.Table:
    """schema.PIXELS of noise."""
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in schema.PIXELS}
    rng, shape = np.random.default_rng(0), (card.side, card.side, 3)
    rows = [
        empty
        | {"shard": "s", "row": i, "height": SIZE[0], "width": SIZE[1], "retryable": False}
        | {"pixels": rng.integers(0, 256, shape, dtype=np.uint8).tobytes()}
        for i in range(card.images)
    ]
    return pa.Table.from_pylist(rows, schema=schema.PIXELS)


@torch.inference_mode()
def measure_model(actor: SegmentImages, card: Card) -> dict[str, float]:
    """The matrix rate, and seconds and operations of an image and of a pair, all resident."""
    device, model = actor.device, actor.model
    matrix = torch.randn(card.matrix, card.matrix, device=device.torch).to(device.dtype)
    product = card.seconds(lambda: matrix @ matrix)
    images = min(64, card.images)
    pixels = torch.randn(images, 3, card.side, card.side, device=device.torch)
    steps = model.decoder.reduce(model.activations(pixels[:1]))
    prompts = torch.randn(card.pairs, model.config.projection_dim, device=device.torch)
    shared = [step[:, None] for step in steps]

    def encode() -> list[Tensor]:
        return model.decoder.reduce(model.activations(pixels))

    def decode() -> Tensor:
        return model.decoder(shared, prompts[None], actor.grid)

    with FlopCounterMode(display=False) as counter:
        model.activations(pixels[:1])
    return {
        "matrix_tflops": 2 * card.matrix**3 / product / 1e12,
        "image_s": card.seconds(encode) / images,
        "image_gflop": counter.get_total_flops() / 1e9,
        "pair_s": card.seconds(decode) / card.pairs,
    }


def measure_precision(spec: SegmentSpec, precision: Precision, card: Card) -> dict[str, Any]:
    """Rates of the model alone and of the whole actor, and their shares."""
    spec = replace(spec, checkpoint=replace(spec.checkpoint, precision=precision))
    device = Device(card.kind, precision=precision, together=True)
    table, actors = make_pixels(card), []
    facts = measure_model(SegmentImages(spec, device), card)
    rate = facts["image_gflop"] / facts["image_s"] / 1e3
    for count in PROMPTS:
        actor = SegmentImages(spec.only(spec.prompts[:count], embed=False), device)
        rows = pa.concat_tables(actor(table))
        seconds = card.seconds(lambda actor=actor: list(actor(table))) / card.images
        alone = facts["image_s"] + count * facts["pair_s"]
        actors.append(
            {
                "prompts": count,
                "images_per_s": 1 / seconds,
                "model_alone_per_s": 1 / alone,
                "busy": alone / seconds,
                "bytes_out_per_mask": rows["counts"].nbytes / (count * card.images),
            }
        )
    return {
        "precision": precision,
        **facts,
        "tower_share_of_matrix": rate / facts["matrix_tflops"],
        "prompt_share_of_image": facts["pair_s"] / facts["image_s"],
        "actor": actors,
    }


def measure_decoding(spec: SegmentSpec, card: Card) -> float:
    """JPEGs of SIZE that one core decodes and resizes in a second."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    small.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in schema.RECORDS}
    rows = [empty | {"row": i, "image": file.getvalue(), "retryable": False} for i in range(16)]
    table = pa.Table.from_pylist(rows, schema=schema.RECORDS)
    prepare = PrepareImages(spec.checkpoint.processor, 10**7)
    return 16 / card.seconds(lambda: prepare(table))


def plot(found: dict[str, Any]) -> str:
    """Bars of the actor's rate in that of the model alone, as SVG."""
    bars = [(each["precision"], actor) for each in found["runs"] for actor in each["actor"]]
    longest = max(actor["model_alone_per_s"] for _, actor in bars)
    lines = []
    for i, (precision, actor) in enumerate(bars):
        y, name = 50 + 30 * i, f"{precision}, {actor['prompts']} prompts"
        for key, colour in (("model_alone_per_s", "#d8dde3"), ("images_per_s", "#2a6f97")):
            width = 420 * actor[key] / longest
            lines.append(f'<rect x="170" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>')
        said = f"{actor['images_per_s']:,.0f} of {actor['model_alone_per_s']:,.0f} images/s"
        lines.append(
            f'<text x="10" y="{y + 15}">{name}</text><text x="600" y="{y + 15}">{said}</text>'
        )
    head = f"The actor (dark) and the model alone (light) on {found['card']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{70 + 30 * len(bars)}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="10" y="28" font-size="16">{head}</text>{"".join(lines)}</svg>\n'
    )


def run(device: str, precisions: list[Precision], output: Path) -> dict[str, Any]:
    """Measure, and write the figures and the plot."""
    card = Card(device)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"thing {i}" for i in range(max(PROMPTS))]
        spec = open_segmenter(str(save_checkpoint(Path(folder) / "model", card)), names)
        runs = [measure_precision(spec, precision, card) for precision in precisions]
    decoded = measure_decoding(spec, card)
    best = max(runs, key=lambda each: each["actor"][0]["images_per_s"])
    cores = {a["prompts"]: a["images_per_s"] / decoded for a in best["actor"]}
    found: dict[str, Any] = {"card": card.name, "torch": torch.__version__, "runs": runs}
    found |= {"decoded_per_s_and_core": decoded, "cores_that_balance": cores}
    output.write_text(json.dumps(found, indent=2) + "\n")
    output.with_suffix(".svg").write_text(plot(found))
    return found


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--precision", nargs="+", default=["float32", "tf32", "bf16"])
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    asked = parser.parse_args()
    precisions = [p for p in asked.precision if p != "tf32" or asked.device == "cuda"]
    found = run(asked.device, precisions, asked.output)
    print("\n".join(describe(found)))
    print(f"{asked.output}, {asked.output.with_suffix('.svg')}")


def describe(found: dict[str, Any]) -> list[str]:
    """The shares, as lines."""
    lines = [f"{found['card']}, torch {found['torch']}"]
    for each in found["runs"]:
        lines.append(
            f"{each['precision']}: matrix product {each['matrix_tflops']:.3g} TFLOP/s, vision "
            f"tower {each['tower_share_of_matrix']:.0%} of it, one more prompt "
            f"{each['prompt_share_of_image']:.1%} of an image"
        )
        lines += [
            f"  {actor['prompts']:2} prompts: {actor['images_per_s']:,.1f} images/s, the model "
            f"busy {actor['busy']:.0%}, {actor['bytes_out_per_mask']:,.0f} bytes a mask leave it"
            for actor in each["actor"]
        ]
    cores = ", ".join(f"{n} prompts {c:.1f}" for n, c in found["cores_that_balance"].items())
    decoded = found["decoded_per_s_and_core"]
    return [*lines, f"one core decodes {decoded:.0f} images/s; cores that balance: {cores}"]


if __name__ == "__main__":
    main()
