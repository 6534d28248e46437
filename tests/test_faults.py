"""Storage under faults, injected by a proxy in front of a real S3 server.

What may pass is ridden out, what may not is raised at once, and nobody's secrets are in it.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fault_proxy import PASSING, Fault, FaultProxy
from shards import make_tar

from jobs import classify, embed, segment
from pipeline import storage
from pipeline.demo import MODEL
from pipeline.errors import (
    ChangedError,
    CredentialsError,
    NotFoundError,
    StorageError,
    TransientError,
)
from pipeline.read.records import read_shard
from pipeline.storage import retry, s3_read, s3_write
from pipeline.storage.s3 import _client_of, client
from tests.shards import shards_of

ROOT = Path(__file__).parent.parent
TIMEOUT = "CLIPSEG_RAY_STORAGE_TIMEOUT_S"
SECRETS = {"AWS_SECRET_ACCESS_KEY": "CANARY-SECRET", "AWS_SESSION_TOKEN": "CANARY-TOKEN"}
REFUSALS = ("denied", "expired", "bad_signature")
MIB = 2**20


@pytest.fixture(scope="module")
def faulty_server(s3: Any) -> Iterator[FaultProxy]:
    """The AWS environment points at a proxy."""
    with pytest.MonkeyPatch.context() as patch, FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        _client_of.cache_clear()
        yield proxy
    _client_of.cache_clear()


@pytest.fixture
def proxy(faulty_server: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """A proxy without faults yet; the waits between attempts are short."""
    monkeypatch.setenv(TIMEOUT, "20")
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.01)
    faulty_server.clear()
    return faulty_server


@pytest.fixture
def folder(bucket: str, proxy: FaultProxy) -> str:
    """A folder with two files of 1,000 bytes."""
    folder = f"{bucket}/data"
    storage.write_bytes(f"{folder}/a", b"a" * 1000)
    storage.write_bytes(f"{folder}/below/b", b"b" * 1000)
    proxy.clear()
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Uploads in parts begin at 10 MiB; bytes for one of three parts."""
    monkeypatch.setattr(s3_write, "PART_BYTES", 5 * MIB)
    return os.urandom(10 * MIB + 1)


def open_and_read(folder: str) -> bytes:
    with storage.open_read(f"{folder}/a") as file:
        return file.read()


def put_and_read(folder: str) -> bytes:
    return storage.read_bytes(f"{folder}/new")


def write_new(folder: str) -> bytes:
    storage.delete_file(f"{folder}/new")
    storage.write_new(f"{folder}/new", b"n" * 1000)
    return storage.read_bytes(f"{folder}/new")


def write_bytes(folder: str) -> bytes:
    storage.write_bytes(f"{folder}/new", b"w" * 1000)
    return storage.read_bytes(f"{folder}/new")


def put_file(folder: str) -> bytes:
    storage.put_file(__file__, f"{folder}/new")
    return storage.read_bytes(f"{folder}/new")


def delete_file(folder: str) -> list[storage.FileInfo]:
    storage.delete_file(f"{folder}/new")
    return storage.list_files(folder)


def delete_folder(folder: str) -> list[storage.FileInfo]:
    storage.write_bytes(f"{folder}/old/c", b"c")
    storage.delete_folder(f"{folder}/old")
    return storage.list_files(f"{folder}/old")


# What is done, and S3's name for the request of it that goes wrong.
OPERATIONS: list[tuple[Callable[[str], Any], str]] = [
    (storage.list_files, "ListObjectsV2"),
    (lambda folder: storage.glob_files(f"{folder}/*"), "ListObjectsV2"),
    (lambda folder: storage.stat_file(f"{folder}/a"), "HeadObject"),
    (storage.exists, "ListObjectsV2"),
    (storage.is_empty, "ListObjectsV2"),
    (lambda folder: storage.read_bytes(f"{folder}/a"), "GetObject"),
    (open_and_read, "HeadObject"),
    (open_and_read, "GetObject"),
    (write_bytes, "PutObject"),
    (write_new, "PutObject"),
    (put_file, "PutObject"),
    (delete_file, "DeleteObject"),
    (delete_folder, "DeleteObjects"),
]
each_operation = pytest.mark.parametrize(("operate", "request_name"), OPERATIONS)
each_request = pytest.mark.parametrize(
    ("request_name", "operate"), {name: operate for operate, name in OPERATIONS}.items()
)


def assert_one_line_without_secrets(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert str(error).startswith("s3://")
    everything = "".join(traceback.format_exception(error))
    for secret in SECRETS.values():
        assert secret not in str(error)
        assert secret not in everything


# ---------------------------------------------------------------------------- ridden out


@each_operation
def test_faults_that_pass_change_nothing(
    proxy: FaultProxy, folder: str, operate: Callable[[str], Any], request_name: str
):
    expected = operate(folder)
    for kind in (*PASSING, "lost_reply"):
        proxy.clear()
        fault = proxy.add(Fault(kind, operation=request_name, times=2))
        assert operate(folder) == expected, kind
        # A reply without a body is not cut, and the answer of a HEAD has none.
        assert fault.hits == 2 or ("cut" in kind and fault.hits == 1), kind


@each_request
def test_a_request_that_hangs_is_sent_again(
    proxy: FaultProxy,
    folder: str,
    operate: Callable[[str], Any],
    request_name: str,
    monkeypatch: pytest.MonkeyPatch,
):
    expected = operate(folder)
    monkeypatch.setenv(TIMEOUT, "1.2")
    fault = proxy.add(Fault("hang", operation=request_name))
    started = time.monotonic()
    assert operate(folder) == expected
    assert fault.hits == 1
    assert 0.6 <= time.monotonic() - started < 20


def test_a_body_that_stops_midway_is_asked_for_from_there(
    proxy: FaultProxy, folder: str, monkeypatch: pytest.MonkeyPatch
):
    data = os.urandom(4 * MIB)
    storage.write_bytes(f"{folder}/x", data)
    monkeypatch.setenv(TIMEOUT, "2")
    for kind in ("cut", "cut_reset", "stuck_body"):
        proxy.clear()
        proxy.add(Fault(kind, operation="GetObject"))
        assert storage.read_bytes(f"{folder}/x") == data
        first, second = [r.headers["range"] for r in proxy.requests]
        assert first.startswith("bytes=0-")
        # What lay in a buffer when the connection broke may be asked for again.
        assert 0 < int(second.removeprefix("bytes=").partition("-")[0]) <= 2 * MIB


def test_a_slow_body_is_not_cut(proxy: FaultProxy, folder: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TIMEOUT, "3")
    proxy.add(Fault("slow", operation="GetObject", pause_s=0.3))
    started = time.monotonic()
    assert storage.read_bytes(f"{folder}/a") == b"a" * 1000
    assert time.monotonic() - started >= 2.4  # a single silence of 1.5 s would be a hang
    assert proxy.count() == 1


def test_reading_goes_on_at_its_offset(
    proxy: FaultProxy, folder: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3_read, "BLOCK_BYTES", MIB // 4)
    data = os.urandom(5 * MIB)
    storage.write_bytes(f"{folder}/x", data)
    version = storage.stat_file(f"{folder}/x").version
    proxy.clear()
    faults = [
        proxy.add(Fault(kind, operation="GetObject", rate=0.1, times=None)) for kind in PASSING
    ]
    read = bytearray()
    with storage.open_read(f"{folder}/x", version=version) as file:
        while piece := file.read(77_777):
            read += piece
        assert file.seek(-100, os.SEEK_END) == len(data) - 100
        assert file.read() == data[-100:]
    assert bytes(read) == data
    assert sum(fault.hits for fault in faults) > 3
    gets = [r for r in proxy.requests if r.operation == "GetObject"]
    assert all(r.headers["if-match"] == f'"{version}"' for r in gets)


def test_many_pages_do_not_share_a_clock(
    proxy: FaultProxy, bucket: str, s3: Any, monkeypatch: pytest.MonkeyPatch
):
    for index in range(120):  # pages of 50
        s3.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"many/{index}", Body=b"")
    monkeypatch.setenv(TIMEOUT, "2")
    for page in range(3):  # of each page the first request; the third is asked for in ranges
        proxy.add(Fault("hang", operation="ListObjectsV2", skip=page))
    started = time.monotonic()
    assert len(storage.list_files(f"{bucket}/many")) == 120
    assert time.monotonic() - started > 2
    assert sum(fault.hits for fault in proxy.faults) == 3


# ------------------------------------------------------------------------- raised at once


@each_operation
def test_refused_credentials_are_not_tried_twice(
    proxy: FaultProxy, folder: str, operate: Callable[[str], Any], request_name: str
):
    for kind in REFUSALS:
        proxy.clear()
        proxy.add(Fault(kind, operation=request_name, times=None))
        started = time.monotonic()
        with pytest.raises(CredentialsError, match="access denied") as caught:
            operate(folder)
        assert time.monotonic() - started < 20
        # After the 400 of a HEAD, which names no reason, botocore tries the bucket's own region.
        elsewhere = kind == "expired" and request_name == "HeadObject"
        assert proxy.count(request_name) == 1 + elsewhere
        assert_one_line_without_secrets(caught.value)


@pytest.mark.parametrize(
    ("operate", "request_name"),
    [o for o in OPERATIONS if o[1] in ("HeadObject", "GetObject", "PutObject")],
)
def test_what_is_missing_is_not_asked_for_twice(
    proxy: FaultProxy, folder: str, operate: Callable[[str], Any], request_name: str
):
    proxy.add(Fault("missing", operation=request_name, times=None))
    with pytest.raises(NotFoundError) as caught:
        operate(folder)
    assert proxy.count(request_name) == 1
    assert_one_line_without_secrets(caught.value)


@pytest.mark.parametrize("kind", ["slow_down", "reset", "hang"])
@each_request
def test_what_does_not_pass_ends_with_the_timeout(
    proxy: FaultProxy,
    folder: str,
    operate: Callable[[str], Any],
    request_name: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(TIMEOUT, "0.6")
    client()  # made anew, which should not count
    proxy.add(Fault(kind, operation=request_name, times=None))
    for _ in range(5):  # a busy machine may get no further than one try in 0.6 s
        started = time.monotonic()
        with pytest.raises(TransientError) as caught:
            operate(folder)
        assert 0.6 <= time.monotonic() - started < 20  # not the 300 s of the default
        if "tried once" not in str(caught.value):
            break
    assert re.search(r"tried \d+ times in \d+\.\d s", str(caught.value))
    assert proxy.count(request_name) >= 2
    assert_one_line_without_secrets(caught.value)


def test_a_malformed_timeout_is_the_default(monkeypatch: pytest.MonkeyPatch):
    for value in ("", "soon", "-1", "0", "nan", "inf"):
        monkeypatch.setenv(TIMEOUT, value)
        assert retry.storage_timeout() == 300
    storage.set_storage_timeout(12.5)
    assert retry.storage_timeout() == 12.5


@pytest.mark.parametrize("job", [segment, embed, classify])
def test_the_timeout_on_the_command_line_counts(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(TIMEOUT, "300")
    more = ["--prompt", "x"] if job is segment else []
    gone = [str(tmp_path / "gone"), str(tmp_path / "out"), "--model", str(MODEL), *more]
    assert job.main([*gone, "--storage-timeout", "12.5"]) == 2
    assert retry.storage_timeout() == 12.5


def test_a_local_file_that_is_not_there_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(NotFoundError):
        storage.read_bytes(str(tmp_path / "no"))
    with pytest.raises(NotFoundError):
        storage.put_file(tmp_path / "no", "s3://bucket/x")


# -------------------------------------------------------------------- changed meanwhile


@pytest.mark.parametrize("kind", ["pass", "reset", "cut"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda uri: storage.write_bytes(uri, b"new" * 8 * MIB), ChangedError),
        (storage.delete_file, NotFoundError),
    ],
)
def test_an_object_changed_between_two_attempts_is_noticed(
    proxy: FaultProxy,
    folder: str,
    kind: str,
    change: Callable[[str], None],
    error: type[Exception],
):
    uri = f"{folder}/x"
    storage.write_bytes(uri, bytes(20 * MIB))
    with storage.open_read(uri) as file:
        file.read(100)
        proxy.clear()
        proxy.add(Fault(kind, operation="GetObject"))
        proxy.add(Fault("pass", operation="GetObject", first=lambda: change(uri)))
        with pytest.raises(error):
            file.read()
    assert proxy.count("GetObject") == 2


# -------------------------------------------------------------------------------- write


def pending_uploads(s3: Any, folder: str) -> list[Any]:
    bucket = folder.removeprefix("s3://").partition("/")[0]
    return s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])


def test_a_new_file_whose_acknowledgement_was_lost_is_ours(proxy: FaultProxy, folder: str):
    proxy.add(Fault("lost_reply", operation="PutObject"))
    storage.write_new(f"{folder}/x", b"attempt 1")
    assert proxy.count("PutObject") == 2
    assert storage.read_bytes(f"{folder}/x") == b"attempt 1"


def test_a_new_file_that_another_wrote_meanwhile_is_not_ours(proxy: FaultProxy, folder: str):
    proxy.add(Fault("reset", operation="PutObject"))
    write_other = partial(storage.write_bytes, f"{folder}/x", b"other")
    proxy.add(Fault("pass", operation="PutObject", first=write_other))
    with pytest.raises(FileExistsError):
        storage.write_new(f"{folder}/x", b"mine!")
    assert storage.read_bytes(f"{folder}/x") == b"other"


def test_equal_bytes_pass_for_ours(proxy: FaultProxy, folder: str):
    """The reply to our own write may have been lost unseen, below the client: see put_object."""
    storage.write_new(f"{folder}/x", b"same")
    storage.write_new(f"{folder}/x", b"same")
    assert storage.read_bytes(f"{folder}/x") == b"same"


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(
    "request_name", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]
)
def test_an_upload_in_parts_rides_out_faults(
    proxy: FaultProxy, folder: str, small_parts: bytes, request_name: str, create: bool
):
    for number, kind in enumerate(("internal_error", "reset", "lost_reply")):
        uri = f"{folder}/{number}"
        fault = proxy.add(Fault(kind, operation=request_name))
        (storage.write_new if create else storage.write_bytes)(uri, small_parts)
        assert fault.hits == 1
        assert storage.read_bytes(uri) == small_parts


def test_an_upload_that_ends_with_an_error_inside_a_success_is_tried_again(
    proxy: FaultProxy, folder: str, small_parts: bytes
):
    error = "<Error><Code>InternalError</Code><Message>We</Message></Error>"
    proxy.add(Fault("answer", operation="CompleteMultipartUpload", answer=(200, error)))
    storage.write_new(f"{folder}/x", small_parts)
    assert storage.read_bytes(f"{folder}/x") == small_parts


def test_a_refused_upload_leaves_nothing_pending(
    proxy: FaultProxy, folder: str, small_parts: bytes, s3: Any
):
    with pytest.raises(FileExistsError):
        storage.write_new(f"{folder}/a", small_parts)
    assert pending_uploads(s3, folder) == []
    assert storage.read_bytes(f"{folder}/a") == b"a" * 1000


@pytest.mark.parametrize("kind", ["denied", "slow_down"])
@pytest.mark.parametrize("request_name", ["UploadPart", "CompleteMultipartUpload"])
def test_a_failed_upload_leaves_nothing_pending(
    proxy: FaultProxy,
    folder: str,
    small_parts: bytes,
    s3: Any,
    request_name: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(TIMEOUT, "1")
    proxy.add(Fault(kind, operation=request_name, times=None))
    with pytest.raises(CredentialsError if kind == "denied" else TransientError):
        storage.write_bytes(f"{folder}/x", small_parts)
    assert pending_uploads(s3, folder) == []
    assert not storage.exists(f"{folder}/x")


def test_a_large_local_file_is_put_in_parts(
    proxy: FaultProxy, folder: str, small_parts: bytes, tmp_path: Path
):
    (tmp_path / "x").write_bytes(small_parts)
    proxy.add(Fault("lost_reply", operation="CompleteMultipartUpload"))
    storage.put_file(tmp_path / "x", f"{folder}/x")
    assert storage.read_bytes(f"{folder}/x") == small_parts
    assert proxy.count("UploadPart") == 3


def test_deletions_that_fail_inside_a_success_are_tried_again(proxy: FaultProxy, folder: str):
    def failed(code: str) -> tuple[int, str]:
        error = f"<Error><Key>data/below/b</Key><Code>{code}</Code></Error>"
        return 200, f"<DeleteResult>{error}</DeleteResult>"

    proxy.add(Fault("answer", operation="DeleteObjects", answer=failed("AccessDenied")))
    with pytest.raises(CredentialsError, match="data/below/b"):
        storage.delete_folder(f"{folder}/below")
    proxy.add(Fault("answer", operation="DeleteObjects", answer=failed("InternalError")))
    storage.delete_folder(f"{folder}/below")
    assert len(storage.list_files(folder)) == 1


def test_a_server_that_ignores_create_only_is_found_out(
    proxy: FaultProxy, folder: str, fresh_client: None, monkeypatch: pytest.MonkeyPatch
):
    before = storage.list_files(folder)
    assert not storage.ignores_create_only(folder)
    with FaultProxy(proxy.endpoint, without=("if-none-match",)) as careless:
        monkeypatch.setenv("AWS_ENDPOINT_URL", careless.endpoint)
        _client_of.cache_clear()
        assert storage.ignores_create_only(folder)
        assert storage.list_files(folder) == before


@pytest.mark.parametrize(
    ("header", "message"), [("range", "whole objects only"), ("if-match", "overwritten while")]
)
def test_a_server_that_ignores_conditions_of_a_read_gives_no_wrong_bytes(
    proxy: FaultProxy,
    folder: str,
    fresh_client: None,
    monkeypatch: pytest.MonkeyPatch,
    header: str,
    message: str,
):
    storage.write_bytes(f"{folder}/x", os.urandom(9 * MIB))
    with FaultProxy(proxy.endpoint, without=(header,)) as careless:
        monkeypatch.setenv("AWS_ENDPOINT_URL", careless.endpoint)
        _client_of.cache_clear()
        with storage.open_read(f"{folder}/x") as file:
            file.seek(-100, os.SEEK_END)
            if header == "if-match":
                storage.write_bytes(f"{folder}/x", os.urandom(9 * MIB))
            with pytest.raises(StorageError, match=message):
                file.read()


# --------------------------------------------------------------------------- whole shards


IMAGES = [os.urandom(MIB) for _ in range(20)]


def write_tar(folder: str) -> str:
    uri = f"{folder}/x.tar"
    storage.write_bytes(uri, make_tar((f"{n}.jpg", image) for n, image in enumerate(IMAGES)))
    return uri


def test_a_tar_under_bursts_of_faults_loses_no_row(proxy: FaultProxy, bucket: str):
    [shard] = shards_of(write_tar(bucket))
    faults = [proxy.add(Fault(kind, operation="GetObject", skip=1)) for kind in PASSING]
    *records, end = read_shard(shard)
    assert [record["image"] for record in records] == IMAGES
    assert (end["total"], end["reason"]) == (20, "")
    assert all(fault.hits for fault in faults)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (storage.delete_file, "shard_missing"),
        (lambda uri: storage.write_bytes(uri, b"new"), "shard_changed"),
    ],
)
def test_a_tar_that_goes_away_in_the_middle(
    proxy: FaultProxy, bucket: str, change: Callable[[str], None], reason: str
):
    uri = write_tar(bucket)
    [shard] = shards_of(uri)
    proxy.add(Fault("reset", operation="GetObject", skip=1, first=lambda: change(uri)))
    *records, end = read_shard(shard)
    assert [record["image"] for record in records] == IMAGES[:7]
    assert (end["total"], end["reason"]) == (7, reason)


def test_a_tar_behind_a_storage_that_stays_away(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    [shard] = shards_of(write_tar(bucket))
    monkeypatch.setenv(TIMEOUT, "0.5")
    proxy.add(Fault("slow_down", skip=2, times=None))
    *records, end = read_shard(shard)
    assert [record["image"] for record in records] == IMAGES[:7]
    assert (end["reason"], end["retryable"]) == ("shard_unreadable", True)
    assert "SlowDown" in end["detail"]


def test_a_tar_for_which_the_token_expires_stops_the_reader(proxy: FaultProxy, bucket: str):
    [shard] = shards_of(write_tar(bucket))
    proxy.add(Fault("expired", skip=2, times=None))
    with pytest.raises(CredentialsError):
        list(read_shard(shard))


# ------------------------------------------------------------------------------ whole jobs


WORDS = ["--model", str(ROOT / "pipeline/demo/model"), "--prompt", "blue", "--quiet"]


def run_segment(source: str, output: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.segment", source, output, *WORDS, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def segment_here(folder: Path) -> str:
    """The same job on the disk and the Ray of the tests; its output."""
    assert segment.main([str(ROOT / "pipeline/demo/shards"), str(folder / "calm"), *WORDS]) == 0
    return str(folder / "calm")


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of standard error, without what Ray's C++ logs there by itself."""
    return [line for line in done.stderr.splitlines() if not re.match(r"\[\d{4}-", line)]


def rows_of(output: str) -> dict[str, list[dict[str, Any]]]:
    """All rows of every table, sorted."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in ("images", "masks", "errors"):
        for file in storage.list_files(f"{output}/{name}"):
            data = io.BytesIO(storage.read_bytes(file.uri))
            tables.setdefault(name, []).extend(pq.read_table(data).to_pylist())
    return {name: sorted(rows, key=repr) for name, rows in tables.items()}


@pytest.fixture
def shards(proxy: FaultProxy, bucket: str) -> str:
    for path in sorted((ROOT / "pipeline/demo/shards").iterdir()):
        storage.put_file(path, f"{bucket}/in/{path.name}")
    proxy.clear()
    return f"{bucket}/in"


@pytest.mark.soak
@pytest.mark.usefixtures("local_ray")
def test_a_job_under_faults_gives_the_same_tables(
    proxy: FaultProxy, shards: str, bucket: str, tmp_path: Path
):
    calm = rows_of(segment_here(tmp_path))
    assert calm["masks"]
    faults = [proxy.add(Fault(kind, times=None, rate=0.05)) for kind in (*PASSING, "lost_reply")]
    done = run_segment(shards, f"{bucket}/stormy")
    proxy.faults.clear()
    assert (done.returncode, said(done)) == (0, [])
    assert sum(fault.hits for fault in faults) >= 5
    assert rows_of(f"{bucket}/stormy") == calm


@pytest.mark.parametrize(
    "kind", [pytest.param("hang", marks=pytest.mark.soak), "slow_down", "missing"]
)
def test_a_shard_that_the_storage_does_not_give_stays_open(
    proxy: FaultProxy,
    shards: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    """In one line; the other shard is finished, and the same command reads nothing else."""
    monkeypatch.setenv(TIMEOUT, "300")
    options = [*WORDS, "--local", "--storage-timeout", "1"]
    calm, output = tmp_path / "calm", tmp_path / "out"
    assert segment.main([shards, str(calm), *options]) == 0
    wanted = {p.relative_to(calm): p.read_bytes() for p in calm.glob("*/*.parquet")}
    away = proxy.add(Fault(kind, operation="GetObject", key="*.tar", times=None))
    capfd.readouterr()
    assert segment.main([shards, str(output), *options]) == 1
    [line] = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert "1 of 2 shards are not complete" in line
    assert line.endswith("the same command takes them up again")
    assert away.hits
    assert len(list(output.glob("_receipts/*/*"))) == 1
    assert not (output / "_SUCCESS").exists()
    proxy.clear()
    assert segment.main([shards, str(output), *options]) == 0
    assert proxy.count("GetObject", "*.tar") >= 1
    # Its footer, for the listing and for the pictures of the report, and those alone.
    assert proxy.count("GetObject", "*.parquet") == 3
    assert wanted == {p.relative_to(output): p.read_bytes() for p in output.glob("*/*.parquet")}


@pytest.mark.parametrize(
    "key", ["*_staging/.*", pytest.param("*_staging/*/*", marks=pytest.mark.soak)]
)
def test_a_job_whose_writes_are_refused_ends_at_once(
    proxy: FaultProxy, shards: str, bucket: str, key: str
):
    """Those of the driver, or those of the workers."""
    refused = proxy.add(Fault("expired", operation="PutObject", key=key, times=None))
    done = run_segment(shards, f"{bucket}/out")
    ended = time.monotonic()
    assert done.returncode == 1
    [line] = said(done)
    assert line.startswith("clipseg-ray segment: error: s3://")
    assert "access denied" in line and "CANARY" not in line
    assert done.stdout == ""
    writes = [
        r for r in proxy.requests if fnmatchcase(f"{r.operation} {r.key}", f"PutObject {key}")
    ]
    assert 1 <= refused.hits == len(writes) < 5
    assert ended - writes[0].at < 20


@pytest.mark.soak
def test_a_job_ends_when_the_storage_stays_away_for_longer_than_its_timeout(
    proxy: FaultProxy, shards: str, bucket: str
):
    """The workers know of the timeout: they write what is refused here."""
    proxy.add(Fault("slow_down", operation="PutObject", key="*_staging/*/*", times=None))
    done = run_segment(shards, f"{bucket}/out", "--storage-timeout", "1.5")
    assert done.returncode == 1
    [line] = said(done)
    assert re.search(
        r"does not answer as it should \(SlowDown\); tried \d+ times in 1\.\d s$", line
    )
