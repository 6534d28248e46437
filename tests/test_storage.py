from __future__ import annotations

import errno
import io
import itertools
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import (
    ChangedError,
    CredentialsError,
    NotFoundError,
    StorageError,
    TransientError,
    UsageError,
)
from pipeline.storage import files as files_module
from pipeline.storage import local
from pipeline.storage.faults import sort_fault
from pipeline.storage.uri import folder_of, prefix_of, split_s3

ROOT = Path(__file__).parent.parent


def names(files: list[storage.FileInfo], folder: str) -> list[str]:
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
        ("//data/x", "/data/x"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/folder/", "s3://bucket/folder"),
        ("s3://bucket//", "s3://bucket//"),
        ("s3://bucket//a//b/../%20c?#.tar", "s3://bucket//a//b/../%20c?#.tar"),
        ("s3://bucket/a//", "s3://bucket/a//"),
        ("/a/x.tar::/b/{0..1}.tar::s3://b/y/", "/a/x.tar::/b/{0..1}.tar::s3://b/y"),
        ("s3://b/x.tar::S3://c/y", "s3://b/x.tar::s3://c/y"),
        ("s3://b/a::b.tar", "s3://b/a::b.tar"),
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
        "pipe:aws s3 cp s3://CANARY/x -",
        "/data/x.tar::pipe:CANARY",
        "/data/x.tar::",
        "",
    ],
)
def test_a_uri_that_cannot_be_used_is_refused_without_repeating_it(uri: str):
    with pytest.raises(UsageError) as caught:
        storage.check_uri(uri)
    assert "CANARY" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_relative_list_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.check_uri("a.tar::b/c.tar") == f"{tmp_path}/a.tar::{tmp_path}/b/c.tar"
    (tmp_path / "a.tar::b").mkdir()
    assert storage.check_uri("a.tar::b") == f"{tmp_path}/a.tar::b"


def test_join_and_parent():
    assert storage.join("s3://bucket/", "a", "", "b.tar") == "s3://bucket/a/b.tar"
    assert storage.join("s3://bucket/a", "", "/b.tar") == "s3://bucket/a//b.tar"
    assert storage.join("s3://bucket/a//", "b") == "s3://bucket/a//b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("/a", "") == "/a"
    assert storage.parent("s3://bucket/a/b.tar") == "s3://bucket/a"
    assert storage.parent("s3://bucket/a//b.tar") == "s3://bucket/a//"
    assert storage.parent("s3://bucket/a//") == "s3://bucket/a"
    assert storage.parent("s3://bucket") == storage.parent("s3://bucket/a") == "s3://bucket"
    access_point = "s3://arn:aws:s3:us-east-1:123:accesspoint/mine"
    assert storage.parent(access_point) == storage.parent(f"{access_point}/a") == access_point
    assert storage.parent("/a/b") == "/a"


KEYS = st.lists(st.sampled_from(["/", "a", ".", "..", " ", "%2F", "é", "?", "#"]), min_size=1)


@settings(deadline=None)
@given(key=KEYS.map("".join), other=KEYS.map("".join))
def test_a_key_is_exact(key: str, other: str):
    """Folders are told from one another, and a name below one leads back to its object."""
    uri = storage.join("s3://b", key)
    assert split_s3(uri) == ("b", key)
    assert storage.check_uri(storage.check_uri(uri)) == storage.check_uri(uri)
    folder = storage.parent(uri)
    if not key.endswith("/"):
        assert prefix_of(folder) == f"s3://b/{key[: key.rfind('/') + 1]}"
        assert storage.join(folder, storage.relative(folder, uri)) == uri
    there = f"s3://b/{other}/"
    assert prefix_of(folder_of(there)) == there
    assert folder_of(prefix_of(folder_of(there))) == folder_of(there)


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


ODD_KEYS = [
    *("img/c.jpg", "img//c.jpg", "img//sub/d.jpg", "img/sub/d.jpg", "/lead.jpg", "//lead.jpg"),
    *("a/../b.jpg", "b.jpg", "./x.jpg", "../y.jpg", "a/./z.jpg", "a/z.jpg", "..", "a/.."),
    *("p%20q.jpg", "p q.jpg", "%2e%2e/e.jpg", "%.jpg", "h#1.jpg", "q?x=1.jpg", "pl+us.jpg"),
    *("back\\slash.jpg", "caf\u00e9.jpg", "cafe\u0301.jpg", "semi;colon&amp=1,.jpg", "<x>.jpg"),
    *("[br]{a,b}*.jpg", "quote'\".jpg", "$(x)`.jpg", "a:b@c.jpg", "a b//  c .jpg", "tab\t.jpg"),
    *("return\r.jpg", "\x01.jpg", "folder.jpg/", "folder.jpg"),
]


def test_what_is_listed_is_what_is_read(s3: Any, bucket: str):
    """Each object holds its own key, put there and listed by boto3."""
    name = bucket.removeprefix("s3://")
    with ThreadPoolExecutor(8) as pool:
        put = lambda key: s3.put_object(Bucket=name, Key=key, Body=key.encode())  # noqa: E731
        list(pool.map(put, ODD_KEYS))
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=name)
    keys = {found["Key"] for page in pages for found in page["Contents"]}
    assert keys == set(ODD_KEYS)
    files = storage.list_files(bucket)
    assert {storage.relative(bucket, file.uri) for file in files} == keys
    for file in files:
        assert file.uri.removeprefix(f"{bucket}/").encode() == storage.read_bytes(file.uri)
        assert storage.stat_file(file.uri) == file
    for folder in {storage.parent(file.uri) for file in files if not file.uri.endswith("/")}:
        prefix = storage.join(folder, "x")[:-1]
        below = {file.uri for file in files if file.uri.startswith(prefix)}
        assert {file.uri for file in storage.list_files(folder)} == below
        direct = {uri for uri in below if "/" not in uri[len(prefix) :]}
        shallow = {file.uri for file in storage.list_files(folder, recursive=False)}
        assert shallow - direct <= {f"{bucket}/folder.jpg/"}
        assert direct <= shallow


def test_local_names_are_exact(tmp_path: Path):
    taken = [key for key in ODD_KEYS if not {"", ".", ".."} & set(key.split("/"))]
    write_all(str(tmp_path), *taken)
    files = storage.list_files(str(tmp_path))
    assert set(names(files, str(tmp_path))) == set(taken)
    for file in files:
        assert storage.read_bytes(file.uri).decode() == storage.relative(str(tmp_path), file.uri)


def test_deleting_a_folder_leaves_its_twin(bucket: str):
    write_all(bucket, "a/x", "a//x", "a/../x", "a//b/x")
    storage.delete_folder(f"{bucket}/a//")
    assert names(storage.list_files(bucket), bucket) == ["a/../x", "a/x"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a/*.jpg", ["a/x.jpg"]),
        ("a//*.jpg", ["a//x.jpg"]),
        ("a/*/x.jpg", ["a//x.jpg", "a/b/x.jpg"]),
        ("a//b", ["a//b/x.jpg"]),
        ("a//b*", ["a//b/x.jpg"]),
        ("a//**", ["a//b/x.jpg", "a//x.jpg"]),
        ("/*.jpg", ["/x.jpg"]),
        ("**/x.jpg", ["/x.jpg", "a//b/x.jpg", "a//x.jpg", "a/b/x.jpg", "a/x.jpg"]),
    ],
)
def test_a_glob_tells_twins_apart(bucket: str, pattern: str, expected: list[str]):
    write_all(bucket, "a/x.jpg", "a//x.jpg", "a/b/x.jpg", "a//b/x.jpg", "/x.jpg")
    assert names(storage.glob_files(f"{bucket}/{pattern}"), bucket) == expected


_MOUNTS = """
mkdir -p $0/outer && mount -t tmpfs none $0/outer || exit 77
mkdir $0/outer/inner && mount -t tmpfs none $0/outer/inner || exit 77
touch $0/outer/inner/b.tar $0/outer/a.tar
exec "$1" -c 'if True:
    import os, sys
    from pipeline import storage
    root = sys.argv[1] + "/outer"
    assert os.stat(root).st_ino == os.stat(root + "/inner").st_ino
    for file in storage.list_files(sys.argv[1]):
        print(os.path.basename(file.uri))
' $0
"""


def test_a_mount_inside_a_mount_is_listed(tmp_path: Path):
    """The roots of both have one inode number."""
    command = ["unshare", "-Urm", "sh", "-c", _MOUNTS, str(tmp_path), sys.executable]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.stdout.split() == ["a.tar", "b.tar"], done.stderr


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
    assert found["dangling.tar"] == ""
    assert set(found) == {"real/a.tar", "other/a.tar", "dangling.tar"}
    special = [f.uri for f in storage.list_files(str(tmp_path), special=True) if f not in files]
    assert special == [str(tmp_path / "pipe.tar")]
    matched = storage.glob_files(f"{tmp_path}/p*", special=True)
    assert [file.version for file in matched] == [storage.SPECIAL]
    assert storage.glob_files(f"{tmp_path}/p*") == []


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
def test_a_storage_that_keeps_its_word_is_not_blamed(folder: str, deleted: int):
    """Also where another process deletes the folder in the middle."""
    left = [True] * deleted

    def write_and_delete(uri: str, data: bytes) -> None:
        storage.write_new(uri, data)
        if left and left.pop():
            storage.delete_folder(folder)

    assert not storage.ignores_create_only(folder, write=write_and_delete)
    assert not left
    assert storage.list_files(folder) == []


def test_a_storage_that_overwrites_is_told(folder: str):
    assert storage.ignores_create_only(folder, write=storage.write_bytes)
    assert storage.list_files(folder) == []


# --------------------------------------------------------------------------------- faults

PASSING = ("EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT")


def test_a_local_fault_is_one_line_with_the_path(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        storage.write_bytes(str(tmp_path / "file" / "x"), b"")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(StorageError, match="directory"):
        storage.read_bytes(str(tmp_path))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        *((getattr(errno, name), TransientError) for name in PASSING),
        *((number, CredentialsError) for number in (errno.EACCES, errno.EPERM)),
        *((number, NotFoundError) for number in (errno.ENOENT, errno.ENOTDIR)),
        *((number, StorageError) for number in (errno.ENOSPC, errno.EROFS, errno.ELOOP)),
    ],
)
def test_faults_of_the_operating_system_are_sorted(number: int, kind: type[StorageError]):
    assert type(sort_fault("/x", OSError(number, "said"))) is kind


@pytest.mark.parametrize("name", PASSING)
def test_a_local_read_is_tried_again_where_that_may_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Opened anew at its place, since a handle on a mount that went away stays stale."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4096)
    faults: Iterator[OSError] = iter([OSError(getattr(errno, name), "said")] * 2)

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() and (fault := next(faults, None)):
                raise fault
            return super().readinto(buffer) or 0

    def open_failing(path: str) -> io.FileIO:
        return Failing(path)

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(local, "open_regular", open_failing)
    monkeypatch.setattr(files_module, "open_regular", open_failing)
    with storage.open_read(str(path)) as file:
        assert file.read(1000) + file.read() == path.read_bytes()
    assert next(faults, None) is None
    monkeypatch.setenv("CLIPSEG_RAY_STORAGE_TIMEOUT_S", "0.01")
    faults = itertools.repeat(OSError(getattr(errno, name), "said"))
    with storage.open_read(str(path)) as file, pytest.raises(TransientError, match="tried"):
        file.read()


WRITES: dict[str, Callable[[str], None]] = {
    "write": lambda uri: storage.write_bytes(uri, b"new"),
    "create": lambda uri: storage.write_new(uri, b"new"),
    "put": lambda uri: storage.put_file(f"{uri}.from", uri),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("step", ["makedirs", "fsync", "replace", "link"])
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EMFILE"])
def test_a_local_write_is_tried_again_where_that_may_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, step: str, name: str
):
    """From its beginning: what a failed fsync leaves of a file is anybody's guess."""
    uri, works = str(tmp_path / "a" / "x"), getattr(os, step)
    write_all(str(tmp_path), "a/x.from")
    (tmp_path / "a" / "x.from").write_bytes(b"new")
    faults: Iterator[OSError] = iter([OSError(getattr(errno, name), "said")] * 2)

    def failing(*args: Any, **options: Any) -> Any:
        if fault := next(faults, None):
            raise fault
        return works(*args, **options)

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(os, step, failing)
    WRITES[write](uri)
    assert Path(uri).read_bytes() == b"new"
    assert sorted(path.name for path in Path(uri).parent.iterdir()) == ["x", "x.from"]
    used = step != ("link" if write != "create" else "replace")
    assert (next(faults, None) is None) == used
    monkeypatch.setenv("CLIPSEG_RAY_STORAGE_TIMEOUT_S", "0.01")
    faults = itertools.repeat(OSError(getattr(errno, name), "said"))
    if used:
        with pytest.raises(TransientError, match=f"{uri}: .*tried"):
            WRITES[write](uri)


def test_a_disk_that_is_full_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tries: list[int] = []

    def full(handle: int) -> None:
        tries.append(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes(str(tmp_path / "x"), b"x")
    assert len(tries) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", [errno.EEXIST, errno.EIO])
def test_a_new_file_whose_acknowledgement_is_lost_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: int
):
    """As of an NFS server that dies after it has made the link; the client asks again."""
    link = os.link

    def link_and_fail(source: Path, path: str) -> None:
        link(source, path)
        raise OSError(said, "said")

    monkeypatch.setattr(os, "link", link_and_fail)
    storage.write_new(str(tmp_path / "x"), b"ours")
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(FileExistsError):
        storage.write_new(str(tmp_path / "x"), b"theirs")
    assert names(storage.list_files(str(tmp_path)), str(tmp_path)) == ["x"]


def test_what_a_killed_writer_left_goes_when_it_is_old(tmp_path: Path):
    """Ours by name, by age; and nothing else."""
    ours = [f".x{i}.{uuid.uuid4().hex}.tmp" for i in range(2)]
    others = [".x.tmp", "x.parquet", f"x.{uuid.uuid4().hex}.tmp", f".x.{uuid.uuid4().hex}"]
    write_all(str(tmp_path), *ours, *others)
    for name in (ours[0], *others):
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    storage.delete_unfinished([*map(str, tmp_path.iterdir()), str(tmp_path / f".{ours[0]}")])
    assert {path.name for path in tmp_path.iterdir()} == {ours[1], *others}


@pytest.mark.parametrize("write", WRITES)
def test_a_writer_whose_unfinished_file_is_deleted_writes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
):
    """One that slept so long that it was taken for dead."""
    uri, sync = str(tmp_path / "x"), os.fsync
    (tmp_path / "x.from").write_bytes(b"new")

    def delete_and_sync(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        storage.delete_unfinished([str(path) for path in tmp_path.iterdir()], older_than_s=-1)
        sync(handle)

    monkeypatch.setattr(os, "fsync", delete_and_sync)
    WRITES[write](uri)
    assert Path(uri).read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.from"]


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
