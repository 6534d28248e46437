"""Tars of JPEG images made for the benchmarks."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT_PHOTOS = 64


def small_images(count: int, side_px: int) -> Iterator[bytes]:
    """Noisy squares, each different."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        small = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        yield _jpeg(Image.fromarray(small).resize((side_px, side_px)))


def photos(count: int, width: int = 500, height: int = 375) -> Iterator[bytes]:
    """Images as heavy as photographs of that size (about 80 kB); 64 of them, again and again."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(min(count, DISTINCT_PHOTOS)):
        coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), np.float32)
        grain = rng.normal(0, 12, (height, width, 1)).astype(np.float32)
        found.append(_jpeg(Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))))
    yield from itertools.islice(itertools.cycle(found), count)


def write_tars(folder: Path, images: Iterator[bytes], shards: int) -> None:
    """Deal the images out to so many shards."""
    folder.mkdir(parents=True)
    tars = [tarfile.open(folder / f"{shard:05}.tar", "w") for shard in range(shards)]  # noqa: SIM115
    for i, data in enumerate(images):
        member = tarfile.TarInfo(f"{i:08}.jpg")
        member.size = len(data)
        tars[i % shards].addfile(member, io.BytesIO(data))
    for tar in tars:
        tar.close()


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
