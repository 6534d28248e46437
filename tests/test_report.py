"""The contact sheet shows the images of the shards under the masks of the tables."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mask_rows import masks_of
from PIL import Image

from pipeline import schema
from pipeline.annotations.contact_sheet import (
    CELL_PX,
    GAP_PX,
    LINE_PX,
    MARGIN_PX,
    Cell,
    SheetRow,
    contact_sheet,
    draw_sheet,
    write_contact_sheet,
)
from pipeline.write.layout import shard_id
from tests.shards import shards_of

HEIGHT, WIDTH = 60, 120

SCHEMAS = {"images": schema.IMAGES, "masks": schema.MASKS}


def picture(red: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.new("RGB", (width, height), (red, 90, 90))


def write_tar(path: Path, images: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(images):
            member = tarfile.TarInfo(f"{path.stem}-{i}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def left_half(prompts: int) -> np.ndarray:
    """Logits whose mask is the left half of the image, for each prompt but the last."""
    logits = np.full((prompts, 4, 8), -9, np.float32)
    logits[:-1, :, :4] = 9
    return logits


def write_tables(
    output: Path, shard: str, count: int, *, prompts: list[str], mask_size: str = "image"
) -> None:
    images: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    for row in range(count):
        facts = {"shard": shard, "row": row, "key": f"{shard}-{row}"}
        facts |= {"height": HEIGHT, "width": WIDTH}
        encoded = {"format": "PNG", "mode": "RGB", "orientation": 1, "size_bytes": 9}
        images.append(facts | encoded | {"member": ""})
        found = masks_of(
            left_half(len(prompts)), size=(HEIGHT, WIDTH), threshold=0.5, mask_size=mask_size
        )
        for i, (prompt, mask) in enumerate(zip(prompts, found, strict=True)):
            masks.append(facts | mask | {"prompt_id": i, "prompt": prompt, "threshold": 0.5})
    for name, rows in (("images", images), ("masks", masks)):
        (output / name).mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows, schema=SCHEMAS[name])
        pq.write_table(table, output / name / f"{shard_id(shard)}.parquet")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three shards of four images, each a little redder than the one before."""
    (tmp_path / "in").mkdir()
    for k in range(3):
        images = [png(picture(20 * (4 * k + i))) for i in range(4)]
        write_tar(tmp_path / "in" / f"{k}.tar", images)
        write_tables(tmp_path / "out", f"{k}.tar", 4, prompts=["left", "none"])
    return tmp_path


def sheet_of(data: Path, **options: Any) -> np.ndarray:
    shards = shards_of(str(data / "in"))
    sheet = contact_sheet(str(data / "out"), shards, max_pixels=10**6, total=12, **options)
    assert sheet.mode == "RGB"
    return np.asarray(sheet)


def reds(sheet: np.ndarray) -> list[int]:
    """Of the images down the first column, in order: their red."""
    column = sheet[:, MARGIN_PX + CELL_PX // 2]
    inside = (column[:, 1] == 90) & (column[:, 2] == 90)
    starts = np.flatnonzero(inside & ~np.roll(inside, 1))
    return [int(column[at, 0]) for at in starts]


def cell(sheet: np.ndarray, column: int, *, top: int) -> np.ndarray:
    left = MARGIN_PX + column * (CELL_PX + GAP_PX)
    return sheet[top : top + CELL_PX * HEIGHT // WIDTH, left : left + CELL_PX].astype(np.int16)


@pytest.mark.parametrize("mask_size", ["image", "model"])
def test_images_and_masks_are_seen(data: Path, mask_size: str) -> None:
    for k in range(3):
        write_tables(data / "out", f"{k}.tar", 4, prompts=["left", "none"], mask_size=mask_size)
    sheet = sheet_of(data)
    assert sheet.shape[1] == 2 * MARGIN_PX + 3 * CELL_PX + 2 * GAP_PX
    top = int(np.flatnonzero(sheet[:, MARGIN_PX + CELL_PX // 2, 1] == 90)[0])
    image, left, none = (cell(sheet, column, top=top) for column in range(3))
    assert (image == image[0, 0]).all()
    assert (none == none[0, 0]).all()
    assert (none[0, 0] != image[0, 0]).any()
    # Far from the edge of the mask: tinted inside, as without a mask outside.
    assert (left[:, -60:] == none[0, 0]).all()
    assert np.abs(left[10:-10, 20:90] - none[0, 0]).sum(2).min() > 60


def test_images_are_spread_over_the_shards(data: Path) -> None:
    assert reds(sheet_of(data, max_images=3)) == [0, 80, 160]
    assert reds(sheet_of(data, max_images=2)) == [0, 80]
    assert reds(sheet_of(data, max_images=6)) == [0, 20, 80, 100, 160, 180]
    assert len(reds(sheet_of(data, max_images=99))) == 12


def test_of_many_prompts_those_are_shown_that_found_most(data: Path) -> None:
    sheet = sheet_of(data, max_prompts=1)
    assert sheet.shape[1] == 2 * MARGIN_PX + 2 * CELL_PX + GAP_PX
    # A line of the title names the other.
    assert sheet.shape[0] == sheet_of(data).shape[0] + LINE_PX


def test_images_in_which_something_was_found_come_first(data: Path) -> None:
    """Only the last image of the last shard has a mask; it is shown, and the rest is filled up."""
    for part in (data / "out" / "masks").iterdir():
        rows = pq.read_table(part).to_pylist()
        for row in rows:
            if (row["shard"], row["row"]) != ("2.tar", 3):
                row |= {"area": 0, "score_max": 0.4}
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.MASKS), part)
    assert reds(sheet_of(data, max_images=1)) == [220]
    assert reds(sheet_of(data, max_images=2)) == [0, 220]


def test_the_colours_are_those_of_the_ontology(data: Path) -> None:
    ontology = data / "ontology.yaml"
    ontology.write_text("classes:\n  - name: left\n    color: '#00c800'\n")
    (data / "out" / "_run.json").write_text(json.dumps({"config": {"ontology": str(ontology)}}))
    sheet = sheet_of(data)
    assert (sheet == [0, 200, 0]).all(axis=2).any()
    assert not (sheet == [226, 0, 116]).all(axis=2).any()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP")])
def test_the_file_is_what_its_suffix_says(data: Path, suffix: str, kind: str) -> None:
    file = data / f"sheet.{suffix}"
    write_contact_sheet(str(file), str(data / "out"), shards_of(str(data / "in")), 10**6, 12)
    with Image.open(file) as sheet:
        assert sheet.format == kind


def test_images_that_are_gone_or_broken_are_grey(data: Path) -> None:
    shards = shards_of(str(data / "in"))
    (data / "in" / "0.tar").unlink()
    write_tar(data / "in" / "1.tar", [b"<html>", png(picture(100))])
    sheet = contact_sheet(str(data / "out"), shards, max_pixels=10**6, max_images=6, total=9)
    assert reds(np.asarray(sheet)) in ([160, 180], [100, 160, 180])
    assert sheet.height > 6 * CELL_PX * HEIGHT // WIDTH


def test_nothing_to_show(data: Path) -> None:
    for table in ("images", "masks"):
        for part in (data / "out" / table).iterdir():
            part.unlink()
        empty = SCHEMAS[table].empty_table()
        pq.write_table(empty, data / "out" / table / "_schema.parquet")
    assert sheet_of(data).shape[0] > 100


def row_with(label: str, prompt: str, size: tuple[int, int] = (40, 80)) -> SheetRow:
    mask = np.full((4, 8), 255, np.uint8)
    cells = [Cell(prompt=prompt, mask=mask, score=0.5, share=1.0)]
    return SheetRow(label=label, size=size, image=picture(9, 4, 8), cells=cells)


HOSTILE = ["\x1b[31mred\x07\r\n\t", "x" * 5_000_000, "\u202egnp.exe", "日本語 🙂" * 50, "W" * 299]


@pytest.mark.parametrize("text", HOSTILE, ids=["control", "huge", "bidi", "glyphs", "wide"])
def test_hostile_text_stays_in_its_cell(text: str) -> None:
    start = time.monotonic()
    sheet = np.asarray(draw_sheet([row_with(text, text)], title=text))
    assert time.monotonic() - start < 5
    assert sheet.shape[1] == 2 * MARGIN_PX + 2 * CELL_PX + GAP_PX
    gap = MARGIN_PX + CELL_PX
    below = sheet[-MARGIN_PX - 50 :]
    assert (below[:, gap + 2 : gap + GAP_PX - 2] == 255).all()
    assert (sheet[:, -MARGIN_PX + 4 :] == 255).all()


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nb"])
def test_only_printable_characters_are_drawn(text: str) -> None:
    cleaned = "".join(c if c.isprintable() else " " for c in text).strip()
    drawn = draw_sheet([row_with(text, text)], title=text)
    assert drawn.tobytes() == draw_sheet([row_with(cleaned, cleaned)], title=cleaned).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (5000, 5000)])
def test_images_of_any_shape_keep_the_sheet_small(size: tuple[int, int]) -> None:
    sheet = draw_sheet([row_with("key", "prompt", size)], title="title")
    assert sheet.width == 2 * MARGIN_PX + 2 * CELL_PX + GAP_PX
    assert sheet.height < 600
