"""The page of a run: chosen images with their masks over them, in one file that loads nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco

from jobs import segment, view
from pipeline import schema
from tests.shards import write_img2dataset

DEMO = Path(__file__).parent.parent / "pipeline" / "demo"
CHROMIUM = shutil.which("chromium")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two prompts in `out`, over copies of the bundled shards in `in`."""
    folder = tmp_path_factory.mktemp("view")
    shutil.copytree(DEMO / "shards", folder / "in")
    argv = [str(folder / "in"), str(folder / "out"), "--model", str(DEMO / "model")]
    assert segment.main([*argv, "--prompt", "blue", "--prompt", "star", "--local", "--quiet"]) == 0
    return folder


def page_of(made: Path, *options: str, run: str = "out") -> str:
    file = made / "page.html"
    assert view.main([str(made / run), "--output", str(file), *options]) == 0
    return file.read_text()


def masks_of(made: Path) -> list[dict[str, Any]]:
    return [
        row
        for part in sorted((made / "out" / "masks").glob("*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall('src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_page_says_what_it_shows_and_loads_nothing(made: Path) -> None:
    page = page_of(made)
    for fact in ("24 of 72", "blue, star", "<dd>0.5</dd>", str(DEMO / "model"), "height x width"):
        assert fact in page
    assert "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style" in page
    assert "unsafe" not in page
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*"?(?!data:)[^"\s]', page)
    assert "<script" not in page
    assert len(headings(page)) == 24


@pytest.mark.parametrize("sort", ["score", "area", "uncertain"])
@pytest.mark.parametrize("prompt", [None, "star"])
def test_images_stand_in_the_order_that_was_asked_for(
    made: Path, sort: str, prompt: str | None
) -> None:
    """Held against the tables: images with a mask first, then by their best mask."""
    worth: dict[tuple[str, int], tuple[bool, float, str]] = {}
    for row in masks_of(made):
        if prompt in (None, row["prompt"]):
            height, width = row["rle"]["size"]
            value = {
                "score": row["score_max"],
                "area": row["area"] / (height * width),
                "uncertain": -abs(row["score_max"] - 0.5),
            }[sort]
            place = (row["shard"], row["row"])
            found, best, _ = worth.get(place, (False, -9.0, ""))
            worth[place] = (found or row["area"] > 0, max(best, value), row["key"])
    order = sorted(worth.items(), key=lambda item: (not item[1][0], -item[1][1], item[0]))
    wanted = [key for _, (_, _, key) in order][:30]
    options = ["--prompt", prompt] if prompt else []
    assert headings(page_of(made, "--sort", sort, "--limit", "30", *options)) == wanted


def test_the_overlay_shows_the_mask(made: Path) -> None:
    """Colours stay inside it, and are pale outside."""
    page = page_of(made, "--prompt", "blue", "--limit", "1", "--sort", "area")
    image, overlay = (p.astype(int) for p in pictures(page))
    (row,) = [r for r in masks_of(made) if r["key"] == headings(page)[0] and r["prompt"] == "blue"]
    mask = Image.fromarray(coco.decode(row["rle"]) * 255).resize(image.shape[1::-1])
    inside = np.asarray(mask) > 127
    colourful = np.ptp(overlay, axis=2)
    assert colourful[inside].mean() > 3 * colourful[~inside].mean()
    assert f"{100 * row['area'] / np.prod(row['rle']['size']):.1f} %" in page
    assert f"{row['height']} x {row['width']} px" in page


def test_a_key_and_a_prompt_choose(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(made, "--image", "scene-0003")
    assert headings(page) == ["scene-0003"]
    for options, says in (
        (["--image", "nobody"], "--image 'nobody': no image of this key came out well"),
        (["--prompt", "cat"], "--prompt 'cat': the run has 'blue', 'star'; name one of its own"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--limit", "5000"], "at most 1,000 images on a page"),
    ):
        assert view.main([str(made / "out"), *options]) == 2
        assert says in capsys.readouterr().err
    assert view.main([str(made / "in")]) == 2
    assert "holds no masks; name the OUTPUT of clipseg-ray segment" in capsys.readouterr().err
    (made / "labels").mkdir()
    record = {"tables": ["images", "annotations"], "config": {"input": "a b"}}
    (made / "labels" / "_run.json").write_text(json.dumps(record))
    assert view.main([str(made / "labels")]) == 2
    assert (
        "holds labels; their masks are those of clipseg-ray view 'a b'" in capsys.readouterr().err
    )


def test_an_empty_mask_has_a_cell_only_where_its_prompt_was_named(made: Path) -> None:
    row = next(row for row in masks_of(made) if row["area"] == 0)
    options = ["--image", row["key"]]
    assert f"nothing found for {row['prompt']}" in page_of(made, *options).replace("\n", " ")
    page = page_of(made, *options, "--prompt", row["prompt"])
    assert len(pictures(page)) == 2
    assert "no mask" in page


def test_an_input_that_moved_is_found(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page_of(made, "--limit", "3")
    (made / "in").rename(made / "there")
    try:
        assert not pictures(page_of(made, "--limit", "3"))
        said = capsys.readouterr().out
        assert "3 have no picture: the input is not there any more; moved?" in said
        after = page_of(made, "--limit", "3", "--input-moved-to", str(made / "there"))
        assert [p.tobytes() for p in pictures(after)] == [p.tobytes() for p in pictures(before)]
        assert "cannot be proved" not in capsys.readouterr().out  # mv keeps the times
    finally:
        (made / "there").rename(made / "in")


def test_another_input_is_not_taken_for_one_that_moved(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard is known by its size, an image by name and bytes; copies may have other times."""

    def look(where: Path) -> str:
        page_of(made, "--limit", "100", "--input-moved-to", str(where))
        return capsys.readouterr().out.partition("\n")[2]

    doubt = "shards cannot be proved to be what the run read: times or ETags are a copy's"
    same = shutil.copytree(made / "in", tmp_path / "same")  # with its times, as mv and cp -p
    assert look(same) == ""
    copies = shutil.copytree(made / "in", tmp_path / "copies", copy_function=shutil.copyfile)
    said = look(copies)
    assert said.startswith(f"  2 {doubt}") and said.count("\n") == 1
    (tar,) = same.glob("*.tar")
    tar.write_bytes(tar.read_bytes() + bytes(10240))  # as a reader sees it, the same
    assert look(same) == "  40 have no picture: another shard is there now: its size has changed\n"
    # Of the same size: two images have each other's place, and nothing else tells.
    (tar,) = copies.glob("*.tar")
    with tarfile.open(tar) as old:
        samples = [(m, old.extractfile(m).read()) for m in old]  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, data in [*samples[3:6], *samples[:3], *samples[6:]]:
            new.addfile(member, io.BytesIO(data))
    lines = look(copies).splitlines()
    assert lines[0].startswith(f"  2 {doubt}")
    changed = "another image is there now: its name or bytes have changed"
    assert lines[1:] == [f"  2 have no picture: {changed}"]


def test_captions_stand_below_their_images(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (0, 0, 255)).save(picture, "PNG")
    write_img2dataset(str(tmp_path / "in"), "webdataset", [picture.getvalue()])
    argv = [str(tmp_path / "in" / "00000.tar"), str(tmp_path / "out"), "--prompt", "blue"]
    assert segment.main([*argv, "--model", str(DEMO / "model"), "--local", "--quiet"]) == 0
    assert "a caption" not in page_of(tmp_path)
    assert "<q>a caption</q>" in page_of(tmp_path, "--text-column", "caption")


HOSTILE = "</h2><script>alert(1)</script>\x1b[2J\"' onerror=x"


def test_names_cannot_leave_their_place(made: Path) -> None:
    """Keys and prompts of the tables, and what the record says."""
    output = made / "hostile"
    shutil.copytree(made / "out", output)
    for table, columns in (("masks", schema.MASKS), ("images", schema.IMAGES)):
        for part in (output / table).glob("scenes*.parquet"):
            rows = pq.read_table(part).to_pylist()
            rows = [
                r | {"key": HOSTILE} | ({"prompt": HOSTILE} if "prompt" in r else {}) for r in rows
            ]
            pq.write_table(pa.Table.from_pylist(rows, schema=columns), part)
    record = json.loads((output / "_run.json").read_text())
    record["config"]["model"] = HOSTILE
    (output / "_run.json").write_text(json.dumps(record))
    page = page_of(made, run="hostile")
    assert "<script" not in page and "\x1b" not in page
    assert page.count("onerror") == page.count("&#x27; onerror")
    assert "&lt;script&gt;" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "columns"), [(375, 2), (1000, 4)])
def test_a_browser_shows_columns_that_fit(
    made: Path, tmp_path: Path, width: int, columns: int
) -> None:
    """Two on a phone. Chromium's own windows are never narrower than 500 pixels; frames are."""
    page = page_of(made, "--limit", "2")
    cells = "".join(
        f'<li><div class="cell" style="background: #010{i}ff"></div></li>' for i in "1234"
    )
    frame = re.sub("<ol>.*?</ol>", f"<ol>{cells}</ol>", page, count=1, flags=re.DOTALL)
    frame = re.sub("<meta http-equiv.*?>", "", frame)  # which forbids the colours of the cells
    (tmp_path / "page.html").write_text(frame)
    body = f'<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>'
    (tmp_path / "frame.html").write_text(f'<body style="margin: 0">{body}')
    shot = tmp_path / "shot.png"
    options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,900"]
    command = [str(CHROMIUM), *options, f"--screenshot={shot}", f"file://{tmp_path}/frame.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    shown = (pixels[..., 0] == 1) & (pixels[..., 2] == 255)
    row = shown[np.flatnonzero(shown.any(axis=1))[0] + 20]
    assert int((row & ~np.roll(row, 1)).sum()) == columns
    assert np.flatnonzero(shown.any(axis=0)).max() < width
