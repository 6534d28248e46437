"""The images of an export, out of the shards they were labelled in."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from pipeline.annotations.labelled import LabelledImage
from pipeline.errors import JobError, RowError
from pipeline.prepare.images import decode_image
from pipeline.read.shard import Sample, Shard
from pipeline.read.wanted import read_rows
from pipeline.run.images import Images, find_images, find_shards, is_unchanged

# The endings that readers know the formats by (Pillow's names). An MPO is a JPEG and more.
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_ENDINGS |= {"TIFF": "tif", "AVIF": "avif"}
_QUALITY = 95
HINT = "--images none exports the labels without images"


def name_file(name: str, image: LabelledImage, images: str) -> str:
    """The file name of an image; what is turned upright stays a JPEG or becomes a PNG."""
    ending = _ENDINGS.get(image.format, "img")
    if is_turned(image, images):
        ending = "jpg" if ending == "jpg" else "png"
    return f"{name}.{ending}"


def is_turned(image: LabelledImage, images: str) -> bool:
    """Whether an image is written anew, turned upright."""
    return images == "upright" and image.orientation != 1


class Pictures:
    """The encoded images of a finished run, shard by shard."""

    def __init__(self, labels: str, images: str):
        """`images`: copy or upright. Raises UsageError, StorageError as find_shards."""
        self._images = images
        self.source: Images = find_images(labels)
        self._shards = find_shards(self.source)

    def read(self, shard: str, rows: Sequence[int]) -> Iterator[tuple[int, Sample]]:
        """The wanted rows in order. Raises JobError for a missing or changed shard."""
        if shard not in self._shards:
            raise JobError(f"{shard}: not in {self.source.source} any more; {HINT}")
        found: Shard = self._shards[shard]
        if not is_unchanged(self.source, found):
            raise JobError(f"{found.uri}: {shard} has changed since it was labelled; {HINT}")
        yield from read_rows(found, rows)

    def encode(self, image: LabelledImage, sample: Sample) -> bytes:
        """The bytes of an image's file. Raises JobError for one no longer readable."""
        where = f"{image.shard}: row {image.row}"
        if sample.reason:
            raise JobError(f"{where}: {sample.reason}: {sample.detail}; {HINT}")
        if not is_turned(image, self._images):
            return sample.image
        try:
            upright = decode_image(sample.image, max_pixels=self.source.max_pixels).image
        except RowError as error:
            raise JobError(f"{where}: {error}; {HINT}") from error
        file = io.BytesIO()
        if _ENDINGS.get(image.format) == "jpg":
            upright.save(file, "JPEG", quality=_QUALITY, subsampling=0)
        else:
            upright.save(file, "PNG")
        return file.getvalue()
