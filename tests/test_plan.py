from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import UsageError
from pipeline.read import inputs as plan
from pipeline.read.inputs import plan_shards
from pipeline.read.shard import shard_from_row, shard_to_row
from pipeline.storage.braces import expand_braces
from tests.shards import hugging_face_column, make_parquet, make_tar, write_img2dataset

TAR = make_tar([("a.jpg", b"image")])
PARQUET = make_parquet({"image": [b"image"]})


def write_all(folder: str, *paths: str) -> None:
    for path in paths:
        data = TAR if ".t" in path else PARQUET if path.endswith((".parquet", ".pq")) else b"image"
        storage.write_bytes(storage.join(folder, path), data)


def plan_names(source: str) -> list[str]:
    return [shard.name for shard in plan_shards(source)]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "X.TGZ", "x.parquet", "x.pq", "_x.tar"])
def test_one_file_is_one_shard(folder: str, name: str):
    write_all(folder, name, "other.tar")
    uri = f"{folder}/{name}"
    [shard] = plan_shards(uri)
    assert (shard.name, shard.uri) == (name, uri)
    assert shard.format == ("parquet" if "p" in name else "tar")
    assert (shard.size_bytes, shard.version) == (
        storage.stat_file(uri).size_bytes,
        storage.stat_file(uri).version,
    )


def test_a_folder_holds_shards_of_all_kinds_in_order(folder: str):
    write_all(folder, "b.tar", "a/2.tar", "a/1.parquet", "dogs/9.png", "dogs/10.JPG", "cat.webp")
    assert plan_names(folder) == [
        "a/1.parquet",
        "a/2.tar",
        "b.tar",
        "dogs/images-00000",
        "images-00000",
    ]
    dogs = plan_shards(folder)[3]
    assert (dogs.uri, dogs.files) == (folder, ("dogs/10.JPG", "dogs/9.png"))
    assert dogs.size_bytes == 2 * len(b"image")


def test_hidden_scratch_and_other_files_are_no_inputs(folder: str):
    write_all(folder, "x.tar", ".x.tar", "_x.tar", "_staging/x.tar", "a/.git/x.jpg", "._x.jpg")
    write_all(folder, "_SUCCESS", "x.json", "x.txt", "README.md", "x.csv", "tar", "jpg")
    write_all(folder, "_MG_0001.JPG")  # what cameras write
    assert plan_names(folder) == ["images-00000", "x.tar"]


def test_the_shards_of_a_folder_named_like_a_tar(folder: str):
    write_all(folder, "odd.tar/x.tar")
    assert plan_names(f"{folder}/odd.tar/") == ["x.tar"]


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
    assert plan_names(f"{folder}/{pattern}") == expected


def test_a_name_that_looks_like_a_pattern_is_taken_as_it_is(folder: str):
    write_all(folder, "[x]{1,2}*.tar", "x1.tar", "odd {1..3}/a.tar")
    assert plan_names(f"{folder}/[x]{{1,2}}*.tar") == ["[x]{1,2}*.tar"]
    assert plan_names(f"{folder}/odd {{1..3}}") == ["a.tar"]


def test_a_shard_named_by_braces_stays_in_the_plan_when_missing(folder: str):
    write_all(folder, "00.tar", "02.tar")
    shards = plan_shards(f"{folder}/{{00..02}}.tar")
    assert [(shard.name, bool(shard.version)) for shard in shards] == [
        ("00.tar", True),
        ("01.tar", False),
        ("02.tar", True),
    ]
    with pytest.raises(UsageError, match="matches nothing"):
        plan_shards(f"{folder}/{{10..12}}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{1..010}", [f"{n:03d}" for n in range(1, 11)]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{,x}y", ["y", "xy"]),
        ("{x}", ["{x}"]),
        ("a", ["a"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..9999}{0..9999}"])
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
    shards = plan_shards(folder)
    assert [(shard.name, shard.format, shard.column) for shard in shards] == expected


def test_loose_images_come_in_fixed_groups(tmp_path: Path):
    root = str(tmp_path)
    write_all(root, *(f"a/{i:03d}.jpg" for i in range(300)), "b/x.jpg", "a/deeper/x.jpg")
    before = {shard.name: shard for shard in plan_shards(root)}
    assert {name: len(shard.files) for name, shard in before.items()} == {
        "a/deeper/images-00000": 1,
        "a/images-00000": 256,
        "a/images-00001": 44,
        "b/images-00000": 1,
    }
    assert plan_shards(root) == list(before.values())
    write_all(root, "a/000-new.jpg")
    after = {shard.name: shard for shard in plan_shards(root)}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"a/images-00000", "a/images-00001"}


def test_the_version_of_a_group_covers_every_file(folder: str):
    write_all(folder, "a.jpg", "b.jpg")
    [before] = plan_shards(folder)
    storage.write_bytes(f"{folder}/b.jpg", b"other")
    [after] = plan_shards(folder)
    assert before.files == after.files
    assert before.version != after.version


@pytest.mark.parametrize("source", ["", "/*.jpg", "/{a,_MG_1}.jpg"])
def test_with_a_text_column_the_version_of_a_group_covers_texts(folder: str, source: str):
    def versions(text_column: str | None) -> str:
        [shard] = plan_shards(folder + source, text_column=text_column)
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
    before = {shard.name: shard for shard in plan_shards(folder)}
    assert before.keys() == {"a.pq", "b.pq", "one-group.pq", "empty-groups.pq"}
    monkeypatch.setattr(plan, "SPLIT_BYTES", sizes["a.pq"])
    shards = plan_shards(folder)
    assert plan_shards(folder) == shards
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
    assert max(shard.size_bytes for shard in split) <= plan.SPLIT_BYTES
    assert {(s.uri, s.version, s.column) for s in split} == {
        (f"{folder}/b.pq", before["b.pq"].version, "image")
    }


_FLIPS = """
import random, sys
from pipeline import storage
from pipeline.read import inputs as plan
path, tries = sys.argv[1], int(sys.argv[2])
good = open(path, "rb").read()
footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
plan.SPLIT_BYTES, draw = 1000, random.Random(0)
for _ in range(tries):
    bad = bytearray(good)
    for _ in range(draw.choice([1, 1, 2, 8])):
        bad[draw.randrange(footer, len(bad))] = draw.randrange(256)
    with open(path, "wb") as file:
        file.write(bad)
    shards = plan._split_large([plan._whole_file("x.parquet", storage.stat_file(path), "image")])
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
    monkeypatch.setattr(plan, "SPLIT_BYTES", 20_000)
    assert len(plan_names(folder)) > 2
    assert plan_names(folder)[-1] == "1.parquet"


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
    [shard] = plan_shards(folder, image_column=wanted)
    assert shard.column == found


@pytest.mark.parametrize("wanted", [None, "image", "nope", "caption"])
def test_a_missing_image_column_is_a_usage_error_that_lists_columns(folder: str, wanted):
    columns = {"image": ["a/path.jpg"], "caption": ["cat"], "width": [3]}
    storage.write_bytes(f"{folder}/x.parquet", make_parquet(columns))
    with pytest.raises(UsageError, match=r"image \(string\), caption \(string\), width \(int64\)"):
        plan_shards(folder, image_column=wanted)


def test_a_damaged_first_parquet_file_does_not_hide_the_others(folder: str):
    storage.write_bytes(f"{folder}/0.parquet", b"")
    storage.write_bytes(f"{folder}/1.parquet", b"garbage garbage")
    storage.write_bytes(f"{folder}/2.parquet", make_parquet({"jpg": [b"x"]}))
    assert {shard.column for shard in plan_shards(folder)} == {"jpg"}
    assert [shard.column for shard in plan_shards(f"{folder}/[01].parquet")] == ["", ""]


def test_what_cannot_be_planned_is_one_clear_line(folder: str):
    write_all(folder, "a/b/x.txt", "a/y.json", "z.txt")
    expected = {
        f"{folder}/a/no/such/x.tar": f"no such file or folder.*exists is {folder}/a$",
        f"{folder}/a/no/*.tar": f"matches nothing.*exists is {folder}/a$",
        f"{folder}/a": r"no tar, Parquet or image files among its 2 files \(.txt, .json\)",
        f"{folder}/z.txt": "not a tar, Parquet or image file by its name",
        "s3://no-such-bucket-here/x" if storage.is_s3(folder) else "/no/such": "no such file or",
    }
    for source, message in expected.items():
        with pytest.raises(UsageError, match=message) as caught:
            plan_shards(source)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(source)


def test_an_empty_local_folder(tmp_path: Path):
    with pytest.raises(UsageError, match="the folder is empty"):
        plan_shards(str(tmp_path))


@pytest.mark.parametrize("name", ["{}.tar", "{}/a.jpg"])
def test_names_that_print_alike_are_refused(tmp_path: Path, name: str):
    """One is a byte that is not UTF-8, the other how that is written."""
    names = [name.format(stem) for stem in (os.fsdecode(b"\xff"), "\\xff")]
    write_all(str(tmp_path), *names[:1])
    assert len(plan_names(str(tmp_path))) == 1
    write_all(str(tmp_path), *names[1:])
    with pytest.raises(UsageError, match=r"two names in it are both shown as \\xff") as caught:
        plan_shards(str(tmp_path))
    str(caught.value).encode()


def test_loose_images_of_one_folder_may_print_alike(tmp_path: Path):
    write_all(str(tmp_path), os.fsdecode(b"\xff.jpg"), "\\xff.jpg")
    [shard] = plan_shards(str(tmp_path))
    assert len(set(shard.files)) == 2


def test_shards_travel_as_arrow_rows_with_names_that_are_not_utf8(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"image")
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).write_bytes(TAR)
    shards = plan_shards(str(tmp_path))
    assert [shard.name for shard in shards] == ["caf\\xe9.tar", "d/images-00000"]
    table = pa.Table.from_pylist([shard_to_row(shard) for shard in shards])
    assert [shard_from_row(row) for row in table.to_pylist()] == shards
