"""Parquet as people have it: every type that holds images, and files that cells only name."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import UsageError
from pipeline.read.columns import find_image_column
from pipeline.read.parquet import read_parquet
from pipeline.read.records import read_shard
from pipeline.read.shard import Sample
from tests.shards import hugging_face_column, make_parquet, shards_of

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256))
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read_table(table: pa.Table | dict[str, Any], **options: Any) -> list[Sample]:
    """The samples of a Parquet file of these columns."""
    return list(read_parquet(pa.BufferReader(make_parquet(table)), **options))


def read_folder(folder: str, columns: Any, **options: Any) -> list[dict[str, Any]]:
    """The records of a Parquet file in a folder, which may hold what its cells name."""
    storage.write_bytes(f"{folder}/x.parquet", make_parquet(columns))
    [shard] = [s for s in shards_of(folder, **options) if s.format == "parquet"]
    *records, end = read_shard(shard)
    assert (end["total"], end["reason"]) == (len(records), "")
    return records


# ------------------------------------------------------------------------------ any type


def encode(images: list[bytes | None], how: Callable[[bytes], str]) -> pa.Array:
    return pa.array([None if image is None else how(image) for image in images], pa.string())


def to_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


LAYOUTS: dict[str, Callable[[list[bytes | None]], pa.Array]] = {
    "binary": lambda images: pa.array(images, pa.binary()),
    "large_binary": lambda images: pa.array(images, pa.large_binary()),
    "binary_view": lambda images: pa.array(images, pa.binary_view()),
    "dictionary": lambda images: pa.array(images, pa.binary()).dictionary_encode(),
    "struct": lambda images: hugging_face_column({"bytes": image} for image in images),
    "null_struct": lambda images: hugging_face_column(i and {"bytes": i} for i in images),
    "list": lambda images: pa.array([[{"bytes": i}] for i in images], pa.list_(CELL)),
    "large_list": lambda images: pa.array([i and [i] for i in images], pa.large_list(pa.binary())),
    "uint8": lambda images: pa.array([i and list(i) for i in images], pa.list_(pa.uint8())),
    "struct_uint8": lambda images: pa.array(
        [{"bytes": i and list(i)} for i in images], pa.struct([("bytes", pa.list_(pa.uint8()))])
    ),
    "base64": lambda images: encode(images, to_base64),
    "base64_bytes": lambda images: encode(images, to_base64).cast(pa.binary()),
    "base64_category": lambda images: encode(images, to_base64).dictionary_encode(),
    "base64_unpadded": lambda images: encode(images, lambda i: to_base64(i).rstrip("=")),
    "base64_url": lambda images: encode(images, lambda i: base64.urlsafe_b64encode(i).decode()),
    "base64_lines": lambda images: encode(images, lambda i: base64.encodebytes(i).decode()),
    "data_url": lambda images: encode(images, lambda i: f"data:image/jpeg;base64,{to_base64(i)}"),
    "list_of_data_urls": lambda images: pa.array(
        [i and [f"DATA:;BASE64,{to_base64(i)}"] for i in images], pa.list_(pa.string())
    ),
}


@settings(max_examples=25, deadline=None)
@given(
    images=st.lists(st.none() | st.binary(max_size=200).map(JPEG.__add__), min_size=1),
    nested=st.booleans(),
)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_images_of_every_type_are_read(layout: str, images: list[bytes | None], nested: bool):
    column = LAYOUTS[layout](images)
    name = "sample.image" if nested else "image"
    if nested:
        column = pa.StructArray.from_arrays([column, column], ["other", "image"])
    table = pa.table({name.partition(".")[0]: column})
    samples = read_table(table, column=name if nested else "")
    assert [sample.image for sample in samples] == [image or b"" for image in images]
    assert [sample.reason == "no_image" for sample in samples] == [i is None for i in images]
    assert [sample.key for sample in samples] == [str(row) for row in range(len(images))]


@pytest.mark.parametrize("layout", ["binary", "large_binary", "dictionary", "struct"])
def test_images_are_those_that_datasets_reads(tmp_path: Path, layout: str):
    from datasets import Dataset, Image

    images = [JPEG + bytes([index % 3]) for index in range(10)]
    column = LAYOUTS[layout](images)
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    found = Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    if layout == "dictionary":
        found = found.with_format("arrow")
        theirs = found[:]["image"].to_pylist()
    else:
        theirs = [row["bytes"] for row in found.cast_column("image", Image(decode=False))["image"]]
    ours = [sample.image for sample in read_table(pa.table({"image": column}))]
    assert ours == theirs == images


def test_several_images_of_a_row_are_rows_with_their_place(tmp_path: Path):
    from datasets import Dataset, Image, List

    rows: list[list[dict[str, Any]] | None] = [
        [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": JPEG + b"2", "path": None}],
        [],
        None,
        [{"bytes": JPEG + b"3", "path": None}, None],
    ]
    table = pa.table({"images": pa.array(rows, pa.list_(CELL)), "text": ["a", "b", "c", "d"]})
    samples = read_table(table, text="text")
    assert [(s.key, s.member, s.reason, s.text) for s in samples] == [
        ("a.jpg", "images[0]:a.jpg", "", "a"),
        ("0", "images[1]", "", "a"),
        ("1", "", "no_image", ""),
        ("2", "", "no_image", ""),
        ("3", "images[0]", "", "d"),
        ("3", "images[1]", "no_image", ""),
    ]
    pq.write_table(table, tmp_path / "x.parquet")
    found = Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    found = found.cast_column("images", List(Image(decode=False)))
    theirs = [cell["bytes"] for row in found["images"] for cell in row or [] if cell]
    assert [sample.image for sample in samples if not sample.reason] == theirs


def test_keys_and_texts_may_be_categories_or_bytes_without_annotation():
    import pandas as pd

    frame = pd.DataFrame(
        {
            "id": pd.Categorical(["a", "b", None]),
            "image": [JPEG, JPEG, JPEG],
            "label": pd.Categorical(["cat", "dog", "cat"]),
            "caption": [b"caf\xc3\xa9", b"\xff", None],
        }
    )
    table = pa.Table.from_pandas(frame)
    samples = read_table(table, text="label")
    assert [(s.key, s.text) for s in samples] == [("a", "cat"), ("b", "dog"), ("2", "cat")]
    samples = read_table(table.drop_columns(["id"]), text="caption")
    assert [s.text for s in samples] == ["caf\u00e9", "\\xff", ""]
    assert [s.reason for s in samples] == ["", "", "no_text"]
    numbers = pa.table({"id": pa.array([7, 8]).dictionary_encode(), "image": [JPEG, JPEG]})
    assert [s.key for s in read_table(numbers)] == ["7", "8"]
    empty = pa.table({"key": ["", None], "image": hugging_face_column([{"path": "a"}] * 2)})
    assert [s.key for s in read_table(empty)] == ["", "1"]
    nested = pa.table({"sample": [{"image": JPEG, "caption": "a cat"}]})
    assert [s.text for s in read_table(nested, text="sample.caption")] == ["a cat"]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"image": pa.string(), "jpg": pa.binary()}, "jpg"),
        ({"image": pa.null(), "content": pa.binary()}, "content"),
        ({"image": pa.null()}, "image"),
        ({"image": pa.string()}, "image"),
        ({"content": pa.string()}, None),
        ({"images": pa.list_(CELL)}, "images"),
        ({"image": pa.list_(pa.list_(pa.binary()))}, None),
        ({"image": pa.list_(pa.float32())}, None),
        ({"a": pa.struct([("b", pa.struct([("png", pa.binary())]))])}, "a.b.png"),
        ({"a": pa.struct([("img", CELL), ("image", pa.string())])}, "a.img"),
        ({"a.image": pa.binary()}, None),
        ({"image": pa.struct([("bytes", pa.null()), ("path", pa.string())])}, "image"),
        ({"image": pa.struct([("path", pa.string())])}, None),
        ({"image": pa.struct([("bytes", pa.int64())])}, None),
    ],
)
def test_which_column_is_the_image(fields: dict[str, pa.DataType], found: str | None):
    assert find_image_column(pa.schema(fields.items()), None) == found


def test_a_dot_may_belong_to_a_name():
    table = pa.table({"a.image": [JPEG]})
    assert [s.image for s in read_table(table, column="a.image")] == [JPEG]


@pytest.mark.parametrize(
    ("cell", "image"),
    [
        ("data:image/jpeg,%FF%D8%FF", b"\xff\xd8\xff"),
        ("data:image/jpeg;base64,%2F9j%2F", b"\xff\xd8\xff"),
        ("data:nothing", b"data:nothing"),
        ("data:;base64,****", b"data:;base64,****"),
        (to_base64(JPEG) + " " * 3_000_000 + "!", None),  # read once, not once for each blank
    ],
)
def test_broken_text_is_left_for_decoding_to_refuse(cell: str, image: bytes | None):
    [sample] = read_table({"image": [cell]})
    assert sample.image == (cell.encode() if image is None else image)


def test_a_large_category_is_not_copied_to_all_its_rows():
    values = pa.array([bytes(2 * 2**20)], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), values)
    file = pa.BufferReader(make_parquet({"image": column}))
    before = pa.total_allocated_bytes()
    for _ in read_parquet(file):
        assert pa.total_allocated_bytes() - before < 16 * 2**20


# --------------------------------------------------------------------- paths and URLs


def path_cells(*paths: str) -> dict[str, Any]:
    return {"image": hugging_face_column([{"path": path} for path in paths])}


def test_a_path_without_bytes_is_read_beside_the_file(folder: str):
    for name in ("images/1.jpg", "images/2 %20#.jpg", "3.jpg"):
        storage.write_bytes(f"{folder}/{name}", name.encode())
    paths = ["images/1.jpg", f"{folder}/images/1.jpg", "images/2 %20#.jpg", "3.jpg", "4.jpg", "im"]
    records = read_folder(folder, path_cells(*paths))
    assert [r["image"].decode() for r in records] == [
        *("images/1.jpg", "images/1.jpg", "images/2 %20#.jpg", "3.jpg", "", "")
    ]
    assert [r["member"] for r in records] == paths
    assert [r["reason"] for r in records] == ["", "", "", "", "no_image", "no_image"]
    assert "no file is: 4.jpg" in records[4]["detail"]
    assert read_folder(folder, {"image": ["images/1.jpg"]})[0]["image"] == b"images/1.jpg"


def test_a_path_is_an_exact_key(bucket: str):
    paths = ("a//b.jpg", "a/b.jpg", "a/../b.jpg", "b.jpg", "/b.jpg", f"{bucket}/in//b.jpg")
    for path in paths[:-1]:
        storage.write_bytes(f"{bucket}/in/{path}", path.encode())
    records = read_folder(f"{bucket}/in", path_cells(*paths))
    assert [r["image"].decode() for r in records] == [*paths[:-1], "/b.jpg"]


@pytest.mark.parametrize(
    "path", ["../out.jpg", "{root}/out.jpg", "link.jpg", "links/out.jpg", "in/../../out.jpg"]
)
def test_a_path_that_leads_out_of_the_input_is_not_read(tmp_path: Path, path: str):
    (tmp_path / "out.jpg").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.jpg").symlink_to("../out.jpg")
    (tmp_path / "in" / "links").symlink_to(tmp_path)
    storage.write_bytes(f"{tmp_path}/in/x.parquet", b"")
    cells = path_cells(path.format(root=tmp_path))
    (tmp_path / "in" / "x.parquet").write_bytes(make_parquet(cells))
    for source in ("in/x.parquet", "in/*.parquet", "{in,in/x.parquet}"):
        [shard] = [s for s in shards_of(f"{tmp_path}/{source}") if s.name.endswith("x.parquet")]
        [record, _] = read_shard(shard)
        assert (record["image"], record["reason"]) == (b"", "no_image")
        assert "leads out of the input" in record["detail"]


def test_a_path_out_of_a_bucket_is_not_read(s3: Any, bucket: str):
    other = f"{bucket}-2"
    s3.create_bucket(Bucket=other.removeprefix("s3://"))
    storage.write_bytes(f"{other}/in/a.jpg", b"secret")
    storage.write_bytes(f"{bucket}/a.jpg", b"secret")
    paths = (f"{other}/in/a.jpg", f"{bucket}/a.jpg", f"{bucket}/in2/a.jpg")
    records = read_folder(f"{bucket}/in", path_cells(*paths))
    assert [r["reason"] for r in records] == ["no_image"] * 3
    assert all("leads out of the input" in r["detail"] for r in records)


def test_a_folder_that_is_the_input_is_inside(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.parquet").write_bytes(make_parquet(path_cells("../images/a.jpg")))
    shards = {shard.name: shard for shard in shards_of(str(tmp_path))}
    [record, _] = read_shard(shards["data/x.parquet"])
    assert record["image"] == b"a"


@pytest.mark.parametrize("path", ["pipe", "folder", "loop", "x" * 2000, "a\0b", "a/" * 400, "."])
def test_what_is_no_file_is_not_opened(tmp_path: Path, path: str):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    [record] = read_folder(str(tmp_path), path_cells(path))
    assert (record["reason"], record["retryable"]) == ("no_image", False)
    assert "only a path" in record["detail"]


def test_a_url_is_not_fetched(folder: str):
    url = "https://example.com/1.jpg"
    for columns in ({"image": [url]}, path_cells(url)):
        [record] = read_folder(folder, columns)
        assert record["reason"] == "no_image"
        assert f"a URL, which is not fetched: {url}" in record["detail"]


def test_rows_before_damage_are_kept_where_files_are_read(tmp_path: Path):
    """Also those that are still being read."""
    names = [f"{index}.jpg" for index in range(30)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    data = bytearray(make_parquet(path_cells(*names), row_group_size=10, compression="none"))
    start = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(2).column(1)
    data[start.data_page_offset] ^= 255
    (tmp_path / "x.parquet").write_bytes(data)
    [shard] = [s for s in shards_of(str(tmp_path)) if s.format == "parquet"]
    *records, end = read_shard(shard)
    assert end["reason"] == "shard_corrupt"
    assert [r["image"].decode() for r in records[:20]] == names[:20]


# ----------------------------------------------------------------------------- encrypted


class _Keys(pe.KmsClient):
    """Keeps keys as they are."""

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
        return base64.b64decode(wrapped_key)


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_encrypted_parquet_says_so(tmp_path: Path, plaintext_footer: bool):
    factory = pe.CryptoFactory(lambda _: _Keys())
    config = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["image"]}, plaintext_footer=plaintext_footer
    )
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    table = pa.table({"image": [JPEG], "key": ["a"]})
    path = tmp_path / "x.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    [shard] = shards_of(str(tmp_path))
    *records, end = read_shard(shard)
    assert (records, end["reason"], end["retryable"]) == ([], "shard_encrypted", False)
    assert "encrypted" in end["detail"]


def test_a_column_that_is_named_need_not_be_there_in_every_file(folder: str):
    storage.write_bytes(f"{folder}/0.parquet", make_parquet({"id": [1], "caption": ["t"]}))
    storage.write_bytes(f"{folder}/1.parquet", make_parquet({"photo": [JPEG]}))
    [shard] = shards_of(folder, image_column="photo")
    assert shard.name == "1.parquet"
    with pytest.raises(UsageError, match="no column 'nope'"):
        shards_of(folder, image_column="nope")
