"""The images, keys and texts of WebDataset samples, held against webdataset itself."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import storage
from pipeline.config.embed import EmbedConfig
from pipeline.config.options import ImageOptions
from pipeline.errors import UsageError
from pipeline.read.records import read_shard
from pipeline.read.shard import CAPTION_LIMIT_BYTES, NAME_LIMIT_BYTES, Sample
from pipeline.read.tar import HELD_BYTES, SAMPLE_MEMBERS, read_tar
from tests.shards import Member, link, make_parquet, make_tar, shards_of


def picture(index: int = 0, form: str = "PNG") -> bytes:
    """A small image file of a colour of its own."""
    sink = io.BytesIO()
    Image.new("RGB", (4, 3), (index % 256, index // 256, 99)).save(sink, form)
    return sink.getvalue()


def read_all(members: list[Member], **options: Any) -> list[Sample | None]:
    return list(read_tar(io.BufferedReader(io.BytesIO(make_tar(members))), **options))  # type: ignore[arg-type]


def read_images(members: list[Member], **options: Any) -> list[tuple[str, str, str]]:
    """Member, text and reason of each row."""
    return [(s.member, s.text, s.reason) for s in read_all(members, **options) if s]


def rows_of_webdataset(data: bytes) -> list[tuple[str, bytes] | None]:
    """Key and bytes of each member that webdataset decodes; None for a sample without one."""
    from webdataset.autodecode import imagehandler
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    files = ({**f, "__url__": ""} for f in tar_file_iterator(io.BytesIO(data)))
    decode = imagehandler("pil")
    rows: list[tuple[str, bytes] | None] = []
    for sample in group_by_keys(files):
        fields = {name: data for name, data in sample.items() if name[:2] != "__"}
        found = [d for name, d in fields.items() if decode(name, d) is not None]
        rows += [(sample["__key__"], d) for d in found] or [None]
    return rows


FOLDERS = st.sampled_from(["", "d/", "a.b/", "./", "x/y.z/", "/abs/", "../"])
STEMS = st.sampled_from(["0", "1", "22", "é 猫"])
INNER = st.sampled_from(["", "left.", "right.", "05.", "seg.", "a.b.", "jpg.", "."])
SUFFIXES = st.sampled_from(["jpg", "PNG", "jpeg", "json", "txt", "cls", "npy", "Cls"])
NAMES = st.builds("{}{}.{}{}".format, FOLDERS, STEMS, INNER, SUFFIXES)


@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(NAMES, max_size=12, unique_by=str.lower),
    ordered=st.booleans(),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_keys_and_images_are_those_of_webdataset(names: list[str], ordered: bool, format: int):
    names = sorted(names) if ordered else names
    images = ("jpg", "png", "jpeg")
    members: list[Member] = [
        (name, picture(i) if name.lower().endswith(images) else b"%d" % i)
        for i, name in enumerate(names)
    ]
    data = make_tar([link("folder", type=tarfile.DIRTYPE), *members], format=format)
    found = read_tar(io.BufferedReader(io.BytesIO(data)))  # type: ignore[arg-type]
    assert [s and (s.key, s.image) for s in found] == rows_of_webdataset(data)


def test_every_image_of_a_sample_is_a_row():
    members: list[Member] = [
        ("a.b/0.left.png", b"l"),
        ("a.b/0.json", b"{}"),
        ("a.b/0.right.PNG", b"r"),
        ("22.05.png", b"5"),
        ("22.10.png", b"10"),
        ("s.input.jpg", b"i"),
        ("s.outputs.txt", b"a circle"),
    ]
    assert [s and (s.key, s.member, s.image) for s in read_all(members)] == [
        ("a.b/0", "a.b/0.left.png", b"l"),
        ("a.b/0", "a.b/0.right.PNG", b"r"),
        ("22", "22.05.png", b"5"),
        ("22", "22.10.png", b"10"),
        ("s", "s.input.jpg", b"i"),
    ]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_an_image_whose_name_does_not_tell_is_known_by_its_bytes(form: str):
    image = picture(1, form)
    names = ["3f786850e387550f", "E1.jpg_large", "x.jpg!w700", "y.jpg?w=100", "z.image", "v.jpg.1"]
    found = read_all([(name, image) for name in names])
    assert [s and (s.member, s.image) for s in found] == [(name, image) for name in names]
    assert read_all([("x.txt", image), ("y.json", image), ("z.nef", image)]) == [None] * 3
    assert read_all([("a", b""), ("b", b"BM"), ("c", b"MM"), ("d.npy", b"\x93NUMPY")]) == [None] * 4


def test_a_member_suffix_chooses_the_image_of_a_sample():
    members: list[Member] = [
        *[(f"{i}.{name}", f"{i} {name}".encode()) for i in (0, 1) for name in ("Left.png", "png")],
        ("2.txt", b"no image"),
        ("3.left.png.jpg", b"another"),
        link("4.left.png"),
    ]
    found = read_all(members, suffix="left.png")
    assert [s and (s.member, s.reason) for s in found] == [
        ("0.Left.png", ""),
        ("1.Left.png", ""),
        None,
        None,
        ("4.left.png", "member_unsupported"),
    ]
    assert [s and s.image for s in read_all([("a.bin", b"x")], suffix="bin")] == [b"x"]


def test_the_member_suffix_reaches_the_reader_and_the_fingerprint(tmp_path: Path):
    data = make_tar([("0.left.png", b"l"), ("0.right.png", b"r")])
    (tmp_path / "x.tar").write_bytes(data)
    [shard] = shards_of(str(tmp_path), member_suffix=".Right.png")
    assert [record["member"] for record in read_shard(shard)] == ["0.right.png", ""]
    options = ImageOptions(member_suffix="right.png")
    config = EmbedConfig(input="in", output="out", images=options)
    assert config.fingerprint()["member_suffix"] == "right.png"
    with pytest.raises(UsageError, match="--member-suffix"):
        ImageOptions(member_suffix=".")


def test_samples_without_an_image_are_counted_and_no_rows(tmp_path: Path):
    members: list[Member] = [
        *[(f"annotations/{index}.json", b"{}") for index in range(20)],
        ("0.jpg", b"x"),
        ("1.json", b"{}"),
        ("1.txt", b""),
        link("2.jpg"),
    ]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    [shard] = shards_of(str(tmp_path))
    *records, end = read_shard(shard)
    assert [(r["key"], r["reason"], r["skipped"]) for r in records] == [
        ("0", "", 0),
        ("2", "member_unsupported", 0),
    ]
    assert (end["total"], end["skipped"], end["reason"]) == (2, 21, "")


# ----------------------------------------------------------------------------------- texts


def test_the_text_of_an_image_is_the_nearest_by_name():
    members: list[Member] = [
        ("0.left.png", b""),
        ("0.txt", b"both"),
        ("0.left.json", b'{"c": "only left"}'),
        ("0.right.png", b""),
        ("1.input.jpg", b""),
        ("1.outputs.txt", b"a circle"),
        ("2.jpg", b""),
        ("2.meta.json", b'{"c": "any"}'),
        ("2.txt", b"txt"),
        ("2.json", b'{"c": "json"}'),
        ("3.jpg", b""),
    ]
    assert read_images(members, text="c") == [
        ("0.left.png", "only left", ""),
        ("0.right.png", "both", ""),
        ("1.input.jpg", "a circle", ""),
        ("2.jpg", "json", ""),
        ("3.jpg", "", "no_text"),
    ]


def test_images_wait_for_their_text_up_to_a_bound():
    third = bytes(HELD_BYTES // 3)
    members: list[Member] = [
        *[(f"0.{index}.jpg", third) for index in range(4)],
        ("0.txt", b"late"),
        ("1.jpg", bytes(HELD_BYTES + 1)),
        ("1.txt", b"of a large one"),
    ]
    rows = [s for s in read_all(members, text="c") if s]
    assert [(s.member, s.text, s.reason) for s in rows] == [
        ("0.0.jpg", "", "no_text"),
        ("0.1.jpg", "", "no_text"),
        ("0.2.jpg", "", "no_text"),
        ("0.3.jpg", "late", ""),
        ("1.jpg", "of a large one", ""),
    ]
    assert "stands behind" in rows[0].detail


def test_a_sample_of_many_members_loses_none():
    count = SAMPLE_MEMBERS + 5
    members: list[Member] = [(f"clip.{index:05d}.jpg", b"%d" % index) for index in range(count)]
    found = read_all(members)
    assert [s and s.image for s in found] == [b"%d" % index for index in range(count)]


# ----------------------------------------------------------------------------------- names


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [NAME_LIMIT_BYTES + 1, 10_000, 2**20, 3 * 2**20])
def test_a_name_that_is_too_long_is_cut_and_said(tmp_path: Path, format: int, size: int):
    image = picture()
    names = ["k" * (NAME_LIMIT_BYTES - 4) + ".jpg", "猫" * (size // 3) + ".jpg", "after.jpg"]
    data = make_tar([(name, image) for name in names], format=format)
    (tmp_path / "x.tar").write_bytes(data)
    [shard] = shards_of(str(tmp_path))
    *records, end = read_shard(shard)
    assert [(r["reason"], r["image"]) for r in records] == [
        ("", image),
        ("name_too_long", b""),
        ("", image),
    ]
    assert records[0]["member"] == names[0]
    assert names[1].startswith(records[1]["key"]) and names[1].startswith(records[1]["member"])
    assert 4000 < len(records[1]["key"].encode()) <= NAME_LIMIT_BYTES
    assert "4,096 bytes" in records[1]["detail"]
    assert (end["total"], end["reason"]) == (3, "")


def test_keys_and_texts_of_parquet_are_bounded_as_well(tmp_path: Path):
    long, limit = "k" * 100_000, CAPTION_LIMIT_BYTES
    columns = {"key": [long, "b", "c"], "t": ["t", "t" * limit, "é" * limit], "jpg": [b"x"] * 3}
    storage.write_bytes(f"{tmp_path}/x.parquet", make_parquet(columns))
    [shard] = shards_of(str(tmp_path), text_column="t")
    *records, _ = read_shard(shard)
    assert [r["reason"] for r in records] == ["name_too_long", "", "text_too_long"]
    assert max(len(r["key"]) for r in records) == NAME_LIMIT_BYTES
    assert [len(r["text"]) for r in records] == [0, limit, 0]


@pytest.mark.parametrize("form", ["x.tar", "x.jpg"])
def test_a_text_that_is_too_long_fails_its_image(tmp_path: Path, form: str):
    long = json.dumps({"c": "w" * (CAPTION_LIMIT_BYTES + 1)}).encode()
    if form == "x.tar":
        (tmp_path / form).write_bytes(make_tar([("x.jpg", b"x"), ("x.json", long)]))
    else:
        (tmp_path / form).write_bytes(b"x")
        (tmp_path / "x.json").write_bytes(long)
    [shard] = shards_of(str(tmp_path), text_column="c")
    record, _ = read_shard(shard)
    assert (record["reason"], record["text"], record["image"]) == ("text_too_long", "", b"")
