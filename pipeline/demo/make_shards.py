"""Draw the two bundled shards: synthetic scenes of many sizes, in the two forms of shards.

    python -m pipeline.demo.make_shards

scenes-000000.tar is WebDataset: for each key the image, a .json with the objects, a .txt with a
caption. scenes-000001.parquet has the columns of a Hugging Face data set: `image`, a struct of
bytes and path, and `caption`. The same Pillow and pyarrow give the same bytes every time.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.demo import SHARDS
from pipeline.demo.scenes import Pair, Scene, draw_scene

SEED = 30_000_000  # neither a training nor an evaluation scene
TAR_IMAGES, PARQUET_IMAGES = 40, 32
TAR_NAME, PARQUET_NAME = "scenes-000000.tar", "scenes-000001.parquet"

# (height, width) in pixels, taken in turn.
SIZES = (
    (160, 160),
    (240, 320),
    (320, 240),
    (200, 300),
    (256, 256),
    (180, 320),
    (352, 264),
    (128, 192),
)
PNG_SIZE = (120, 160)  # lossless noise is large
FORMATS = ("JPEG", "JPEG", "PNG", "JPEG", "WEBP")
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# The one stored on its side, with an EXIF tag that tells viewers to turn it; and the grey one.
TURNED, GREY = 3, 8
_ORIENTATION_TAG, _TURN_CLOCKWISE = 0x0112, 6


@dataclass(frozen=True)
class Sample:
    """One image of a shard: its key, file name suffix, encoded bytes and what it shows."""

    key: str
    suffix: str
    image: bytes
    objects: tuple[Pair, ...]

    @property
    def caption(self) -> str:
        """For example "a red circle and an orange star"."""
        names = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}" for c, s in self.objects]
        return " and ".join(names)


def draw_sample(index: int) -> Scene:
    """The scene of the sample of this number."""
    size = PNG_SIZE if FORMATS[index % len(FORMATS)] == "PNG" else SIZES[index % len(SIZES)]
    return draw_scene(np.random.default_rng((SEED, index)), size=size)


def make_sample(index: int) -> Sample:
    """The sample of this number; both shards count on from each other."""
    scene, form = draw_sample(index), FORMATS[index % len(FORMATS)]
    image = Image.fromarray(scene.image)
    options: dict[str, object] = {"quality": 82} if form != "PNG" else {"optimize": True}
    if index == TURNED:
        # What a viewer turns clockwise is stored turned the other way.
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[_ORIENTATION_TAG] = _TURN_CLOCKWISE
        options["exif"] = exif
    if index == GREY:
        image = image.convert("L")
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Sample(f"scene-{index:04d}", SUFFIXES[form], buffer.getvalue(), scene.objects)


def write_tar(path: Path, samples: list[Sample]) -> None:
    """WebDataset: members of one sample stand together; times and owners are zero."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            objects = [{"colour": c, "shape": s} for c, s in sample.objects]
            for suffix, content in (
                (sample.suffix, sample.image),
                ("json", json.dumps({"objects": objects}).encode()),
                ("txt", sample.caption.encode()),
            ):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, samples: list[Sample]) -> None:
    """A Hugging Face style table, in row groups of 16 for streaming readers."""
    images = [{"bytes": s.image, "path": f"{s.key}.{s.suffix}"} for s in samples]
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("caption", pa.string()),
        ]
    )
    table = pa.table({"image": images, "caption": [s.caption for s in samples]}, schema=schema)
    pq.write_table(table, path, row_group_size=16)


def make_shards(folder: Path) -> None:
    """Write both shards into `folder`, over what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [make_sample(i) for i in range(TAR_IMAGES + PARQUET_IMAGES)]
    write_tar(folder / TAR_NAME, samples[:TAR_IMAGES])
    write_parquet(folder / PARQUET_NAME, samples[TAR_IMAGES:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=SHARDS, help="folder of the shards")
    make_shards(parser.parse_args().output)


if __name__ == "__main__":
    main()
