"""Where a run bends as GPUs are added: a simulation with the times of the stages, to 64 GPUs.

    python -m benchmarks.scale                       # a table
    python -m benchmarks.scale --plot scale.png      # and a plot of it

Blocks of images go through the CPUs of all nodes (reading, decoding, rows), the GPUs, and the one
driver; shards through the tasks that finish them. Each place serves in order of arrival, and its
times scatter by a fifth. Added for the whole input: listing, resuming and closing. Network, storage
and Ray's object store are taken as wide enough; that is not simulated.

Measured, on two cores of a busy machine (benchmarks/NOTES.md): time of the driver for a block and a
shard, seconds of a finish, seconds for a million shards. Estimates by arithmetic from measurements
of single stages: images a second of a GPU, and CPU time of an image. Every figure is an option.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GPUS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
PLACES = ("CPUs", "GPUs", "driver", "finish")
COLOURS = ("#1b6ca8", "#c1440e", "#3a7d44", "#7a4b94", "#8a6d00", "#444444")


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of one kind of job."""

    name: str
    gpu_images_per_s: float
    """Of one GPU."""
    cpu_ms: float
    """Of an image, reading to rows."""
    block: int
    """Images of a block."""
    driver_block_ms: float
    driver_shard_ms: float
    shard: int
    """Images of a shard."""
    finish_s: float
    """Of a shard."""
    cores: int
    """For each GPU."""


def simulate(times: Times, gpus: int, blocks_of_gpu: int = 600) -> tuple[float, dict[str, float]]:
    """(images a second, the share of its time that each place is busy)."""
    rng = random.Random(0)
    cores = gpus * times.cores
    of_shard = max(1, times.shard // times.block)
    servers = (cores, gpus, 1, max(8, cores // 4))
    work = (
        times.block * times.cpu_ms / 1000,
        times.block / times.gpu_images_per_s,
        times.driver_block_ms / 1000 + times.driver_shard_ms / 1000 / of_shard,
        times.finish_s,
    )
    count = gpus * blocks_of_gpu // of_shard * of_shard
    ready = [0.0] * count
    busy = {}
    for place, number, seconds in zip(PLACES, servers, work, strict=True):
        if place == "finish":  # a shard is complete with the last of its blocks
            ready = [max(ready[i : i + of_shard]) for i in range(0, count, of_shard)]
        free = [0.0] * number
        used, ends = 0.0, []
        for arrived in sorted(ready):
            took = seconds * rng.uniform(0.8, 1.2)
            end = max(arrived, heapq.heappop(free)) + took
            heapq.heappush(free, end)
            ends.append(end)
            used += took
        ready = ends
        busy[place] = used / number
    whole = max(ready)
    return count * times.block / whole, {place: used / whole for place, used in busy.items()}


def jobs(options: argparse.Namespace) -> list[Times]:
    """The jobs of the table: prompts and sizes of blocks."""
    return [
        Times(
            name=f"{prompts} prompt{'s' if prompts > 1 else ''}, blocks of {block}",
            gpu_images_per_s=gpu,
            cpu_ms=cpu,
            block=block,
            driver_block_ms=driver,
            driver_shard_ms=options.driver_shard_ms,
            shard=options.shard,
            finish_s=finish,
            cores=options.cores_per_gpu,
        )
        for prompts, gpu, cpu, finish in zip(
            options.prompts, options.gpu_rate, options.cpu_ms, options.finish_s, strict=True
        )
        for block, driver in zip(options.blocks, options.driver_block_ms, strict=True)
    ]


def plot(path: Path, lines: dict[str, list[float]]) -> None:
    """Images a second over GPUs, both on logarithmic axes; thin grey: of one GPU, times n."""
    width, height, left, top = 900, 560, 80, 40
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    low, high = 100.0, 100_000.0

    def place(gpus: float, rate: float) -> tuple[float, float]:
        x = left + (width - left - 260) * _share(gpus, GPUS[0], GPUS[-1])
        return x, height - 60 - (height - 60 - top) * _share(rate, low, high)

    for gpus in (1, 2, 4, 8, 16, 32, 64):
        draw.line([place(gpus, low), place(gpus, high)], fill="#dddddd")
        draw.text((place(gpus, low)[0] - 6, height - 52), str(gpus), fill="black", font=font)
    for rate in (100, 1_000, 10_000, 20_000, 100_000):
        draw.line([place(GPUS[0], rate), place(GPUS[-1], rate)], fill="#dddddd")
        draw.text((8, place(1, rate)[1] - 8), f"{rate:,}", fill="black", font=font)
    draw.text((8, 10), "images/s, simulated", fill="black", font=font)
    draw.text((left + 200, height - 28), "GPUs", fill="black", font=font)
    for number, (name, rates) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        ideal = [place(GPUS[0], rates[0]), place(GPUS[-1], rates[0] * GPUS[-1])]
        draw.line(ideal, fill="#aaaaaa")
        points = [place(*pair) for pair in zip(GPUS, rates, strict=True)]
        draw.line(points, fill=colour, width=3)
        draw.text((width - 240, top + 22 * number), name, fill=colour, font=font)
    image.save(path)


def _share(value: float, low: float, high: float) -> float:
    """Place of a value on a logarithmic axis, 0 to 1."""
    import math

    return math.log(value / low) / math.log(high / low)


def main() -> None:
    """Print the table, and draw the plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--gpu-rate", type=float, nargs="+", default=[4000.0, 2700.0, 1150.0])
    parser.add_argument("--cpu-ms", type=float, nargs="+", default=[7.5, 8.8, 15.0])
    parser.add_argument("--finish-s", type=float, nargs="+", default=[1.0, 1.4, 3.6])
    parser.add_argument("--cores-per-gpu", type=int, default=16)
    parser.add_argument("--shard", type=int, default=1024, help="images of a shard")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--driver-block-ms", type=float, nargs="+", default=[1.7, 6.2])
    parser.add_argument("--driver-shard-ms", type=float, default=1.7)
    parser.add_argument("--images", type=float, default=1e9)
    parser.add_argument("--million-shards-s", type=float, default=60.0, help="before and after")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    fixed = options.million_shards_s * options.images / options.shard / 1e6
    lines: dict[str, list[float]] = {}
    print(f"| job | GPUs | images/s | limit | busy: {', '.join(PLACES)} | h for the input |")
    print("| --- | --- | --- | --- | --- | --- |")
    for times in jobs(options):
        rates = lines.setdefault(times.name, [])
        for gpus in GPUS:
            rate, busy = simulate(times, gpus)
            rates.append(rate)
            shares = ", ".join(f"{busy[place]:.0%}" for place in PLACES)
            limit = max(busy, key=busy.__getitem__)
            hours = (options.images / rate + fixed) / 3600
            print(f"| {times.name} | {gpus} | {rate:,.0f} | {limit} | {shares} | {hours:,.1f} |")
    if options.plot:
        plot(options.plot, lines)


if __name__ == "__main__":
    main()
