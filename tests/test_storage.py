from __future__ import annotations

import os
import re
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import (
    ChangedError,
    CredentialsError,
    NotFoundError,
    StorageError,
    TransientError,
    UsageError,
)


def names(files: list[storage.Stored], folder: str) -> list[str]:
    return [file.uri.removeprefix(f"{folder}/") for file in files]


def write_all(folder: str, *paths: str) -> None:
    for path in paths:
        storage.write_bytes(storage.join(folder, path), path.encode())


# ----------------------------------------------------------------------------------- URIs


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        ("/data/x.tar", "/data/x.tar"),
        ("/data//a/../x.tar/", "/data/x.tar"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/folder/", "s3://bucket/folder"),
        ("S3://bucket/user@example.com/a:b.tar", "s3://bucket/user@example.com/a:b.tar"),
    ],
)
def test_a_uri_has_one_form(given: str, checked: str):
    assert storage.check_uri(given) == checked


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.check_uri("data/x.tar") == str(tmp_path / "data/x.tar")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIACANARY:SECRETCANARY@bucket/x",
        "s3://AKIACANARY:SECRET/CANARY+x=@bucket/x",
        "s3://CANARY@bucket/x",
        "https://CANARY:CANARY@host/x?X-Amz-Signature=CANARY",
        "gs://CANARY/x",
        "CANARYCANARYCANARY://x",
        "s3://CANARY*/x",
        "s3:///CANARY",
        "file://CANARY/x",
        "",
    ],
)
def test_a_uri_that_cannot_be_used_is_refused_without_repeating_it(uri: str):
    with pytest.raises(UsageError) as caught:
        storage.check_uri(uri)
    assert "CANARY" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_join_and_parent():
    assert storage.join("s3://bucket/", "a", "", "/b.tar") == "s3://bucket/a/b.tar"
    assert storage.parent("s3://bucket/a/b.tar") == "s3://bucket/a"
    assert storage.parent("s3://bucket") == storage.parent("s3://bucket/a") == "s3://bucket"
    assert storage.parent("/a/b") == "/a"


# ----------------------------------------------------------------------------------- list


def test_listing_is_recursive_and_sorted_with_sizes(folder: str):
    write_all(folder, "b.tar", "a/2.tar", "a/10.tar", "a/deep/er/x", "[odd] *{1,2}?.tar")
    files = storage.list_files(folder)
    expected = ["[odd] *{1,2}?.tar", "a/10.tar", "a/2.tar", "a/deep/er/x", "b.tar"]
    assert names(files, folder) == expected
    assert [file.size_bytes for file in files] == [len(name) for name in expected]
    assert names(storage.list_files(folder, recursive=False), folder) == [expected[0], "b.tar"]
    for file in files:
        assert storage.stat_file(file.uri) == file


def test_listing_does_not_reach_siblings_and_may_be_empty(folder: str):
    write_all(folder, "set/a", "set2/b", "set.tar")
    assert names(storage.list_files(f"{folder}/set"), folder) == ["set/a"]
    assert storage.list_files(f"{folder}/no") == []
    assert storage.list_files(f"{folder}/no", recursive=False) == []
    assert storage.list_files(f"{folder}/set.tar") == []


def test_s3_lists_past_one_page_and_without_folder_markers(s3: Any, bucket: str):
    name = bucket.removeprefix("s3://")
    s3.put_object(Bucket=name, Key="many/", Body=b"")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: s3.put_object(Bucket=name, Key=f"many/{i}", Body=b""), range(120)))
    assert len(storage.list_files(f"{bucket}/many")) == 120


def test_local_links_are_followed_without_running_in_circles(tmp_path: Path):
    write_all(str(tmp_path), "real/a.tar")
    os.symlink(tmp_path / "real", tmp_path / "other")
    os.symlink(tmp_path, tmp_path / "real" / "loop")
    os.symlink(tmp_path / "gone", tmp_path / "dangling.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    files = storage.list_files(str(tmp_path))
    found = {
        name: file.version for name, file in zip(names(files, str(tmp_path)), files, strict=True)
    }
    assert {"real/a.tar", "other/a.tar", "dangling.tar"} <= set(found)
    assert "pipe.tar" not in found
    assert found["dangling.tar"] == ""
    assert len(found) < 10


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.tar", ["a1.tar", "a2.tar", "b1.tar"]),
        ("a?.tar", ["a1.tar", "a2.tar"]),
        ("[bc]1.tar", ["b1.tar"]),
        ("*/c.tar", ["sub/c.tar"]),
        ("s*", ["sub/c.tar", "sub/deep/d.tar"]),
        ("**/*.tar", ["a1.tar", "a2.tar", "b1.tar", "sub/c.tar", "sub/deep/d.tar"]),
        ("z*", []),
    ],
)
def test_glob(folder: str, pattern: str, expected: list[str]):
    write_all(folder, "a1.tar", "a2.tar", "b1.tar", "a1.txt", "sub/c.tar", "sub/deep/d.tar")
    assert names(storage.glob_files(f"{folder}/{pattern}"), folder) == expected


def test_exists_and_is_file(folder: str):
    write_all(folder, "a/b")
    assert storage.exists(folder)
    assert storage.exists(f"{folder}/a/b")
    assert storage.is_file(f"{folder}/a/b")
    assert not storage.is_file(f"{folder}/a")
    assert not storage.exists(f"{folder}/a/c")
    with pytest.raises(NotFoundError, match="a/c: not found"):
        storage.stat_file(f"{folder}/a/c")


# ----------------------------------------------------------------------------------- read


def test_a_file_is_read_forward_and_at_random(folder: str):
    data = os.urandom(3_000_000)
    uri = f"{folder}/x"
    storage.write_bytes(uri, data)
    with storage.open_read(uri, version=storage.stat_file(uri).version) as file:
        assert file.read(1_000_000) + file.read(512) + file.read() == data
        assert file.seek(-10, 2) == len(data) - 10
        assert file.read() == data[-10:]


@pytest.mark.parametrize("data", [b"", b"abc"])
def test_a_whole_file_is_read_in_one_piece(folder: str, data: bytes):
    storage.write_bytes(f"{folder}/x", data)
    assert storage.read_bytes(f"{folder}/x") == data
    assert storage.read_bytes(f"{folder}/x", limit_bytes=2) == data[:2]


def test_what_is_not_there_is_not_found(folder: str):
    with pytest.raises(NotFoundError):
        storage.open_read(f"{folder}/no")
    with pytest.raises(NotFoundError):
        storage.read_bytes(f"{folder}/no")


def test_another_version_than_listed_is_refused(folder: str):
    uri = f"{folder}/x"
    storage.write_bytes(uri, b"old")
    version = storage.stat_file(uri).version
    storage.write_bytes(uri, b"newer")
    with pytest.raises(ChangedError, match="overwritten since"):
        storage.open_read(uri, version=version)


def test_a_file_overwritten_while_it_is_read_is_noticed(folder: str):
    uri = f"{folder}/x"
    storage.write_bytes(uri, bytes(20 * 2**20))
    with storage.open_read(uri) as file:
        file.read(1000)
        if storage.is_s3(uri):
            storage.write_bytes(uri, b"new" * 8_000_000)
        else:  # in place: a replaced local file keeps its old bytes for those who have it open
            Path(uri).write_bytes(b"new" * 8_000_000)
        with pytest.raises(ChangedError, match="while it was being read"):
            file.read()


# ---------------------------------------------------------------------------------- write


def test_writing_replaces_and_leaves_nothing_beside(folder: str):
    storage.write_bytes(f"{folder}/x", b"one")
    storage.write_bytes(f"{folder}/x", b"two")
    assert storage.read_bytes(f"{folder}/x") == b"two"
    assert names(storage.list_files(folder), folder) == ["x"]


def test_a_new_file_is_written_once(folder: str):
    storage.write_new(f"{folder}/x", b"first")
    with pytest.raises(FileExistsError):
        storage.write_new(f"{folder}/x", b"second")
    assert storage.read_bytes(f"{folder}/x") == b"first"
    assert names(storage.list_files(folder), folder) == ["x"]


def test_of_racing_writers_one_wins(folder: str):
    def write(index: int) -> bool:
        try:
            storage.write_new(f"{folder}/x", b"%d" % index)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(write, range(8)))
    assert wins.count(True) == 1
    assert storage.read_bytes(f"{folder}/x") == b"%d" % wins.index(True)


def test_a_finished_file_is_put_whole(folder: str, tmp_path: Path):
    (tmp_path / "part.parquet").write_bytes(b"rows")
    for _ in range(2):
        storage.put_file(tmp_path / "part.parquet", f"{folder}/masks/part.parquet")
    assert storage.read_bytes(f"{folder}/masks/part.parquet") == b"rows"
    assert names(storage.list_files(folder), folder) == ["masks/part.parquet"]
    assert (tmp_path / "part.parquet").exists()


def test_a_folder_is_deleted_and_its_siblings_stay(folder: str):
    write_all(folder, "old/a", "old/b/c[1]*.x", "old2/d", "old.x")
    storage.delete_folder(f"{folder}/old")
    storage.delete_folder(f"{folder}/old")
    assert names(storage.list_files(folder), folder) == ["old.x", "old2/d"]


def test_one_file_is_deleted(folder: str):
    write_all(folder, "a", "b[1]*")
    storage.delete_file(f"{folder}/b[1]*")
    storage.delete_file(f"{folder}/b[1]*")
    assert names(storage.list_files(folder), folder) == ["a"]


@pytest.mark.parametrize("uri", ["s3://bucket", "/"])
def test_a_bucket_or_root_is_never_deleted(uri: str):
    with pytest.raises(UsageError, match="refusing"):
        storage.delete_folder(uri)


@pytest.mark.parametrize("writes", [1, 1000])
def test_a_folder_that_others_delete_and_write_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
):
    """It is not there in the end, unless they never stop; all that was in it is gone."""
    folder, written = tmp_path / "a", []
    write_all(str(folder), *(f"b{index}/{index}" for index in range(10)))
    unlink, rmdir = os.unlink, os.rmdir

    def unlink_second(path: str, **options: Any) -> None:
        monkeypatch.setattr(os, "unlink", unlink)
        unlink(path, **options)
        raise FileNotFoundError(path)

    def write_and_rmdir(path: str, **options: Any) -> None:
        if os.path.basename(path) == "a" and len(written) < writes:
            written.append(f"late-{len(written)}")
            (folder / written[-1]).touch()
        rmdir(path, **options)

    monkeypatch.setattr(os, "unlink", unlink_second)
    monkeypatch.setattr(os, "rmdir", write_and_rmdir)
    storage.delete_folder(str(folder))
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == ([] if writes == 1 else ["a", written[-1]])


@pytest.mark.parametrize("is_back", [False, True])
def test_a_folder_that_is_deleted_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_back: bool
):
    """os.makedirs finds it there, and then finds no folder."""
    calls: list[str] = []

    def makedirs(folder: str, exist_ok: bool) -> None:
        calls.append(folder)
        if is_back or len(calls) == 2:
            Path(folder).mkdir(exist_ok=True)
        if len(calls) == 1:
            raise FileExistsError(folder)

    monkeypatch.setattr(os, "makedirs", makedirs)
    storage.write_bytes(str(tmp_path / "a" / "x"), b"x")
    assert (tmp_path / "a" / "x").read_bytes() == b"x"


def test_a_folder_that_cannot_be_deleted_is_told(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"a file")
    with pytest.raises(StorageError, match=str(tmp_path / "a")):
        storage.delete_folder(str(tmp_path / "a"))


@pytest.mark.parametrize("deleted", [0, 1, 2])
def test_a_storage_that_keeps_its_word_is_not_blamed(
    folder: str, deleted: int, monkeypatch: pytest.MonkeyPatch
):
    """Also where another process deletes the folder in the middle."""
    left = [True] * deleted
    write_new = storage.write_new

    def write_and_delete(uri: str, data: bytes) -> None:
        write_new(uri, data)
        if left and left.pop():
            storage.delete_folder(folder)

    monkeypatch.setattr(storage, "write_new", write_and_delete)
    assert not storage.ignores_create_only(folder)
    assert not left
    assert storage.list_files(folder) == []


def test_a_storage_that_overwrites_is_told(folder: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "write_new", storage.write_bytes)
    assert storage.ignores_create_only(folder)
    assert storage.list_files(folder) == []


# --------------------------------------------------------------------------------- faults


def test_a_local_fault_is_one_line_with_the_path(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        storage.write_bytes(str(tmp_path / "file" / "x"), b"")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(StorageError, match="directory"):
        storage.read_bytes(str(tmp_path))


def test_a_bucket_that_is_not_there(s3: Any):
    with pytest.raises(NotFoundError, match="s3://no-such-bucket/x: not found"):
        storage.write_bytes("s3://no-such-bucket/x", b"")
    assert storage.list_files("s3://no-such-bucket/x") == []


def test_without_credentials_nothing_is_tried_anonymously(
    bucket: str, fresh_client: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for refused in (storage.list_files, storage.exists, storage.read_bytes, storage.open_read):
        with pytest.raises(CredentialsError, match="set AWS_ACCESS_KEY_ID"):
            refused(f"{bucket}/x")


def test_refused_credentials_are_told_without_secrets(
    bucket: str, fresh_client: None, monkeypatch: pytest.MonkeyPatch
):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIACANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRETCANARY")

    def check_credentials_after(requests: bytes) -> None:
        request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", data=requests)
        request.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(request).close()

    check_credentials_after(b"0")
    try:
        actions = (storage.list_files, storage.exists, storage.read_bytes, storage.open_read)
        for refused in (*actions, lambda uri: storage.write_bytes(uri, b"")):
            with pytest.raises(CredentialsError, match="access denied") as caught:
                refused(f"{bucket}/x")
            assert "CANARY" not in str(caught.value)
    finally:
        check_credentials_after(b"inf")


def test_a_server_that_does_not_answer_is_transient(
    s3: Any, fresh_client: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CLIPSEG_RAY_STORAGE_TIMEOUT_S", "2")
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(TransientError, match="s3://bucket/x: the storage does not answer") as e:
            storage.read_bytes("s3://bucket/x")
        assert re.search(r"tried \d+ times in \d\.\d s", str(e.value))


def test_whether_a_folder_is_empty(folder: str):
    assert storage.is_empty(folder)
    storage.write_bytes(f"{folder}/a/b.txt", b"x")
    assert storage.is_empty(f"{folder}/c")
    assert not storage.is_empty(f"{folder}/a")
    assert not storage.is_empty(folder)
