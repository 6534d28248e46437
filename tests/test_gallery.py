"""The gallery: thumbnails from the shards, nothing but text from hostile names, no scripts."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards import link, make_parquet, make_tar

from pipeline import storage
from pipeline.embeddings.gallery import (
    draw_gallery,
    open_gallery,
    read_thumbnails,
    write_gallery,
)
from pipeline.embeddings.search import Hit
from pipeline.errors import UsageError
from pipeline.read import divide
from tests.runs import COLOURS, picture, write_run, write_tar

CHROMIUM = shutil.which("chromium")
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    '" onload="document.title=\'owned\'" x="',
    "</bdi></span><style>*{display:none}</style>",
    "]]>--><svg onload=alert(1)>",
    "\x1b[31m\x00\u202egpj.\n{title}",
]


def colour_of(thumbnail: bytes | str) -> tuple[int, ...]:
    """The colour of a thumbnail's middle, to the nearest of COLOURS."""
    assert isinstance(thumbnail, bytes)
    image = Image.open(io.BytesIO(thumbnail))
    assert image.format == "JPEG"
    middle = np.array(image.getpixel((image.width // 2, image.height // 2)))
    return min(COLOURS, key=lambda colour: np.abs(middle - colour).sum())


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_input_form_gives_its_thumbnails(folder: str) -> None:
    source = write_tar(f"{folder}/in")
    cells = [picture(colour, "WEBP") for colour in COLOURS]
    storage.write_bytes(f"{source}/b.parquet", make_parquet({"image": cells}))
    for i, colour in enumerate(COLOURS):
        storage.write_bytes(f"{source}/c/{i}.jpg", picture(colour, "JPEG"))
    images = write_run(f"{folder}/out", source)
    names = ("a.tar", "b.parquet", "c/images-00000")
    wanted = {(name, row) for name in names for row in (0, 2, 3)}
    thumbnails = read_thumbnails(images, wanted)
    assert {key: colour_of(value) for key, value in thumbnails.items()} == {
        (name, row): COLOURS[row] for name, row in wanted
    }


def test_thumbnails_of_a_run_that_read_texts(tmp_path: Path) -> None:
    source = f"{tmp_path}/in"
    storage.write_bytes(f"{source}/a.png", picture(COLOURS[1]))
    storage.write_bytes(f"{source}/a.json", b'{"caption": "green"}')
    images = write_run(f"{tmp_path}/out", source, text_column="caption")
    wanted = ("images-00000", 0)
    assert colour_of(read_thumbnails(images, {wanted})[wanted]) == COLOURS[1]


def test_thumbnails_of_a_large_parquet_file(tmp_path: Path, monkeypatch) -> None:
    cells = [picture(colour) for colour in COLOURS]
    data = make_parquet({"image": cells}, row_group_size=2, use_dictionary=False)
    storage.write_bytes(f"{tmp_path}/in/x.parquet", data)
    monkeypatch.setattr(divide, "SPLIT_BYTES", len(data) - 1)
    images = write_run(f"{tmp_path}/out", f"{tmp_path}/in")
    thumbnails = read_thumbnails(images, {("x.parquet#rows=0-1", 1), ("x.parquet#rows=2-4", 2)})
    assert [colour_of(image) for _, image in sorted(thumbnails.items())] == [COLOURS[1], COLOURS[4]]


def test_thumbnails_are_upright_and_small(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (900, 600), "red"), Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.jpg", exif=exif)
    images = write_run(str(tmp_path / "out"), str(tmp_path / "in"))
    ((_, thumbnail),) = read_thumbnails(images, {("images-00000", 0)}).items()
    assert isinstance(thumbnail, bytes)
    assert Image.open(io.BytesIO(thumbnail)).size == (213, 320)


def test_what_cannot_be_fetched_says_why(tmp_path: Path) -> None:
    source = write_tar(str(tmp_path / "in"))
    write_tar(source, "gone.tar")
    write_tar(source, "changed.tar")
    storage.write_bytes(
        f"{source}/bad.tar", make_tar([("0.png", b"<html>"), link("1.png"), ("2.png", b"")])
    )
    images = write_run(str(tmp_path / "out"), source)
    (tmp_path / "in" / "gone.tar").unlink()
    write_tar(source, "changed.tar", extra=bytes(512))
    wanted = {("a.tar", 0), ("a.tar", 77), ("gone.tar", 0), ("changed.tar", 1)}
    wanted |= {("bad.tar", row) for row in range(3)}
    thumbnails = read_thumbnails(images, wanted)
    assert isinstance(thumbnails.pop(("a.tar", 0)), bytes)
    assert thumbnails == {
        ("a.tar", 77): "not in its shard any more",
        ("gone.tar", 0): "the shard is not there any more",
        ("changed.tar", 1): "the shard has changed since",
        ("bad.tar", 0): "the image cannot be decoded",
        ("bad.tar", 1): "the image cannot be read any more",
        ("bad.tar", 2): "the image cannot be decoded",
    }
    shutil.rmtree(source)
    assert set(read_thumbnails(images, wanted).values()) == {"the input is not there any more"}
    hits = [Hit(0.5, *key, "k") for key in sorted(wanted)]
    page = Page(draw_gallery(["x"], [hits], read_thumbnails(images, wanted)))
    assert page.text.count("the input is not there any more") == len(hits)


def test_shards_are_read_no_further_than_needed(tmp_path: Path) -> None:
    """What is behind the last hit is damaged, and nobody notices; so are shards without hits."""
    source = write_tar(str(tmp_path / "in"))
    tar = tmp_path / "in" / "a.tar"
    tar.write_bytes(tar.read_bytes()[:2500])
    (tmp_path / "in" / "b.tar").write_bytes(b"not a tar")
    images = write_run(str(tmp_path / "out"), source)
    thumbnails = read_thumbnails(images, {("a.tar", 0), ("a.tar", 1), ("a.tar", 4)})
    assert colour_of(thumbnails["a.tar", 0]) == COLOURS[0]
    assert colour_of(thumbnails["a.tar", 1]) == COLOURS[1]
    assert thumbnails["a.tar", 4] == "not in its shard any more"


def test_the_page_holds_hostile_names_as_text_alone(tmp_path: Path) -> None:
    images = write_run(str(tmp_path / "out"), write_tar(str(tmp_path / "in")))
    hits = [[Hit(0.9 - i / 10, "a.tar", i % 5, key) for i, key in enumerate(HOSTILE)]]
    hits += [[Hit(0.1, name, 0, "k")] for name in HOSTILE]
    write_gallery(str(tmp_path / "x.html"), ["plain", *HOSTILE], hits, images)
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} == {
        *("html", "head", "meta", "title", "style", "body"),
        *("h1", "p", "ol", "li", "div", "span", "bdi", "img"),
    }
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    sources = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    assert len(sources) == len(HOSTILE)
    data = [base64.b64decode(s.removeprefix("data:image/jpeg;base64,")) for s in sources]
    assert [colour_of(jpeg) for jpeg in data] == [COLOURS[i % 5] for i in range(len(HOSTILE))]
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for name in HOSTILE[:5]:
        assert page.text.count(name) == 3  # as a key, a shard, a query
        assert html.escape(name) in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_an_empty_result_is_a_page(tmp_path: Path) -> None:
    assert "nothing found" in Page(draw_gallery(["x"], [[]], {})).text


@pytest.mark.parametrize(
    "record", [b"{", b"{}", b"[]", b'{"config": {"input": 1}}', b'{"config": 1}']
)
def test_a_record_that_says_nothing_is_refused(record: bytes, tmp_path: Path) -> None:
    (tmp_path / "_run.json").write_bytes(record)
    with pytest.raises(UsageError, match="does not say where"):
        open_gallery(str(tmp_path), 1)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_the_thumbnails_and_runs_nothing(tmp_path: Path) -> None:
    images = write_run(str(tmp_path / "out"), write_tar(str(tmp_path / "in")))
    hits = [Hit(0.9, "a.tar", i % 5, key) for i, key in enumerate(HOSTILE)]
    file = tmp_path / "x.html"
    write_gallery(str(file), [HOSTILE[0]], [hits], images)
    # A page that did not escape, without and with the policy: the browser runs scripts, and obeys.
    unescaped = file.read_text().replace("<h1>", HOSTILE[0] + "<h1>")
    (tmp_path / "policy.html").write_text(unescaped)
    bare = re.sub(r"<meta http-equiv.*?>", "", unescaped, flags=re.DOTALL)
    (tmp_path / "bare.html").write_text(bare)
    assert "<title>owned</title>" in browse(tmp_path / "bare.html", "--dump-dom")
    assert "<title>owned</title>" not in browse(tmp_path / "policy.html", "--dump-dom")
    dom = browse(file, "--dump-dom")
    assert "<title>owned</title>" not in dom
    assert len(re.findall("<img ", dom)) == len(HOSTILE)
    browse(file, f"--screenshot={tmp_path}/x.png", "--window-size=1300,900")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"), np.int16)
    for i, colour in enumerate(COLOURS):
        shown = (np.abs(pixels - colour).max(axis=2) < 8).sum()
        assert shown > 10_000 * (1 + (i == 0)), colour


def browse(file: Path, *options: str) -> str:
    """What headless Chromium prints of a page."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
    profile = f"--user-data-dir={file.parent}/profile"
    command = [str(CHROMIUM), *common, profile, *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    return done.stdout.decode()
