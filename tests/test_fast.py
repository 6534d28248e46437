"""`--decode fast`: the pixels of libjpeg's scaled DCT as Pillow gives them, and no others; their
deviation from exact ones is kept with the run.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import MAX_PIXELS, astronaut, encode, png
from PIL import Image, ImageOps
from shards import make_tar

from jobs import embed
from pipeline import schema
from pipeline.config.options import ImageOptions
from pipeline.demo import MODEL
from pipeline.errors import RowError
from pipeline.prepare.images import DecodedImage, PrepareImages, decode_image
from pipeline.prepare.processor import ImageProcessor
from pipeline.read.inputs import list_shards
from pipeline.run.deviation import compare_decoders

SQUARE = {"size": {"height": 64, "width": 64}, "image_processor_type": "ViTImageProcessor"}
CENTRE = {"size": {"shortest_edge": 64}, "crop_size": 64, "do_center_crop": True}
CENTRE["image_processor_type"] = "CLIPImageProcessor"


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(astronaut()).resize((width, height))


def jpeg(
    height: int, width: int, orientation: int = 1, mode: str = "RGB", **options: object
) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    picture = photo(height, width).convert(mode)
    return encode(picture, "JPEG", exif=exif, quality=90, **options)


def prepare(
    data: bytes, config: dict[str, object], decode: str
) -> tuple[dict[str, object], np.ndarray]:
    """The row of schema.PIXELS of an image, and its pixels as numbers."""
    known = dict.fromkeys(("shard", "key", "member", "text", "version", "stage", "reason"), "")
    row = {**known, "detail": "", "row": 0, "total": -1, "skipped": 0, "retryable": False}
    records = pa.Table.from_pylist([row | {"image": data}], schema.RECORDS)
    stage = PrepareImages(ImageProcessor.from_dict(config), MAX_PIXELS, decode)
    (found,) = stage(records).to_pylist()
    return found, np.frombuffer(found.pop("pixels"), np.uint8).astype(int)


def fit(processor: ImageProcessor, decoded: DecodedImage) -> Image.Image:
    return processor.fit(decoded.image, (decoded.height, decoded.width), decoded.box)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_those_of_pillows_draft(options: dict[str, object], orientation: int) -> None:
    data = jpeg(301, 420, orientation, **options)
    found, pixels = prepare(data, SQUARE, "fast")
    image = Image.open(BytesIO(data))
    _, box = image.draft(None, (64, 64))
    assert image.size == (105, 76) and box == (0, 0, 105, 75.25)
    # Resized before it is turned, so that its box is Pillow's own; a square is a square then.
    small = image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR, box=box)
    expected = ImageOps.exif_transpose(small)
    assert np.array_equal(pixels, np.asarray(expected, int).ravel())
    exact, exact_pixels = prepare(data, SQUARE, "exact")
    assert found == exact  # the facts of the file, its own size among them
    assert 0 < np.abs(pixels - exact_pixels).mean() < 3


def test_the_aspect_is_that_of_the_file() -> None:
    """129 x 1000 px at a half is 65 x 500, whose long edge would come out shorter, and whose last
    row stands for one of two: without either the pixels are 8.5 apart."""
    processor = ImageProcessor.from_dict({**CENTRE, "do_center_crop": False})
    half = decode_image(jpeg(129, 1000), max_pixels=MAX_PIXELS, at_least=(64, 64))
    assert half.image.size == (500, 65) and (half.height, half.width) == (129, 1000)
    assert fit(processor, half).size == (int(64 * 1000 / 129), 64)
    _, pixels = prepare(jpeg(129, 1000), CENTRE, "fast")
    assert np.abs(pixels - prepare(jpeg(129, 1000), CENTRE, "exact")[1]).mean() < 5


def test_what_is_not_twice_as_large_is_decoded_exactly() -> None:
    for data in (jpeg(127, 400), jpeg(400, 127, 6), encode(photo(400, 400), "PNG"), jpeg(30, 40)):
        assert np.array_equal(prepare(data, SQUARE, "fast")[1], prepare(data, SQUARE, "exact")[1])
    unresized = {**CENTRE, "do_resize": False}
    data = jpeg(400, 400)
    assert np.array_equal(prepare(data, unresized, "fast")[1], prepare(data, unresized, "exact")[1])


def test_what_fails_fails_alike() -> None:
    whole = jpeg(300, 400)
    for data in (whole[: len(whole) // 2], whole[:300], b"\xff\xd8\xff", png()):
        assert prepare(data, SQUARE, "fast")[0] == prepare(data, SQUARE, "exact")[0]
        with pytest.raises(RowError):
            decode_image(data, max_pixels=MAX_PIXELS, at_least=(64, 64))


def test_a_lossless_jpeg_has_no_smaller_size() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    picture = np.asarray(photo(300, 400))
    data = bytes(imagecodecs.jpeg8_encode(picture, lossless=True))
    found = decode_image(data, max_pixels=MAX_PIXELS, at_least=(64, 64)).image
    assert np.array_equal(np.asarray(found), picture)


def test_the_default_leaves_fingerprints_as_they_were() -> None:
    assert "decode" not in ImageOptions().fingerprint()
    assert ImageOptions(decode="fast").fingerprint()["decode"] == "fast"
    assert ImageOptions().fingerprint().keys() == {"image_column", "member_suffix", "max_pixels"}


def test_the_deviation_is_kept_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [jpeg(700, 900 + i) for i in range(3)] + [b"<html>", jpeg(80, 90)]
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.tar").write_bytes(make_tar([(f"{i}.jpg", data) for i, data in enumerate(images)]))
    processor = ImageProcessor.from_folder(MODEL)
    pairs = [
        [fit(processor, decode_image(data, max_pixels=MAX_PIXELS, at_least=size)) for size in
         (None, processor.least_size)]
        for data in images[:3]
    ]  # fmt: skip
    apart = [np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in pairs]
    command = [str(source), str(output), "--model", str(MODEL), "--local"]
    assert embed.main([*command, "--decode", "fast"]) == 0
    facts = {
        "images": 4,  # one cannot be decoded
        "reduced": 3,
        "mean_difference": round(float(np.mean([each.mean() for each in apart])), 3),
        "largest_difference": max(int(each.max()) for each in apart),
    }
    record = json.loads((output / "_run.json").read_bytes())
    assert record["decode"] == facts and record["fingerprint"]["decode"] == "fast"
    said = capsys.readouterr().err
    assert (
        "--decode fast: 3 of 4 sampled images are decoded smaller; their pixels differ by" in said
    )
    assert embed.main([*command, "--decode", "fast"]) == 0
    assert json.loads((output / "_run.json").read_bytes())["decode"] == facts
    assert embed.main(command) == 2
    assert 'decode was "fast"' in capsys.readouterr().err


def test_the_comparison_is_bounded(tmp_path: Path) -> None:
    for name in "abcd":
        data = make_tar([(f"{i}.jpg", jpeg(20, 30)) for i in range(20)])
        (tmp_path / f"{name}.tar").write_bytes(data)
    shards, processor = list_shards(str(tmp_path)).shards, ImageProcessor.from_dict(SQUARE)
    assert len(list(compare_decoders(shards, processor, MAX_PIXELS))) == 32
    assert len(list(compare_decoders(shards[:1], processor, MAX_PIXELS))) == 20
    assert not list(compare_decoders(shards, processor, MAX_PIXELS, limit_s=-1.0))
