from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import REASONS, RowError
from pipeline.read.shard import Sample
from pipeline.read.tar import read_tar
from tests.shards import Member, find_header, link, make_tar

FIVE = [(f"{index}.jpg", b"image %d " % index * 200) for index in range(5)]


def read_all(data: bytes, **options: Any) -> tuple[list[Sample], RowError | None]:
    """The images, and the error that ended the shard early."""
    samples = []
    try:
        for sample in read_tar(io.BufferedReader(io.BytesIO(data)), **options):  # type: ignore[arg-type]
            samples.append(sample)
    except RowError as error:
        return [s for s in samples if s], error
    return [s for s in samples if s], None


def read_whole(members: list[Member], **options: Any) -> list[Sample]:
    samples, error = read_all(make_tar(members), **options)
    assert error is None
    return samples


def check_damage(data: bytes, kept: int, reason: str, detail: str = "") -> None:
    """The first `kept` members of FIVE come back whole, and the shard error says what happened."""
    samples, error = read_all(data)
    assert [(s.member, s.image) for s in samples] == FIVE[:kept]
    assert error is not None
    assert (error.stage, error.reason) == ("read", reason)
    assert detail in error.detail


def test_duplicate_keys_near_and_far_are_rows_of_their_own():
    members = [("a.jpg", b"1"), ("a.txt", b""), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")]
    samples = read_whole(members)
    assert [(s.key, s.image) for s in samples] == [
        ("a", b"1"),
        ("a", b"2"),
        ("b", b"3"),
        ("a", b"4"),
    ]


def test_pickles_are_never_opened_and_formats_left_to_decoding():
    samples = read_whole(
        [("a.pkl", b"cos\nsystem\n(S'false'\ntR."), ("b.heic", b"h"), ("c.svg", b"")]
    )
    assert [(s.key, s.reason, s.image) for s in samples] == [("b", "", b"h"), ("c", "", b"")]


def test_links_devices_and_folders():
    folder = link("d", type=tarfile.DIRTYPE)
    device = link("dev.jpg", type=tarfile.CHRTYPE)
    members: list[Member] = [
        folder,
        link("soft.jpg"),
        link("hard.png", type=tarfile.LNKTYPE),
        link("text.txt"),
        device,
        link("null", type=tarfile.CHRTYPE),
        link("pipe.jpg", type=tarfile.FIFOTYPE),
        ("._x.jpg", b"resource fork"),
        ("x.jpg", b"x"),
    ]
    assert [(s.key, s.reason, s.image) for s in read_whole(members)] == [
        ("soft", "member_unsupported", b""),
        ("hard", "member_unsupported", b""),
        ("dev", "member_unsupported", b""),
        ("pipe", "member_unsupported", b""),
        ("x", "", b"x"),
    ]


@pytest.mark.parametrize("format", ["gnu", "pax", "oldgnu"])
def test_sparse_members_are_refused_and_never_expanded(tmp_path: Path, format: str):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        for index in range(40):  # more extents than one header holds
            file.seek(index * 2**20)
            file.write(b"x")
        file.truncate(52 * 2**20)
    (tmp_path / "after.jpg").write_bytes(b"after")
    command = ["tar", "-S", f"--format={format}", "-cf", "-", "sparse.jpg", "after.jpg"]
    data = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert len(data) < 2**20
    tracemalloc.start()
    samples, error = read_all(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error is None
    assert [(s.key, s.reason) for s in samples] == [("sparse", "member_unsupported"), ("after", "")]
    assert samples[1].image == b"after"
    assert peak < 2**22


def test_a_member_over_the_limit_is_skipped():
    members = [("a.jpg", bytes(5000)), ("b.jpg", b"b")]
    samples = read_whole(members, limit_bytes=4999)
    assert [(s.reason, s.image) for s in samples] == [("member_too_large", b""), ("", b"b")]


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/passwd", "C:\\x", "a/" * 100 + "b" * 200])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_data(name: str, format: int):
    [sample], error = read_all(make_tar([(f"{name}.jpg", b"x")], format=format))
    assert error is None
    assert (sample.key, sample.member, sample.image) == (name, f"{name}.jpg", b"x")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_that_are_not_utf8_are_escaped(format: int):
    samples, error = read_all(make_tar([(os.fsdecode(b"caf\xe9.jpg"), b"x")], format=format))
    assert error is None
    assert samples == [Sample("caf\\xe9", "caf\\xe9.jpg", b"x")]
    [sample], _ = read_all(make_tar([("café 猫.jpg", b"x")], format=format))
    assert sample.key == "café 猫"


def test_a_cut_inside_data_keeps_the_rows_before_and_names_the_member():
    data = make_tar(FIVE)
    check_damage(data[: find_header(data, "3.jpg") + 700], 3, "shard_truncated", "3.jpg")


def test_a_cut_inside_a_header():
    data = make_tar(FIVE)
    check_damage(data[: find_header(data, "3.jpg") + 100], 3, "shard_truncated", "header")


def test_a_missing_end_marker():
    data = make_tar(FIVE)
    end = find_header(data, "4.jpg") + 512 + 2048
    check_damage(data[:end], 5, "shard_truncated", "end-of-archive")
    check_damage(data[: end - 100], 5, "shard_truncated")  # within the padding: no data is lost
    samples, error = read_all(data[: end + 512])  # half of the marker is enough
    assert (len(samples), error) == (5, None)


def test_a_corrupt_middle_header():
    data = bytearray(make_tar(FIVE))
    data[find_header(bytes(data), "2.jpg") + 130] ^= 0xFF
    check_damage(bytes(data), 2, "shard_corrupt", "damaged header")


def test_a_zeroed_middle_header():
    data = bytearray(make_tar(FIVE))
    offset = find_header(bytes(data), "2.jpg")
    data[offset : offset + 512] = bytes(512)
    check_damage(bytes(data), 2, "shard_corrupt", "after the end-of-archive marker")


def test_two_archives_in_one_are_told():
    check_damage(make_tar(FIVE) + make_tar(FIVE), 5, "shard_corrupt", "two archives")


def test_a_sample_cut_before_its_image_is_left_to_the_shard_error():
    data = make_tar([("a.jpg", b"a"), ("b.json", b"{}"), ("b.jpg", bytes(3000))])
    samples, error = read_all(data[: find_header(data, "b.jpg") + 1000])
    assert [s.key for s in samples] == ["a"]
    assert error is not None
    assert "b.jpg" in error.detail


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "shard_empty"),
        (bytes(1), "shard_empty"),
        (bytes(511), "shard_empty"),
        (bytes(512), "shard_empty"),
        (bytes(3_000_000), "shard_empty"),
        (bytes(1024) + b"x" * 1024, "shard_corrupt"),
        (b"<html>no tar</html>", "shard_corrupt"),
        (b"PK\3\4" * 5000, "shard_corrupt"),
        (os.urandom(20_000), "shard_corrupt"),
        (gzip.compress(b"not a tar" * 500, mtime=0), "shard_corrupt"),
        (gzip.compress(b"", mtime=0), "shard_empty"),
        (gzip.compress(bytes(100), mtime=0), "shard_empty"),
    ],
    # mtime=0 above: the bytes are in the test's name, which both workers of a run must agree on.
)
def test_what_is_no_tar_at_all(data: bytes, reason: str):
    check_damage(data, 0, reason)


def test_gzip_is_read_whatever_the_name_says():
    samples, error = read_all(gzip.compress(make_tar(FIVE)))
    assert error is None
    assert [(s.member, s.image) for s in samples] == FIVE


def test_a_gzip_stream_cut_short_or_damaged():
    noise = [(f"{index}.jpg", os.urandom(300_000)) for index in range(5)]
    data = gzip.compress(make_tar(noise))
    samples, error = read_all(data[: len(data) // 2])
    assert [(s.member, s.image) for s in samples] == noise[:2]
    assert error is not None
    assert error.reason == "shard_truncated"
    wrong = bytearray(data)
    wrong[-6] ^= 1  # of the CRC
    samples, error = read_all(bytes(wrong))
    assert [(s.member, s.image) for s in samples] == noise
    assert error is not None
    assert error.reason == "shard_corrupt"
    assert "CRC" in error.detail


@pytest.mark.parametrize("size", [2**62, -1, 2**20 + 1])
@pytest.mark.parametrize("type", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_sizes_that_lie_cost_no_memory(size: int, type: bytes):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = type, size
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    tracemalloc.start()
    samples, error = read_all(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error is not None
    assert all(sample.reason for sample in samples)
    assert peak < 2**23


def test_a_damaged_pax_header():
    for records in (b"x", b"99 path=a\n", b"5 path=abc\n", b"0 a=b\n", b"12 size=-1\n\n"):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(records)
        head = info.tobuf() + records.ljust(512, b"\0")
        samples, error = read_all(head + make_tar(FIVE))
        assert samples == []
        assert error is not None
        assert error.reason == "shard_corrupt"


def with_size(digits: str) -> bytes:
    """A tar with a member of zeros, whose size stands in its pax header alone."""
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": digits}
    return make_tar([info])


@pytest.mark.parametrize("digits", [21, 4301, 100_000])
def test_a_pax_size_of_too_many_digits(digits: int):
    check_damage(with_size("1" * digits), 0, "shard_corrupt", "no number")
    assert read_all(with_size("5".zfill(20))) == ([Sample("a", "a.jpg", bytes(5))], None)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_loses_no_row_in_silence(data: st.DataObject):
    """Rows come back intact, or the shard's error says that some are missing."""
    members = [(f"{index}.jpg", bytes([65 + index]) * (300 + 700 * index)) for index in range(5)]
    whole = make_tar(members, format=data.draw(st.sampled_from([0, 1, 2])))
    compress = data.draw(st.booleans())
    damaged = bytearray(gzip.compress(whole, 1) if compress else whole)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    samples, error = read_all(bytes(damaged))
    assert error is None or error.reason in REASONS
    if len(samples) < len(members):
        assert error is not None


@dataclass
class Row:
    """A member of a tar and where it lies, its extended headers and padding included."""

    key: str
    image: bytes
    start: int
    end: int


@st.composite
def tars(draw: st.DrawFn) -> tuple[bytes, list[Row]]:
    """A whole tar of images, one of them empty maybe, some of them with long or odd names."""
    stems = st.sampled_from(["{}", "a.b/{}", "/abs/{}", "../{}", "long/" * 40 + "{}", "é猫{}"])
    bodies = st.integers(0, 1600).map(lambda size: bytes(1 + i % 250 for i in range(size)))
    found = draw(st.lists(st.tuples(stems, bodies), min_size=1, max_size=6))
    format = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    data, rows = b"", []
    for index, (stem, body) in enumerate(found):
        key = stem.format(index)
        piece = make_tar([(f"{key}.jpg", body)], format=format)
        # Without the end: two blocks of zeros, and more up to tarfile's record size.
        piece = piece[: len(piece.rstrip(b"\0")) + -len(piece.rstrip(b"\0")) % 512]
        rows.append(Row(key, body, len(data), len(data) + len(piece)))
        data += piece
    return data + bytes(1024), rows


@settings(max_examples=300, deadline=None)
@given(tars(), st.data())
def test_random_damage_anywhere(tar: tuple[bytes, list[Row]], data: st.DataObject):
    """Rows before the damage come back as they were; a row is missing only where that is said."""
    whole, rows = tar
    damaged = bytearray(whole)
    touched = len(whole)  # from here on the file may differ
    flips: set[int] = set()
    kind = data.draw(st.sampled_from(["flip", "cut", "garbage", "zeros", "repeat"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    block = at - at % 512
    if kind == "flip":
        # One bit of a block: a header's checksum is a sum, which two may leave as it was.
        for place in {
            p // 512: p for p in [at, *data.draw(st.lists(st.integers(0, len(whole) - 1)))]
        }.values():
            damaged[place] ^= 1 << data.draw(st.integers(0, 7))
            flips.add(place)
        touched = min(flips)
    elif kind == "cut":
        del damaged[at:]
        touched = at
    else:
        size = 512 * data.draw(st.integers(1, 4))
        piece = {
            "garbage": b"\x81" * size,
            "zeros": bytes(size),
            "repeat": whole[block : block + size],
        }[kind]
        damaged[block:block] = piece
        touched = block + size if kind == "repeat" else block

    tracemalloc.start()
    samples, error = read_all(bytes(damaged))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22

    assert error is None or (error.stage, error.reason in REASONS) == ("read", True)
    assert not any(sample.reason for sample in samples) or kind in ("flip", "repeat")
    before = [row for row in rows if row.end <= touched]
    found = [(sample.key, sample.image) for sample in samples]
    assert found[: len(before)] == [(row.key, row.image) for row in before]
    # Nothing that is there may be returned as something else.
    if kind == "cut":
        assert found == [(row.key, row.image) for row in rows][: len(found)]
    # A header at the end of what is there twice takes what follows, headers too, for its data.
    reach = max(row.end - row.start for row in rows) if kind == "repeat" else 0
    intact = {
        row.key: row.image
        for row in rows
        if not any(row.start <= p < row.end for p in flips)
        and not row.start < block < row.end
        and not (reach and block <= row.start <= block + reach)
    }
    if kind in ("flip", "garbage", "zeros"):
        assert all(intact.get(key, image) == image for key, image in found)
    if error is None:
        assert all(row in found for row in intact.items())
        assert len(found) >= len(rows)
