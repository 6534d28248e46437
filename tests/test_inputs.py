from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from pipeline import storage
from pipeline.errors import UsageError
from pipeline.read import divide
from pipeline.read.inputs import list_shards
from pipeline.read.recognize import SCRATCH, LeftOut, describe_left_out, recognize_bytes
from pipeline.read.records import read_shard
from pipeline.read.shard import shard_from_row, shard_to_row
from pipeline.storage.braces import expand_braces
from pipeline.write import layout
from tests.shards import hugging_face_column, make_parquet, make_tar, shards_of, write_img2dataset

TAR = make_tar([("a.jpg", b"image")])
PARQUET = make_parquet({"image": [b"image"]})


def write_all(folder: str, *paths: str) -> None:
    for path in paths:
        data = TAR if ".t" in path else PARQUET if path.endswith((".parquet", ".pq")) else b"image"
        storage.write_bytes(storage.join(folder, path), data)


def names_of(source: str) -> list[str]:
    return [shard.name for shard in shards_of(source)]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "X.TGZ", "x.parquet", "x.pq", "_x.tar"])
def test_one_file_is_one_shard(folder: str, name: str):
    write_all(folder, name, "other.tar")
    uri = f"{folder}/{name}"
    [shard] = shards_of(uri)
    assert (shard.name, shard.uri) == (name, uri)
    assert shard.format == ("parquet" if "p" in name else "tar")
    assert (shard.size_bytes, shard.version) == (
        storage.stat_file(uri).size_bytes,
        storage.stat_file(uri).version,
    )


def test_a_folder_holds_shards_of_all_kinds_in_order(folder: str):
    write_all(folder, "b.tar", "a/2.tar", "a/1.parquet", "dogs/9.png", "dogs/10.JPG", "cat.webp")
    assert names_of(folder) == [
        "a/1.parquet",
        "a/2.tar",
        "b.tar",
        "dogs/images-00000",
        "images-00000",
    ]
    dogs = shards_of(folder)[3]
    assert (dogs.uri, dogs.files) == (folder, ("dogs/10.JPG", "dogs/9.png"))
    assert dogs.size_bytes == 2 * len(b"image")


def test_hidden_files_and_scratch_are_no_inputs(folder: str):
    write_all(folder, "x.tar", ".x.tar", "_x.tar", "_staging/x.tar", "a/.git/x.jpg", "._x.jpg")
    write_all(folder, "_SUCCESS", "x.json", "x.txt", "_run.json", ".gitignore", "_2019/a.jpg")
    write_all(folder, "_MG_0001.JPG")  # what cameras write
    listing = list_shards(folder)
    names = [shard.name for shard in listing.shards]
    assert names == ["_2019/images-00000", "_x.tar", "images-00000", "x.tar"]
    assert listing.left_out == {
        "hidden": LeftOut(3, "._x.jpg"),
        "scratch of a job": LeftOut(1, "_staging/x.tar"),
    }
    assert names_of(f"{folder}/.x.tar") == [".x.tar"]  # it is named


def test_scratch_is_what_our_jobs_leave():
    left = {layout.RUN, layout.SUCCESS, layout.STAGING, layout.RECEIPTS, layout.PROMPTS}
    assert left | {layout.EMPTY_PART} <= SCRATCH


def encode(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 30)).save(file, form)
    return file.getvalue()


FORMS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["3f786850e3", "b.jpg?w=100", "c.jpg_large", "d.jpg!w700", "e.jpg.1", "a.b/x", "x.dat"]
)
def test_images_of_any_name_are_recognised(tmp_path: Path, form: str, name: str):
    storage.write_bytes(f"{tmp_path}/{name}", encode(form))
    [shard] = shards_of(f"{tmp_path}/{name}")
    assert shards_of(str(tmp_path))[0].files == (name,)
    [record, _] = read_shard(shard)
    assert record["image"] == encode(form)
    assert record["key"] == record["member"] == name.rpartition("/")[2]


def test_what_is_left_out_is_counted_with_an_example(folder: str):
    write_all(folder, "x.tar", "b.md", "a.MD", "x.json", "x_stats.json", "c.tar.odd", "_metadata")
    write_all(folder, "x.TXT")  # which nobody looks for
    storage.write_bytes(f"{folder}/tar", TAR)
    storage.write_bytes(f"{folder}/photo.nef", encode("TIFF"))
    storage.write_bytes(f"{folder}/x.parquet", make_parquet({"key": ["a"], "url": ["http://a"]}))
    listing = list_shards(folder)
    assert [shard.name for shard in listing.shards] == ["x.tar"]
    assert listing.left_out == {
        ".json": LeftOut(1, "x_stats.json"),
        ".md": LeftOut(2, "a.MD"),
        ".nef": LeftOut(1, "photo.nef"),
        ".txt": LeftOut(1, "x.TXT"),
        ".tar.odd: a tar by its content": LeftOut(1, "c.tar.odd"),
        "Parquet without a column of images": LeftOut(1, "x.parquet"),
        "without a suffix": LeftOut(1, "_metadata"),
        "without a suffix: a tar by its content": LeftOut(1, "tar"),
    }
    line = describe_left_out(listing.left_out)
    assert line.startswith("9 files left out: 2 .md (a.MD), 1 .json (x_stats.json), ")
    with pytest.raises(UsageError) as caught:
        list_shards(folder, strict=True)
    assert line in str(caught.value)
    assert list_shards(f"{folder}/x.tar", strict=True).left_out == {}
    assert describe_left_out({}) == ""


def test_a_pipe_and_a_broken_link_are_told(tmp_path: Path):
    write_all(str(tmp_path), "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    os.mkfifo(tmp_path / "c")
    (tmp_path / "d").symlink_to("nowhere")
    (tmp_path / "e.jpg").symlink_to("nowhere")
    listing = list_shards(str(tmp_path))
    assert [shard.files for shard in listing.shards] == [("a.jpg", "e.jpg")]
    assert {kind: found.files for kind, found in listing.left_out.items()} == {
        "broken links": 1,
        "pipes, sockets or devices": 2,
    }


@pytest.mark.parametrize(("images", "found"), [((1,), 0), ((0, 1, 150), 3)])
def test_of_many_files_of_one_suffix_a_sample_decides(tmp_path: Path, images, found: int):
    """64 of 200 are read, every fourth; an image among them has the others read, too."""
    for index in range(200):
        data = encode("PNG") if index in images else b"text"
        (tmp_path / f"{index:03d}.dat").write_bytes(data)
    write_all(str(tmp_path), "z.jpg")
    listing = list_shards(str(tmp_path))
    assert len(listing.shards[0].files) == found + 1
    assert listing.left_out[".dat"].files == 200 - found


@settings(deadline=None)
@given(data=st.binary(max_size=64) | st.sampled_from(FORMS).map(encode))
def test_first_bytes_of_an_image_are_an_image_to_pillow(data: bytes):
    if recognize_bytes(data[:512]) == "images":
        with contextlib.suppress(UnidentifiedImageError, OSError, SyntaxError, ValueError):
            assert Image.open(io.BytesIO(data)).format in FORMS
    else:
        with pytest.raises((UnidentifiedImageError, OSError)):
            Image.open(io.BytesIO(data), formats=FORMS)


def test_twin_keys_are_read_each_for_itself(s3: Any, bucket: str):
    """Each object holds its own key."""
    keys = {f"img{key}" for key in TWINS}
    for key in keys:
        s3.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=key.encode())
    for source in (f"{bucket}/img", bucket, f"{bucket}/img/**", f"{bucket}/im[g]"):
        found = [r for s in shards_of(source) for r in read_shard(s) if r["row"] >= 0]
        prefix = "" if source == bucket or "[" in source else "img/"
        assert {prefix + record["member"] for record in found} == keys
        assert all(prefix + r["member"] == r["image"].decode() for r in found)
    below = {file for shard in shards_of(f"{bucket}/img//") for file in shard.files}
    assert below == {"c.jpg", "sub/d.jpg"}


TWINS = (
    *("/c.jpg", "//c.jpg", "/sub/d.jpg", "//sub/d.jpg", "/../e.jpg", "/./e.jpg", "/e.jpg"),
    *("/p%20q.jpg", "/p q.jpg", "/h#1.jpg", "/q?x=1.jpg", "/caf\u00e9.jpg", "/cafe\u0301.jpg"),
    *("/back\\slash.jpg", "/back/slash.jpg"),
)


def test_the_shards_of_a_folder_named_like_a_tar(folder: str):
    write_all(folder, "odd.tar/x.tar")
    assert names_of(f"{folder}/odd.tar/") == ["x.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{000,002}.tar", ["000.tar", "002.tar"]),
        ("00?.tar", ["000.tar", "001.tar", "002.tar"]),
        ("*.tar", ["000.tar", "001.tar", "002.tar"]),
        ("0*[12].tar", ["001.tar", "002.tar"]),
        ("**/*.tar", ["000.tar", "001.tar", "002.tar", "more/y.tar", "sub/x.tar"]),
        ("{sub,more}/*.tar", ["more/y.tar", "sub/x.tar"]),
        ("{sub,more}", ["more/y.tar", "sub/x.tar"]),
        ("su*", ["sub/x.tar"]),
    ],
)
def test_globs_and_braces(folder: str, pattern: str, expected: list[str]):
    write_all(folder, "000.tar", "001.tar", "002.tar", "sub/x.tar", "more/y.tar")
    assert names_of(f"{folder}/{pattern}") == expected


def test_a_name_that_looks_like_a_pattern_is_taken_as_it_is(folder: str):
    write_all(folder, "[x]{1,2}*.tar", "x1.tar", "odd {1..3}/a.tar")
    assert names_of(f"{folder}/[x]{{1,2}}*.tar") == ["[x]{1,2}*.tar"]
    assert names_of(f"{folder}/odd {{1..3}}") == ["a.tar"]


def test_a_shard_named_by_braces_keeps_its_place_when_missing(folder: str):
    write_all(folder, "00.tar", "02.tar")
    shards = shards_of(f"{folder}/{{00..02}}.tar")
    assert [(shard.name, bool(shard.version)) for shard in shards] == [
        ("00.tar", True),
        ("01.tar", False),
        ("02.tar", True),
    ]
    with pytest.raises(UsageError, match="matches nothing"):
        shards_of(f"{folder}/{{10..12}}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{1..010}", [f"{n:03d}" for n in range(1, 11)]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a{0..1},b/{c,d}}", ["a0", "a1", "b/c", "b/d"]),
        ("{00..10..5}", ["00", "05", "10"]),
        ("{c..a}", ["c", "b", "a"]),
        ("{,x}y", ["y", "xy"]),
        ("{x}{", ["{x}{"]),
        ("a\\{$", ["a\\{$"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]):
    assert expand_braces(pattern) == names


_PIECES = st.sampled_from(
    ["{", "}", ",", "..", "a", "c", "e", "0", "1", "03", "12", "-", "-02", "+", ".", "x"]
)


@settings(max_examples=20, deadline=None)
@given(patterns=st.lists(st.lists(_PIECES, max_size=14).map("".join), min_size=60, max_size=60))
def test_braces_expand_as_in_bash(patterns: list[str]):
    """Each name behind a letter, or bash would leave out those that are empty."""
    patterns = [f"n{pattern}" for pattern in patterns]
    script = "".join(f"printf '%s ' {pattern}; echo\n" for pattern in patterns)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    for pattern, line in zip(patterns, done.stdout.splitlines(), strict=True):
        assert expand_braces(pattern) == list(dict.fromkeys(line.split())), pattern


_NUMBERS = st.integers(0, 30).map(str) | st.integers(0, 20).map("{:03d}".format)
_RANGES = st.tuples(_NUMBERS, _NUMBERS, st.sampled_from(["", "..2", "..7"])).map(
    lambda range: f"{{{range[0]}..{range[1]}{range[2]}}}"
)
_LETTERS = st.sampled_from(["{a..f}", "{f..a}", "{a..f..2}"])
_PATTERNS = st.recursive(
    st.sampled_from(["a", "b/", ".tar", "0", ""]) | _RANGES | _LETTERS,
    lambda some: (
        st.lists(some, min_size=2, max_size=3).map(lambda items: f"{{{','.join(items)}}}")
        | st.tuples(some, some).map("".join)
    ),
    max_leaves=4,
)


@settings(deadline=None)
@given(pattern=_PATTERNS)
def test_braces_expand_as_for_webdataset(pattern: str):
    assert expand_braces(pattern) == list(dict.fromkeys(braceexpand(pattern)))


def test_lists_are_joined(folder: str):
    write_all(folder, "yfcc/0.tar", "yfcc/1.tar", "cc/0.tar", "cc/a.jpg", "cc/a.txt", "cc/.b/2.tar")
    some, other = f"{folder}/yfcc/{{0..1}}.tar", f"{folder}/cc"
    listing = list_shards(f"{some}::{other}")
    names = ["cc/0.tar", "cc/images-00000", "yfcc/0.tar", "yfcc/1.tar"]
    assert [shard.name for shard in listing.shards] == names
    assert listing.left_out == {"hidden": LeftOut(1, "cc/.b/2.tar")}
    assert names_of(f"{some}::{some}::{folder}/yfcc") == ["0.tar", "1.tar"]
    records = [r["reason"] for s in listing.shards for r in read_shard(s) if r["row"] >= 0]
    assert records == [""] * 4
    with pytest.raises(UsageError, match=r"no such file.*exists is .*/yfcc$"):
        list_shards(f"{some}::{folder}/yfcc/7.tar")
    with pytest.raises(UsageError, match=r"join several by ::"):
        list_shards(f"{folder}/yfcc/0.tar,{folder}/yfcc/1.tar")


def test_a_list_of_two_buckets(s3: Any, bucket: str, tmp_path: Path):
    other = f"{bucket}-2"
    s3.create_bucket(Bucket=other.removeprefix("s3://"))
    write_all(bucket, "in/0.tar", "in/a.jpg")
    write_all(other, "in/0.tar", "in/a.jpg")
    shards = shards_of(f"{bucket}/in::{other}/in")
    assert len({shard.name for shard in shards}) == 4
    assert f"{bucket.removeprefix('s3://')}/in/0.tar" in {shard.name for shard in shards}
    records = [r for s in shards for r in read_shard(s) if r["row"] >= 0]
    assert [r["image"] for r in records] == [b"image"] * 4
    write_all(str(tmp_path), "0.tar")
    with pytest.raises(UsageError, match="local files and S3"):
        shards_of(f"{tmp_path}::{bucket}/in")


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}", "{0..9999}{0..9999}", "{0..999,{0..1000000}}"]
)
def test_braces_that_stand_for_too_many_names_are_refused(pattern: str):
    with pytest.raises(UsageError, match="stands for"):
        expand_braces(pattern)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("webdataset", [("00000.tar", "tar", "")]),
        ("files", [("00000/images-00000", "images", "")]),
        ("parquet", [("00000.parquet", "parquet", "jpg")]),
    ],
)
def test_img2dataset_output_is_read_as_it_stands(
    folder: str, form: str, expected: list[tuple[str, str, str]]
):
    write_img2dataset(folder, form, [b"one", None, b"three"])
    shards = shards_of(folder)
    assert [(shard.name, shard.format, shard.column) for shard in shards] == expected


def test_loose_images_come_in_fixed_groups(tmp_path: Path):
    root = str(tmp_path)
    write_all(root, *(f"a/{i:03d}.jpg" for i in range(300)), "b/x.jpg", "a/deeper/x.jpg")
    before = {shard.name: shard for shard in shards_of(root)}
    assert {name: len(shard.files) for name, shard in before.items()} == {
        "a/deeper/images-00000": 1,
        "a/images-00000": 256,
        "a/images-00001": 44,
        "b/images-00000": 1,
    }
    assert shards_of(root) == list(before.values())
    write_all(root, "a/000-new.jpg")
    after = {shard.name: shard for shard in shards_of(root)}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"a/images-00000", "a/images-00001"}


def test_the_version_of_a_group_covers_every_file(folder: str):
    write_all(folder, "a.jpg", "b.jpg")
    [before] = shards_of(folder)
    storage.write_bytes(f"{folder}/b.jpg", b"other")
    [after] = shards_of(folder)
    assert before.files == after.files
    assert before.version != after.version


@pytest.mark.parametrize("source", ["", "/*.jpg", "/{a,_MG_1}.jpg"])
def test_with_a_text_column_the_version_of_a_group_covers_texts(folder: str, source: str):
    def versions(text_column: str | None) -> str:
        [shard] = shards_of(folder + source, text_column=text_column)
        assert shard.files == ("_MG_1.jpg", "a.jpg")
        assert shard.size_bytes == 2 * len(b"image")
        return shard.version

    write_all(folder, "a.jpg", "_MG_1.jpg")
    images = versions(None)
    assert versions("caption") == images  # nothing else is read
    seen = {images}
    for name, text in [
        ("a.json", b"one"),
        ("a.json", b"other"),
        ("a.txt", b"one"),
        ("_MG_1.txt", b"one"),
        ("_MG_1.txt", b"other"),
    ]:
        storage.write_bytes(f"{folder}/{name}", text)
        assert versions("caption") not in seen
        seen.add(versions("caption"))
    before = versions("caption")
    storage.write_bytes(f"{folder}/b.json", b"beside no image")
    storage.write_bytes(f"{folder}/sub/a.txt", b"elsewhere")
    assert versions("caption") == before
    assert versions(None) == images


def write_row_groups(folder: str, name: str, groups: int, rows: int = 10) -> int:
    """A Parquet file of equal row groups with images of 1,000 bytes; returns its size."""
    images = [os.urandom(1000) for _ in range(groups * rows)]
    data = make_parquet({"image": images}, row_group_size=rows, use_dictionary=False)
    storage.write_bytes(f"{folder}/{name}", data)
    return len(data)


def test_a_large_parquet_file_is_several_shards(folder: str, monkeypatch: pytest.MonkeyPatch):
    sizes = {name: write_row_groups(folder, name, n) for name, n in [("a.pq", 3), ("b.pq", 12)]}
    write_row_groups(folder, "one-group.pq", 1, rows=110)
    write_row_groups(folder, "empty-groups.pq", 0)
    before = {shard.name: shard for shard in shards_of(folder)}
    assert before.keys() == {"a.pq", "b.pq", "one-group.pq", "empty-groups.pq"}
    monkeypatch.setattr(divide, "SPLIT_BYTES", sizes["a.pq"])
    shards = shards_of(folder)
    assert shards_of(folder) == shards
    whole = [shard for shard in shards if "#" not in shard.name]
    assert whole == [before[name] for name in ("a.pq", "empty-groups.pq", "one-group.pq")]
    found = [(s.name, s.first_row_group, s.row_groups) for s in shards if "#" in s.name]
    assert found == [
        ("b.pq#rows=000-029", 0, 3),
        ("b.pq#rows=030-059", 3, 3),
        ("b.pq#rows=060-089", 6, 3),
        ("b.pq#rows=090-119", 9, 3),
    ]
    split = [shard for shard in shards if "#" in shard.name]
    assert sum(shard.size_bytes for shard in split) == sizes["b.pq"]
    assert max(shard.size_bytes for shard in split) <= divide.SPLIT_BYTES
    assert {(s.uri, s.version, s.column) for s in split} == {
        (f"{folder}/b.pq", before["b.pq"].version, "image")
    }


_FLIPS = """
import random, sys
from pipeline import storage
from pipeline.read import divide
path, tries = sys.argv[1], int(sys.argv[2])
good = open(path, "rb").read()
footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
divide.SPLIT_BYTES, draw = 1000, random.Random(0)
for _ in range(tries):
    bad = bytearray(good)
    for _ in range(draw.choice([1, 1, 2, 8])):
        bad[draw.randrange(footer, len(bad))] = draw.randrange(256)
    with open(path, "wb") as file:
        file.write(bad)
    named = [("x.parquet", storage.stat_file(path))]
    shards, left = divide.divide_parquet(named, None, None, alone=False)
    if left:  # the column of images is lost, or its type
        print(1)
        continue
    shards.sort(key=lambda shard: shard.name)
    names = [shard.name for shard in shards]
    assert names == sorted(set(names)), names
    assert sum(shard.size_bytes for shard in shards) == len(good)
    print(len(shards))
"""


def test_a_damaged_footer_is_never_more_than_an_error_row(tmp_path: Path):
    """In a process of its own, which pyarrow ends where it is asked too much of damage."""
    write_row_groups(str(tmp_path), "x.parquet", 10, rows=4)
    command = [sys.executable, "-c", _FLIPS, str(tmp_path / "x.parquet"), "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = done.stdout.split()
    assert len(counts) == 3000
    assert {"1", "10"} <= set(counts)  # some footers could not be read, some damage does not matter


def test_a_large_file_without_a_footer_is_one_shard(folder: str, monkeypatch: pytest.MonkeyPatch):
    write_row_groups(folder, "0.parquet", 4)
    storage.write_bytes(f"{folder}/1.parquet", storage.read_bytes(f"{folder}/0.parquet")[:-1])
    monkeypatch.setattr(divide, "SPLIT_BYTES", 20_000)
    assert len(names_of(folder)) > 2
    assert names_of(folder)[-1] == "1.parquet"


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        ({"image": [b"x"], "jpg": [b"x"]}, None, "image"),
        ({"image": ["path"], "jpg": [b"x"]}, None, "jpg"),
        ({"photo": [b"x"], "jpg": [b"x"]}, "photo", "photo"),
        ({"image": pa.array([b"x"], pa.large_binary())}, None, "image"),
        ({"img": hugging_face_column([{"bytes": b"x", "path": "x"}])}, None, "img"),
    ],
)
def test_the_image_column_is_found(folder: str, columns, wanted: str | None, found: str):
    storage.write_bytes(f"{folder}/x.parquet", make_parquet(columns))
    [shard] = shards_of(folder, image_column=wanted)
    assert shard.column == found


@pytest.mark.parametrize("wanted", [None, "photo", "width", "nested.nope"])
def test_a_missing_image_column_is_a_usage_error_that_lists_columns(folder: str, wanted):
    columns = {"photo": [3], "caption": ["cat"], "nested": [{"width": 3}]}
    storage.write_bytes(f"{folder}/x.parquet", make_parquet(columns))
    shown = r"it has photo \(int64\), caption \(string\), nested \(struct<width: int64>\)"
    with pytest.raises(UsageError, match=shown):
        shards_of(folder, image_column=wanted)


def test_urls_alone_are_told(folder: str):
    columns = {"uid": ["a"], "image_url": ["https://a/1.jpg"], "text": ["a cat"]}
    storage.write_bytes(f"{folder}/x.parquet", make_parquet(columns))
    with pytest.raises(UsageError, match=r"image_url names URLs.*img2dataset"):
        shards_of(folder)
    write_all(folder, "x.tar")
    assert names_of(folder) == ["x.tar"]


def test_the_column_of_each_file_is_its_own(folder: str):
    """Among them a damaged file, which keeps its place for reading to report."""
    files = {
        "0-metadata": {"url": ["http://a"], "caption": ["a"]},
        "1": {"image": [b"x"], "caption": ["a"]},
        "2": {"jpg": [b"x"]},
        "3": {"image": pa.nulls(2), "caption": ["a", "b"]},
        "4": {"sample": [{"image": b"x"}]},
        "5": {"image": ["a path"], "content": [b"x"]},
    }
    for name, columns in files.items():
        storage.write_bytes(f"{folder}/{name}.parquet", make_parquet(columns))
    storage.write_bytes(f"{folder}/0.parquet", b"")
    storage.write_bytes(f"{folder}/6.parquet", b"garbage garbage")
    for text in (None, "caption"):
        listing = list_shards(folder, text_column=text)
        assert [(shard.name, shard.column) for shard in listing.shards] == [
            ("0.parquet", ""),
            ("1.parquet", "image"),
            ("2.parquet", "jpg"),
            ("3.parquet", "image"),
            ("4.parquet", "sample.image"),
            ("5.parquet", "content"),
            ("6.parquet", ""),
        ]
        assert list(listing.left_out) == ["Parquet without a column of images"]
    with pytest.raises(UsageError, match="no column 'nope' of text"):
        list_shards(folder, text_column="nope")
    shards = shards_of(folder, image_column="jpg")
    assert [shard.name for shard in shards] == ["0.parquet", "2.parquet", "6.parquet"]


def test_parquet_beside_a_folder_of_its_name_is_read(folder: str):
    write_all(folder, "a.parquet", "a/1.jpg", "b.parquet", "b.tar")
    assert names_of(folder) == ["a.parquet", "a/images-00000", "b.parquet", "b.tar"]


def test_what_holds_no_input_is_one_clear_line(folder: str):
    write_all(folder, "a/b/x.txt", "a/y.json", "z.txt")
    expected = {
        f"{folder}/a/no/such/x.tar": f"no such file or folder.*exists is {folder}/a$",
        f"{folder}/a/no/*.tar": f"matches nothing.*exists is {folder}/a$",
        f"{folder}/a": r"no tar, Parquet or image files among its 2 files \(.json, .txt\)",
        f"{folder}/z.txt": "not a tar, Parquet or image file, by its name or",
        "s3://no-such-bucket-here/x" if storage.is_s3(folder) else "/no/such": "no such file or",
    }
    for source, message in expected.items():
        with pytest.raises(UsageError, match=message) as caught:
            shards_of(source)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(source)


def test_an_empty_local_folder(tmp_path: Path):
    with pytest.raises(UsageError, match="the folder is empty"):
        shards_of(str(tmp_path))


@pytest.mark.parametrize("name", ["{}.tar", "{}/a.jpg"])
def test_names_that_print_alike_are_refused(tmp_path: Path, name: str):
    """One is a byte that is not UTF-8, the other how that is written."""
    names = [name.format(stem) for stem in (os.fsdecode(b"\xff"), "\\xff")]
    write_all(str(tmp_path), *names[:1])
    assert len(names_of(str(tmp_path))) == 1
    write_all(str(tmp_path), *names[1:])
    with pytest.raises(UsageError, match=r"two names in it are both shown as \\xff") as caught:
        shards_of(str(tmp_path))
    str(caught.value).encode()


def test_loose_images_of_one_folder_may_print_alike(tmp_path: Path):
    write_all(str(tmp_path), os.fsdecode(b"\xff.jpg"), "\\xff.jpg")
    [shard] = shards_of(str(tmp_path))
    assert len(set(shard.files)) == 2


def test_shards_travel_as_arrow_rows_with_names_that_are_not_utf8(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"image")
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).write_bytes(TAR)
    shards = shards_of(str(tmp_path))
    assert [shard.name for shard in shards] == ["caf\\xe9.tar", "d/images-00000"]
    table = pa.Table.from_pylist([shard_to_row(shard) for shard in shards])
    assert [shard_from_row(row) for row in table.to_pylist()] == shards
