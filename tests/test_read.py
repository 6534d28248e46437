from __future__ import annotations

import importlib
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import CredentialsError, StorageError, TransientError
from pipeline.read import divide
from pipeline.read import records as read
from pipeline.read.inputs import list_shards
from pipeline.read.records import BATCH_BYTES, read_batches, read_shard
from pipeline.read.shard import (
    TEXT_LIMIT_BYTES,
    Sample,
    Shard,
    find_text,
    shard_from_row,
    shard_to_row,
)
from pipeline.schema import RECORDS
from pipeline.storage import s3_read
from tests.shards import (
    hugging_face_column,
    link,
    make_parquet,
    make_tar,
    shards_of,
    write_img2dataset,
)

Records = list[dict[str, Any]]
SAMPLES = [(f"{index}.jpg", b"image %d" % index) for index in range(5)]


def read_whole(shard: Shard) -> Records:
    """The records of a shard without its end record, which must tell of no failure."""
    *records, end = read_shard(shard)
    assert [record["row"] for record in records] == list(range(len(records)))
    assert (end["row"], end["total"], end["reason"]) == (-1, len(records), "")
    return records


def read_failed(shard: Shard, kept: int = 0) -> dict[str, Any]:
    """The end record of a shard that fails after `kept` rows."""
    *records, end = read_shard(shard)
    assert [record["reason"] for record in records] == [""] * kept
    assert (end["row"], end["total"], end["stage"], end["image"]) == (-1, kept, "read", b"")
    return end


def write_one(folder: str, name: str, data: bytes) -> Shard:
    storage.write_bytes(storage.join(folder, name), data)
    [shard] = shards_of(storage.join(folder, name))
    return shard


def write_parquet(folder: str, columns: Any, **options: Any) -> Shard:
    return write_one(folder, "x.parquet", make_parquet(columns, **options))


# ---------------------------------------------------------------------------- every format


def test_records_have_the_columns_of_the_schema(folder: str):
    shard = write_one(folder, "x.tar", make_tar([*SAMPLES, link("x.jpg"), ("y.txt", b"")]))
    records = list(read_shard(shard))
    pa.Table.from_pylist(records, schema=RECORDS)
    assert all(set(record) == set(RECORDS.names) for record in records)
    assert records[3] == {
        "shard": "x.tar",
        "version": shard.version,
        "row": 3,
        "key": "3",
        "member": "3.jpg",
        "image": b"image 3",
        "text": "",
        "total": -1,
        "skipped": 0,
        "stage": "",
        "reason": "",
        "detail": "",
        "retryable": False,
    }
    assert records[5]["reason"] == "member_unsupported"
    assert records[5]["stage"] == "read"
    assert [records[6][name] for name in ("row", "total", "skipped")] == [-1, 6, 1]


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_the_forms_of_img2dataset_give_the_same_images(folder: str, form: str):
    write_img2dataset(folder, form, [b"one", None, b"three"])
    [shard] = shards_of(folder)
    records = read_whole(shard)
    good = [(r["key"].rpartition("/")[2], r["image"]) for r in records if not r["reason"]]
    assert good == [("000000000", b"one"), ("000000002", b"three")]
    if form == "parquet":
        assert (records[1]["key"], records[1]["reason"]) == ("000000001", "no_image")


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_shard_that_is_gone_is_missing(folder: str, name: str):
    data = make_tar(SAMPLES) if name == "x.tar" else make_parquet({"jpg": [b"x"]})
    shard = write_one(folder, f"in/{name}", data)
    storage.delete_folder(f"{folder}/in")
    end = read_failed(shard)
    assert (end["reason"], end["retryable"]) == ("shard_missing", True)
    assert read_failed(replace(shard, version=""))["reason"] == "shard_missing"


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_shard_overwritten_since_the_listing_has_changed(folder: str, name: str):
    data = [make_tar(SAMPLES[:n]) if name == "x.tar" else None for n in (1, 2)]
    data = [d or make_parquet({"jpg": [b"x" * n]}) for n, d in enumerate(data)]
    shard = write_one(folder, name, data[0])
    storage.write_bytes(shard.uri, data[1])
    end = read_failed(shard)
    assert (end["reason"], end["retryable"]) == ("shard_changed", True)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_shard_overwritten_while_it_is_read_has_changed(folder: str, name: str):
    images = [os.urandom(2**20) for _ in range(24)]
    if name == "x.tar":
        data = make_tar((f"{index}.jpg", image) for index, image in enumerate(images))
    else:
        data = make_parquet({"jpg": images}, row_group_size=2)
    shard = write_one(folder, name, data)
    records = read_shard(shard)
    assert next(records)["image"] == images[0]
    if storage.is_s3(shard.uri):
        storage.write_bytes(shard.uri, data[:-1])
    else:
        Path(shard.uri).write_bytes(data[:-1])
    *more, end = records
    assert [record["image"] for record in more] == images[1 : end["total"]]
    assert end["reason"] == "shard_changed"


@pytest.fixture
def dead_endpoint(fresh_client: None, monkeypatch: pytest.MonkeyPatch):
    """S3 refuses connections: a bound port that nobody listens on."""
    monkeypatch.setenv("CLIPSEG_RAY_STORAGE_TIMEOUT_S", "0.5")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield


def test_a_storage_that_fails_leaves_a_shard_to_be_retried(dead_endpoint: None):
    shard = Shard(name="x", uri="s3://bucket/x.tar", format="tar", size_bytes=1, version="1")
    end = read_failed(shard)
    assert (end["reason"], end["retryable"]) == ("shard_unreadable", True)
    images = replace(shard, uri="s3://bucket", format="images", files=("a.jpg", "b.jpg"))
    records = read_whole(images)
    assert [(r["reason"], r["retryable"]) for r in records] == [("file_unreadable", True)] * 2


def test_missing_credentials_stop_the_reader(
    fresh_client: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    shard = Shard(name="x", uri="s3://bucket/x.tar", format="tar", size_bytes=1, version="1")
    images = replace(shard, uri="s3://bucket", format="images", files=("a.jpg", "b.jpg"))
    for refused in (shard, replace(shard, format="parquet"), images):
        with pytest.raises(CredentialsError):
            list(read_shard(refused))


@pytest.mark.parametrize("error", [ValueError("x" * 9000), RecursionError(), MemoryError("cells")])
def test_what_nobody_knew_of_ends_a_shard_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """As int() did of a size with thousands of digits."""
    shard = write_one(str(tmp_path), "x.tar", make_tar(SAMPLES))

    def read_tar(file: Any, **_: Any) -> Iterator[Sample]:
        yield Sample("0", "0.jpg", b"image 0")
        raise error

    monkeypatch.setattr(read, "read_tar", read_tar)
    end = read_failed(shard, kept=1)
    passing = isinstance(error, MemoryError)  # which says nothing of the bytes
    assert end["reason"] == ("shard_unreadable" if passing else "shard_corrupt")
    assert end["detail"].startswith(f"{type(error).__name__}: ")
    assert end["retryable"] == isinstance(error, MemoryError)
    assert len(end["detail"]) <= 500


# ------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize(
    "column",
    [
        [b"one", None, b"", b"four"],
        pa.array([b"one", None, b"", b"four"], pa.large_binary()),
        pa.array([b"one", None, b"", b"four"], pa.binary_view()),
        hugging_face_column(
            [{"bytes": b"one", "path": "1"}, None, {"bytes": b"", "path": None}, {"bytes": b"four"}]
        ),
    ],
)
def test_parquet_cells_of_every_type(folder: str, column: Any):
    records = read_whole(write_parquet(folder, {"image": column, "key": ["a", "b", "c", "d"]}))
    assert [(r["key"], r["image"], r["reason"]) for r in records] == [
        ("a", b"one", ""),
        ("b", b"", "no_image"),
        ("c", b"", ""),
        ("d", b"four", ""),
    ]


def test_a_cell_with_only_a_path_says_so(folder: str):
    column = hugging_face_column([{"bytes": None, "path": "a/1.jpg"}])
    [record] = read_whole(write_parquet(folder, {"image": column}))
    assert (record["reason"], record["member"]) == ("no_image", "a/1.jpg")
    assert "only a path" in record["detail"]


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"id": [7, 8], "__key__": ["a", None], "url": ["u", "v"]}, ["a", "1"]),
        ({"id": [7, 8], "key": [0.5, 1.5]}, ["7", "8"]),
        ({"url": ["u", "v"]}, ["0", "1"]),
        ({"key": pa.array([b"caf\xe9", b"ok"]).view(pa.string())}, ["caf\\xe9", "ok"]),
    ],
)
def test_the_key_of_a_parquet_row(folder: str, columns: dict[str, Any], keys: list[str]):
    shard = write_parquet(folder, {**columns, "image": [b"x", b"y"]}, row_group_size=1)
    assert [record["key"] for record in read_whole(shard)] == keys


def test_the_path_of_a_hugging_face_cell_is_its_key(folder: str):
    cells = [{"bytes": b"x", "path": "dogs/1.jpg"}, {"bytes": b"y", "path": None}]
    shard = write_parquet(folder, {"image": hugging_face_column(cells)})
    assert [record["key"] for record in read_whole(shard)] == ["dogs/1.jpg", "1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "shard_empty"),
        (lambda data: b"no Parquet at all", "shard_corrupt"),
        (lambda data: data[:-20], "shard_corrupt"),
        (lambda data: data[: len(data) // 2], "shard_corrupt"),
        (lambda data: bytes(len(data)), "shard_corrupt"),
    ],
)
def test_a_damaged_parquet_shard(folder: str, change: Callable[[bytes], bytes], reason: str):
    good = make_parquet({"jpg": [b"x" * 1000]})
    storage.write_bytes(f"{folder}/0.parquet", good)
    storage.write_bytes(f"{folder}/1.parquet", change(good))
    shards = shards_of(folder)
    assert len(read_whole(shards[0])) == 1
    end = read_failed(shards[1])
    assert (end["reason"], end["retryable"]) == (reason, False)


def test_a_parquet_shard_without_its_column(folder: str):
    shard = write_parquet(folder, {"jpg": [b"x"], "width": [3]})
    for column in ("width", "nope", "jpg.bytes"):
        end = read_failed(replace(shard, column=column))
        assert end["reason"] == "column_missing"
        assert f"{column!r} of images in jpg (binary), width (int64)" in end["detail"]
    assert read_failed(replace(shard, text="width"))["reason"] == "column_missing"


@pytest.mark.parametrize(
    "claim",
    ["arrow_pickled_object", "arrow_tensor", "arrow_tensor_v2", "arrow_variable_shaped_tensor"],
)
def test_a_column_that_claims_to_be_a_type_of_rays(claim: str, folder: str, tmp_path: Path):
    """Ray registers these with pyarrow, and once took pickles from what a file says of them."""
    importlib.import_module("ray.data.extensions")
    loaded = tmp_path / "loaded"
    evil = pickle.dumps(_Touch(loaded))
    metadata = {"ARROW:extension:name": f"ray.data.{claim}", "ARROW:extension:metadata": evil}
    field = pa.field("jpg", pa.binary(), metadata=metadata)
    data = make_parquet(pa.table([pa.array([evil], pa.binary())], schema=pa.schema([field])))
    storage.write_bytes(f"{folder}/0.parquet", make_parquet({"jpg": [b"x"]}))
    storage.write_bytes(f"{folder}/1.parquet", data)
    listing = list_shards(folder)
    good, *bad = listing.shards
    assert len(read_whole(good)) == 1
    if bad:
        assert read_failed(bad[0])["reason"] == "shard_corrupt"
    else:
        assert [found.example for found in listing.left_out.values()] == ["1.parquet"]
    assert not loaded.exists()


class _Touch:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_damage_in_the_middle_of_parquet_keeps_the_rows_before(folder: str):
    images = [os.urandom(10_000) for _ in range(40)]
    options = {"row_group_size": 10, "compression": "none", "write_page_checksum": True}
    data = bytearray(make_parquet({"jpg": images}, **options))
    data[data.index(images[25]) + 5000] ^= 1
    end = read_failed(write_one(folder, "x.parquet", bytes(data)), kept=20)
    assert end["reason"] == "shard_corrupt"
    assert "CRC" in end["detail"]


def write_row_groups(path: Path | str, groups: list[list[bytes | None]]) -> None:
    """A Parquet file of these row groups, which may be empty."""
    file = pa.BufferOutputStream()
    schema = pa.schema([("image", pa.binary())])
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(file, schema, **options) as writer:
        for images in groups:
            writer.write_table(pa.table([images], schema=schema))
    storage.write_bytes(str(path), file.getvalue().to_pybytes())


IMAGES = st.none() | st.binary(max_size=40) | st.integers(0, 5000).map(bytes)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    files=st.lists(st.lists(st.lists(IMAGES, max_size=6), max_size=12), min_size=1, max_size=3),
    split_bytes=st.integers(1, 8000),
)
def test_every_row_of_every_layout_is_read_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[list[list[bytes | None]]],
    split_bytes: int,
):
    monkeypatch.setattr(divide, "SPLIT_BYTES", split_bytes)
    storage.delete_folder(str(tmp_path / "in"))
    for index, groups in enumerate(files):
        write_row_groups(tmp_path / "in" / f"{index}.parquet", groups)
    shards = shards_of(str(tmp_path / "in"))
    assert all(one.name < other.name for one, other in pairwise(shards))
    found: dict[str, Records] = {}
    for shard in shards:
        found.setdefault(shard.uri[-len("0.parquet") :], []).extend(read_whole(shard))
    for index, groups in enumerate(files):
        images = [image for group in groups for image in group]
        records = found[f"{index}.parquet"]
        assert [r["image"] for r in records] == [image or b"" for image in images]
        assert [r["reason"] == "no_image" for r in records] == [i is None for i in images]
        assert [r["key"] for r in records] == [str(row) for row in range(len(images))]
        sizes = [shard.size_bytes for shard in shards if shard.uri.endswith(f"/{index}.parquet")]
        assert sum(sizes) == storage.stat_file(f"{tmp_path}/in/{index}.parquet").size_bytes


@pytest.fixture
def six_shards(folder: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Shard], list[bytes]]:
    """The shards of a Parquet file of 6 MB, two row groups of five images each; the images."""
    images = [os.urandom(100_000) for _ in range(60)]
    groups = [list(images[start : start + 5]) for start in range(0, 60, 5)]
    write_row_groups(f"{folder}/x.parquet", groups)
    monkeypatch.setattr(divide, "SPLIT_BYTES", 1_020_000)
    shards = shards_of(folder)
    assert [shard.name[-len("00-09") :] for shard in shards][:2] == ["00-09", "10-19"]
    assert len(shards) == 6
    return shards, images


def test_row_groups_are_read_without_the_others(
    six_shards: tuple[list[Shard], list[bytes]], bucket: str, monkeypatch: pytest.MonkeyPatch
):
    shards, images = six_shards
    fetched: list[int] = []

    def read_range(uri: str, start: int, end: int, version: str) -> tuple[bytes, str]:
        fetched.append(end - start)
        return whole_range(uri, start, end, version)

    whole_range = s3_read.read_range
    monkeypatch.setattr(s3_read, "read_range", read_range)
    monkeypatch.setattr(s3_read, "BLOCK_BYTES", 2**18)
    for index, shard in enumerate(shards):
        fetched.clear()
        records = read_whole(shard)
        assert [r["image"] for r in records] == images[index * 10 : index * 10 + 10]
        if storage.is_s3(shard.uri):
            assert 1_000_000 < sum(fetched) < 2_000_000  # of 6 MB


def test_damage_in_one_shard_of_a_file_leaves_the_others(
    six_shards: tuple[list[Shard], list[bytes]],
):
    shards, images = six_shards
    data = bytearray(storage.read_bytes(shards[0].uri))
    data[data.index(images[27]) + 500] ^= 1  # in the second row group of the third shard
    storage.write_bytes(shards[0].uri, bytes(data))
    shards = shards_of(shards[0].uri)
    end = read_failed(shards[2], kept=5)
    assert (end["reason"], end["shard"]) == ("shard_corrupt", "x.parquet#rows=20-29")
    assert all(len(read_whole(shard)) == 10 for shard in shards if shard != shards[2])


def test_a_file_overwritten_since_the_listing_has_changed_for_all_its_shards(
    six_shards: tuple[list[Shard], list[bytes]],
):
    shards, _ = six_shards
    data = storage.read_bytes(shards[0].uri)
    storage.write_bytes(shards[0].uri, data[:-1] + b"?")
    for shard in shards:
        end = read_failed(shard)
        assert (end["reason"], end["retryable"]) == ("shard_changed", True)


def test_parquet_of_polars_is_read(tmp_path: Path):
    import polars

    frame = polars.DataFrame({"key": ["a", "b"], "image": [b"x", b"y"]})
    frame.write_parquet(tmp_path / "x.parquet")
    [shard] = shards_of(str(tmp_path))
    assert [(r["key"], r["image"]) for r in read_whole(shard)] == [("a", b"x"), ("b", b"y")]


# ------------------------------------------------------------------------------- any text


@pytest.mark.parametrize("form", ["x.tar", "x.jpg"])
def test_a_caption_cut_inside_an_emoji_is_text(tmp_path: Path, form: str):
    """JSON may say half of a pair of surrogates, which is no character and not in UTF-8."""
    half, stray = b'{"caption": "cut \\ud83d"}', b'{"caption": "\\udcff \\ud83d\\ude00"}'
    members = [("0.jpg", b"x"), ("0.json", half), ("1.jpg", b"y"), ("1.json", stray)]
    if form == "x.tar":
        (tmp_path / form).write_bytes(make_tar(members))
    else:
        for name, data in members:
            (tmp_path / name).write_bytes(data)
    [shard] = shards_of(str(tmp_path), text_column="caption")
    records = read_whole(shard)
    pa.Table.from_pylist(records, schema=RECORDS)
    assert [r["text"] for r in records] == ["cut \\xed\\xa0\\xbd", "\\xff \N{GRINNING FACE}"]


# -------------------------------------------------------------------------- loose images


def test_loose_images_are_read_in_order(folder: str):
    for index in range(20):
        storage.write_bytes(f"{folder}/a.b/{index:02d}.x.jpg", b"image %d" % index)
    [shard] = shards_of(folder)
    records = read_whole(shard)
    assert [record["image"] for record in records] == [b"image %d" % i for i in range(20)]
    assert (records[3]["key"], records[3]["member"]) == ("a.b/03.x", "a.b/03.x.jpg")


def test_a_loose_image_that_is_gone_or_empty_is_a_row(folder: str):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        storage.write_bytes(f"{folder}/{name}", b"" if name == "c.jpg" else b"image")
    [shard] = shards_of(folder)
    records = read_whole(replace(shard, files=("a.jpg", "b2.jpg", "c.jpg")))
    assert [(r["image"], r["reason"], r["stage"]) for r in records] == [
        (b"image", "", ""),
        (b"", "file_missing", "read"),
        (b"", "", ""),
    ]


def test_a_loose_image_that_cannot_be_read_is_a_row(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"image")
    os.symlink("b.jpg", tmp_path / "b.jpg")  # a link to itself
    os.symlink("nowhere", tmp_path / "c.jpg")
    [shard] = shards_of(str(tmp_path))
    reasons = [record["reason"] for record in read_whole(shard)]
    assert reasons == ["", "file_unreadable", "file_missing"]


@pytest.mark.parametrize(("extension", "data"), [("txt", b"a cat"), ("json", b'{"c": "a cat"}')])
def test_a_byte_order_mark_is_no_part_of_a_text(extension: str, data: bytes):
    assert find_text("c", extension, b"\xef\xbb\xbf" + data) == "a cat"


def test_a_text_that_cannot_be_read_fails_its_image_alone(tmp_path: Path):
    for key in "abcde":
        (tmp_path / f"{key}.jpg").write_bytes(b"image")
        (tmp_path / f"{key}.txt").write_bytes(b"text of " + key.encode())
    (tmp_path / "b.json").mkdir()
    (tmp_path / "c.txt").unlink()
    (tmp_path / "c.txt").symlink_to("c.txt")  # a link to itself
    (tmp_path / "d.txt").write_bytes(b"x" * (TEXT_LIMIT_BYTES + 1))
    [shard] = shards_of(str(tmp_path), text_column="caption")
    (tmp_path / "e.txt").unlink()
    records = read_whole(shard)
    assert [(r["key"], r["reason"], r["text"]) for r in records] == [
        ("a", "", "text of a"),
        ("b", "", "text of b"),
        ("c", "no_text", ""),
        ("d", "no_text", ""),  # as in a tar, no text is cut
        ("e", "file_missing", ""),
    ]
    assert "e.txt" in records[4]["detail"]


def test_a_text_is_read_from_the_listing_alone(folder: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.jpg", "a.txt", "b.jpg"):
        storage.write_bytes(f"{folder}/{name}", name.encode())
    [shard] = shards_of(folder, text_column="caption")
    storage.write_bytes(f"{folder}/b.txt", b"later")
    read: list[str] = []
    whole = storage.read_bytes

    def read_bytes(uri: str, **options: Any) -> bytes:
        read.append(uri.rpartition("/")[2])
        return whole(uri, **options)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    assert [(r["text"], r["reason"]) for r in read_whole(shard)] == [("a.txt", ""), ("", "no_text")]
    assert sorted(read) == ["a.jpg", "a.txt", "b.jpg"]


def test_a_pipe_beside_an_image_is_not_waited_for(tmp_path: Path):
    for key in "abc":
        (tmp_path / f"{key}.jpg").write_bytes(b"image")
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"text")
    [shard] = shards_of(str(tmp_path), text_column="caption")
    for name in ("b.txt", "c.jpg"):  # listed as files, and replaced since
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    records = read_whole(shard)
    assert [r["reason"] for r in records] == ["no_text", "file_missing", "file_missing"]


def test_a_link_out_of_the_input_gives_no_text(tmp_path: Path):
    secret, inside = tmp_path / "secret", tmp_path / "in"
    (inside / "texts").mkdir(parents=True)
    secret.mkdir()
    (secret / "key.txt").write_bytes(b"secret")
    (inside / "texts" / "b").write_bytes(b"text of b")
    for path in (inside / "a.jpg", inside / "b.jpg", secret / "c.jpg"):
        path.write_bytes(b"image")
    (secret / "c.txt").symlink_to(secret / "key.txt")
    (inside / "a.txt").symlink_to(secret / "key.txt")
    (inside / "b.txt").symlink_to("texts/b")
    (inside / "linked").symlink_to(secret)
    (tmp_path / "other name").symlink_to(inside)
    for source in (inside, tmp_path / "other name"):
        shards = shards_of(str(source), text_column="caption")
        records = [record for shard in shards for record in read_whole(shard)]
        assert [(r["key"], r["text"], r["reason"]) for r in records] == [
            ("a", "", "no_text"),
            ("b", "text of b", ""),
            ("linked/c", "", "no_text"),
        ]
        assert "link" in records[0]["detail"]


@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
def test_a_loose_file_overwritten_since_the_plan_has_changed(folder: str, name: str):
    for path in ("a.jpg", "a.txt", "b.jpg", "b.txt"):
        storage.write_bytes(f"{folder}/{path}", b"first")
    [shard] = shards_of(folder, text_column="caption")
    storage.write_bytes(f"{folder}/{name}", b"other")
    records = read_whole(shard)
    assert [(r["reason"], r["retryable"], r["image"]) for r in records] == [
        ("file_changed", True, b""),
        ("", False, b"first"),
    ]


@pytest.mark.parametrize("name", ["x.tar", "x.jpg"])
def test_a_local_file_of_the_same_size_and_mtime_has_changed(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(make_tar([("0.jpg", b"one")]))
    [before] = shards_of(str(tmp_path))
    times = path.stat()
    path.write_bytes(make_tar([("0.jpg", b"two")]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    [after] = shards_of(str(tmp_path))
    assert before.version != after.version
    *records, end = read_shard(before)
    assert (end["reason"] or records[0]["reason"]) in ("shard_changed", "file_changed")


def test_credentials_refused_for_a_text_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And a fault that may pass leaves the image to be retried."""
    (tmp_path / "a.jpg").write_bytes(b"image")
    (tmp_path / "a.txt").write_bytes(b"text")
    [shard] = shards_of(str(tmp_path), text_column="caption")
    faults: list[StorageError] = [TransientError("slow down"), CredentialsError("refused")]
    whole = storage.read_bytes

    def read_bytes(uri: str, **options: Any) -> bytes:
        if uri.endswith(".jpg"):
            return whole(uri, **options)
        raise faults.pop(0)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    [record] = read_whole(shard)
    assert (record["reason"], record["retryable"]) == ("file_unreadable", True)
    with pytest.raises(CredentialsError):
        list(read_shard(shard))


# ------------------------------------------------------------------------------- batches


def to_table(shards: list[Shard]) -> pa.Table:
    return pa.Table.from_pylist([shard_to_row(shard) for shard in shards])


def test_batches_are_bounded_in_rows_and_lose_none(folder: str):
    for count in (0, 1, 63, 64, 65, 150):
        members = [(f"{index}.jpg", b"%d" % index) for index in range(count)]
        data = make_tar(members or [("folder/.hidden", b"")])
        storage.write_bytes(f"{folder}/{count:03d}.tar", data)
    tables = list(read_batches(to_table(shards_of(folder))))
    assert [table.num_rows for table in tables] == [1, 2, 64, 64, 1, 64, 2, 64, 64, 23]
    assert all(table.schema == RECORDS for table in tables)
    table = pa.concat_tables(tables)
    totals = table.filter(pa.compute.equal(table["row"], -1))["total"].to_pylist()
    assert totals == [0, 1, 63, 64, 65, 150]


def test_batches_are_bounded_in_bytes(tmp_path: Path):
    large = BATCH_BYTES // 2
    sizes = [large, large, 1, large + 1, large, 2 * large + 1, 1]
    members = [(f"{index}.jpg", bytes(size)) for index, size in enumerate(sizes)]
    shard = write_one(str(tmp_path), "x.tar", make_tar(members))
    tables = list(read_batches(to_table([shard])))
    assert [table["row"].to_pylist() for table in tables] == [[0, 1], [2, 3], [4], [5], [6, -1]]


def test_parquet_is_read_in_bounded_memory(tmp_path: Path):
    """A row group of 128 MB is streamed by its pages of 4 MB."""
    image = os.urandom(2**20)
    table = pa.table({"image": [image] * 128})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, write_batch_size=4)
    del table
    [shard] = shards_of(str(tmp_path))
    before = pa.total_allocated_bytes()
    peak = 0
    for batch in read_batches(to_table([shard])):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert batch.num_rows <= 33
    assert peak < 100 * 2**20


def test_names_that_are_not_utf8_pass_through_arrow(tmp_path: Path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"image")
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).write_bytes(make_tar(SAMPLES[:1]))
    tables = list(read_batches(to_table(shards_of(str(tmp_path)))))
    assert [table["shard"][0].as_py() for table in tables] == ["caf\\xe9.tar", "images-00000"]
    assert tables[1]["key"].to_pylist() == ["caf\\xe9", ""]
    assert tables[1]["image"][0].as_py() == b"image"


def test_a_shard_comes_back_from_its_row(tmp_path: Path):
    for name in (b"caf\xe9.jpg", b"b.jpg", b"b.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    [shard] = shards_of(str(tmp_path), text_column="caption")
    assert [path for path, version in shard.listed if version] == [*shard.files, "b.txt"]
    [row] = to_table([shard]).to_pylist()
    assert shard_from_row(row) == shard
