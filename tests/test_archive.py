"""Compression, extended headers and the memory that reading a tar takes."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import RowError
from pipeline.read.records import read_shard
from pipeline.read.shard import Sample
from pipeline.read.tar import INFLATED_LIMIT_BYTES, read_tar
from tests.shards import make_tar, shards_of

NOISE = random.Random(5)
FIVE = [(f"{index}.jpg", NOISE.randbytes(120_000)) for index in range(5)]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def read_all(data: bytes) -> tuple[list[Sample], RowError | None]:
    samples = []
    try:
        for sample in read_tar(io.BufferedReader(io.BytesIO(data))):  # type: ignore[arg-type]
            samples.append(sample)
    except RowError as error:
        return [s for s in samples if s], error
    return [s for s in samples if s], None


@contextmanager
def at_most(size_bytes: int) -> Iterator[None]:
    """A bound on what is allocated inside, at its peak."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    yield
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < size_bytes


# ------------------------------------------------------------------------------ compression


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.TAR.{}", "x.tar.gz"])
def test_a_compressed_tar_is_read_whatever_its_name_says(tmp_path: Path, packed: str, name: str):
    path = tmp_path / name.format(packed)
    path.write_bytes(PACKERS[packed](make_tar(FIVE)))
    [shard] = shards_of(str(tmp_path))
    *records, end = read_shard(shard)
    assert [(r["member"], r["image"]) for r in records] == FIVE
    assert (end["total"], end["reason"]) == (5, "")


@pytest.mark.parametrize("packed", ["bz2", "xz", "zst", "gz"])
def test_several_streams_in_a_row_are_one(packed: str):
    data, pack = make_tar(FIVE), PACKERS[packed]
    pieces = [pack(data[start : start + 250_000]) for start in range(0, len(data), 250_000)]
    assert [s.image for s in read_all(b"".join(pieces))[0]] == [image for _, image in FIVE]
    if packed == "xz":  # zeros between two are padding
        samples, error = read_all((b"\0" * 70_000).join(pieces) + bytes(8))
        assert (len(samples), error) == (5, None)


@pytest.mark.parametrize("packed", PACKERS)
def test_a_stream_cut_short_keeps_the_rows_before(packed: str):
    data = PACKERS[packed](make_tar(FIVE))
    samples, error = read_all(data[: len(data) * 7 // 10])
    assert [(s.member, s.image) for s in samples] == FIVE[: len(samples)]
    assert len(samples) >= 2
    assert error is not None
    assert error.reason == "shard_truncated"
    assert f"{packed[0]}" in error.detail and "stream" in error.detail


@pytest.mark.parametrize("packed", PACKERS)
def test_a_damaged_stream_is_told(packed: str):
    data = bytearray(PACKERS[packed](make_tar(FIVE)))
    size = 150_000  # more than a block of zstd, whose blocks have no checksum here
    data[len(data) // 2 : len(data) // 2 + size] = b"\xff" * size
    samples, error = read_all(bytes(data))
    assert [(s.member, s.image) for s in samples[:2]] == FIVE[: min(2, len(samples))]
    assert error is not None
    assert error.reason == "shard_corrupt"


@pytest.mark.parametrize("packed", PACKERS)
def test_what_follows_a_stream_and_is_none_is_told(packed: str):
    samples, error = read_all(PACKERS[packed](make_tar(FIVE)) + b"no stream at all")
    assert len(samples) == 5
    assert error is not None
    assert error.reason == "shard_corrupt"


def test_zstd_may_begin_with_a_frame_to_skip():
    skippable = b"\x53\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    samples, error = read_all(skippable + PACKERS["zst"](make_tar(FIVE)))
    assert (len(samples), error) == (5, None)


def test_a_member_named_like_the_magic_of_bzip2_is_no_compression():
    [sample], error = read_all(make_tar([("BZh9.jpg", b"x")]))
    assert (sample.image, error) == (b"x", None)


@pytest.mark.parametrize(
    ("start", "named"),
    [(b"PK\3\4", "zip"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"\x04\x22\x4d\x18", "lz4")],
)
def test_what_is_not_read_is_named(start: bytes, named: str):
    samples, error = read_all(start + bytes(range(1, 256)) * 20)
    assert samples == []
    assert error is not None
    assert error.reason == "shard_corrupt"
    assert named in error.detail


def test_the_window_of_xz_is_bounded():
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    data = bytearray(lzma.compress(make_tar(FIVE), filters=filters))
    end = 12 + 4 * data[12]  # of the header of the first block, without its checksum
    assert data[14:17] == b"\x21\1\x10"  # LZMA2 with a dictionary of 2**20
    data[16] = 40  # 4 GiB
    data[end : end + 4] = zlib.crc32(data[12:end]).to_bytes(4, "little")
    samples, error = read_all(bytes(data))
    assert samples == []
    assert error is not None
    assert "emory" in error.detail


# ------------------------------------------------------------------------- extended headers


def pax_header(*records: tuple[str, bytes]) -> bytes:
    """A pax header with records of any size."""
    data = b""
    for keyword, value in records:
        body = b" " + keyword.encode() + b"=" + value + b"\n"
        size = len(body) + len(str(len(body)))
        size += len(str(size)) - len(str(len(body)))
        data += str(size).encode() + body
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("size", [0, 3, 8180, 8192, 65_530, 2**16, 2**20, 5 * 2**20 + 7])
def test_large_pax_records_are_passed_over(size: int):
    header = pax_header(
        ("comment", b"c" * size),
        ("path", b"first.jpg"),
        *[(f"SCHILY.xattr.{index}", bytes([65 + index]) * (size // 7)) for index in range(7)],
        ("path", "désert.jpg".encode()),
        ("LIBARCHIVE.x", b"=\n" * (size // 2)),
    )
    data = header + make_tar([("short.jpg", b"x"), ("after.jpg", b"y")], format=tarfile.GNU_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(data)) as reference:
        names = reference.getnames()
    samples, error = read_all(data)
    assert [s.member for s in samples] == names == ["désert.jpg", "after.jpg"]
    assert error is None


def test_extended_headers_cost_no_memory():
    """Where a header is inflated from a thousandth of its size, or its records are many."""
    image = make_tar([("x.jpg", b"\xff\xd8\xff")])
    long_name = tarfile.TarInfo("long")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**24
    many = pax_header(*[(f"k{index}", b"v" * 50) for index in range(20_000)])
    heads = [
        pax_header(("comment", bytes(2**24)), ("path", b"p" * 2**23)),
        long_name.tobuf() + b"n" * 2**24,
        many,
        pax_header(*[(f"GNU.sparse.{index}", b"v" * 50) for index in range(20_000)]),
    ]
    for head in heads:
        packed = gzip.compress(head + image, 1)
        with at_most(2**22):
            samples, error = read_all(packed)
        assert error is None
        assert len(samples) == 1


@pytest.mark.parametrize(
    "records",
    [
        b"30000000 comment=cut\n",
        b"70000 comment=" + b"c" * 69_985 + b"?",
        b"99999999999999999999999 a=b\n",
    ],
)
def test_a_damaged_record_of_a_large_pax_header_is_told(records: bytes):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf() + records + bytes(-len(records) % 512) + make_tar(FIVE)
    samples, error = read_all(data)
    assert samples == []
    assert error is not None
    assert error.reason == "shard_corrupt"


# ----------------------------------------------------------------------------------- memory


def pack_zeros(path: Path, sizes: list[int]) -> None:
    """A tar.gz of images of zeros: a thousandth of their size."""
    with gzip.open(path, "wb", 1) as file:
        for index, size in enumerate(sizes):
            info = tarfile.TarInfo(f"{index}.jpg")
            info.size = size
            file.write(info.tobuf())
            for start in range(0, size, 2**20):
                file.write(bytes(min(2**20, size - start)))
            file.write(bytes(-size % 512))
        file.write(bytes(1024))


def test_a_member_of_a_compressed_tar_is_bounded(tmp_path: Path):
    limit = INFLATED_LIMIT_BYTES
    pack_zeros(tmp_path / "x.tar.gz", [limit + 1, 1000, 2 * limit])
    [shard] = shards_of(str(tmp_path))
    assert shard.size_bytes < limit / 50
    with at_most(2**23):
        *records, end = read_shard(shard)
    assert [r["reason"] for r in records] == ["member_too_large", "", "member_too_large"]
    assert "of a gzip stream" in records[0]["detail"]
    assert end["reason"] == ""


def test_texts_that_wait_are_bounded():
    members = [(f"0.{index}.txt", b"w" * 2**20) for index in range(60)]
    packed = gzip.compress(make_tar([("0.jpg", b"x"), *members]), 1)
    with at_most(2**24):
        [sample] = read_tar(io.BufferedReader(io.BytesIO(packed)), text="c")  # type: ignore[arg-type]
    assert sample is not None
    assert sample.reason == "text_too_long"


_PEAK = """
import json, sys
import pyarrow as pa
from pipeline.read.inputs import list_shards
from pipeline.read.records import read_batches
from pipeline.read.shard import shard_to_row

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

table = pa.Table.from_pylist([shard_to_row(s) for s in list_shards(sys.argv[1]).shards])
before = peak()
rows, batches = 0, read_batches(table)
while batch := next(batches, None):
    rows += len(batch)
    del batch
print(json.dumps([rows, peak() - before]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the peak")
def test_reading_takes_little_more_than_twice_the_largest_member(tmp_path: Path):
    """Once as it is read, and once in Arrow's buffer."""
    pack_zeros(tmp_path / "x.tar.gz", [INFLATED_LIMIT_BYTES] * 2)
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    rows, peak_bytes = json.loads(done.stdout)
    assert rows == 3
    assert peak_bytes < 2.5 * INFLATED_LIMIT_BYTES
