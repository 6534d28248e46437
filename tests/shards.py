"""Shards made for tests: tars, Parquet files, and the layouts that img2dataset writes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.read.inputs import list_shards
from pipeline.read.shard import Shard

Member = tuple[str, bytes] | tarfile.TarInfo


def make_tar(members: Iterable[Member], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, data) pairs; a TarInfo alone (a link, a folder) has no data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def shards_of(source: str, **options: Any) -> list[Shard]:
    """The shards of an input, whatever was left out."""
    return list_shards(source, **options).shards


def link(name: str, target: str = "/etc/passwd", type: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, target
    return info


def find_header(data: bytes, name: str) -> int:
    """The offset of a member's header in a tar of short names."""
    offset = data.index(name.encode() + b"\0")
    assert offset % tarfile.BLOCKSIZE == 0
    return offset


def make_parquet(columns: Mapping[str, Any] | pa.Table, **options: Any) -> bytes:
    """A Parquet file of columns given as lists or arrays."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def hugging_face_column(cells: Iterable[dict[str, Any] | None]) -> pa.Array:
    """An image column as `datasets` writes it: struct<bytes, path>."""
    return pa.array(list(cells), pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def write_img2dataset(folder: str, form: str, images: Iterable[bytes | None]) -> None:
    """One shard, 00000, as img2dataset's `output_format` webdataset, files or parquet leaves it.

    A None is a download that failed: a row of the Parquet file only, without an image.
    """
    images = list(images)
    keys = [f"{index:09d}" for index in range(len(images))]
    columns: dict[str, Any] = {
        "url": [f"https://example.com/{key}" for key in keys],
        "key": keys,
        "status": ["failed_to_download" if image is None else "success" for image in images],
    }
    good = [(key, image) for key, image in zip(keys, images, strict=True) if image is not None]
    extras = [("txt", b"a caption"), ("json", b"{}")]
    if form == "webdataset":
        members: list[Member] = [
            (f"{key}.{extension}", data)
            for key, image in good
            for extension, data in [("jpg", image), *extras]
        ]
        storage.write_bytes(f"{folder}/00000.tar", make_tar(members))
    elif form == "files":
        for key, image in good:
            for extension, data in [("jpg", image), *extras]:
                storage.write_bytes(f"{folder}/00000/{key}.{extension}", data)
    else:
        columns["jpg"] = pa.array(images, pa.binary())
    storage.write_bytes(f"{folder}/00000.parquet", make_parquet(columns))
    storage.write_bytes(f"{folder}/00000_stats.json", b"{}")
