"""Local disk and S3 behind a few functions: list, read, and write so that nobody sees half a file.

Functions take URIs (see `uri`), not file system objects: the S3 client is made once per process.
Endpoint and credentials come from the usual AWS environment (AWS_ENDPOINT_URL, AWS_PROFILE, ...),
never from the URI and never anonymously. What goes wrong is a StorageError (see `faults`).
"""

from __future__ import annotations

import contextlib
import functools
import glob as local_glob
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ChangedError, NotFoundError, StorageError, UsageError
from pipeline.faults import error_code, storage_errors
from pipeline.uri import check_uri, is_s3, join, parent

__all__ = [
    "Stored",
    "check_uri",
    "delete_file",
    "delete_folder",
    "exists",
    "glob_files",
    "is_empty",
    "is_file",
    "is_s3",
    "join",
    "list_files",
    "open_read",
    "parent",
    "put_file",
    "read_bytes",
    "stat_file",
    "storage_errors",
    "write_bytes",
    "write_new",
]

READ_BLOCK_BYTES = 8 * 2**20  # one ranged GET; a tar is read forward in such steps
_DELETE_KEYS = 1000  # the most that one DeleteObjects request takes


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One file or object as it was when listed."""

    uri: str
    size_bytes: int
    version: str  # S3: the ETag; local: "size-mtime_ns"; "" for a link that leads nowhere


def stat_file(uri: str) -> Stored:
    """Size and version of one file; NotFoundError when there is none (a folder is none)."""
    with storage_errors(uri):
        if is_s3(uri):
            return _stored_object(_s3().info(_key(uri)))
        found = os.stat(uri)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(uri)
        return _stored_local(uri, found)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    with storage_errors(uri):
        if not is_s3(uri):
            return os.path.exists(uri)
        try:
            _s3().info(_key(uri))
        except FileNotFoundError:
            return False
        return True


def is_file(uri: str) -> bool:
    """Whether a file is there, not a folder."""
    try:
        stat_file(uri)
    except NotFoundError:
        return False
    return True


def is_empty(folder: str) -> bool:
    """Whether neither files nor folders are in a folder, which need not exist."""
    with storage_errors(folder):
        try:
            return not (_s3().ls(_key(folder)) if is_s3(folder) else os.listdir(folder))
        except FileNotFoundError:
            return True


def list_files(folder: str, *, recursive: bool = True) -> list[Stored]:
    """The files below a folder, sorted by URI; empty when nothing is there.

    One listing and no request per object. Local links are followed; pipes and devices are left out.
    """
    with storage_errors(folder):
        if is_s3(folder):
            files = _list_objects(folder, recursive)
        elif os.path.isdir(folder):
            files = list(_walk_local(folder, recursive, ()))
        else:
            return []
    return sorted(files, key=lambda file: file.uri)


def glob_files(pattern: str) -> list[Stored]:
    """The files that a pattern matches (`*`, `?`, `[..]`; `**` crosses folders), sorted by URI.

    A folder that matches stands for everything below it, except where `**` has been there already.
    """
    found: dict[str, Stored] = {}
    folders: list[str] = []
    with storage_errors(pattern):
        if is_s3(pattern):
            for info in _s3().glob(_key(pattern), detail=True).values():
                if info["type"] == "directory":
                    folders.append(f"s3://{info['name']}")
                else:
                    file = _stored_object(info)
                    found[file.uri] = file
        else:
            for path in local_glob.glob(pattern, recursive=True):
                if os.path.isdir(path):
                    folders.append(path.rstrip("/"))
                elif os.path.isfile(path):
                    found[path] = _stored_local(path, os.stat(path))
                elif os.path.islink(path):
                    found[path] = Stored(uri=path, size_bytes=0, version="")
    for folder in folders if "**" not in pattern else []:
        found.update((file.uri, file) for file in list_files(folder))
    return [found[uri] for uri in sorted(found)]


def _list_objects(folder: str, recursive: bool) -> list[Stored]:
    try:
        if recursive:
            infos = list(_s3().find(_key(folder), detail=True).values())
        else:
            infos = _s3().ls(_key(folder), detail=True)
    except FileNotFoundError:
        return []
    prefix = f"{_key(folder)}/"  # s3fs answers with the object itself where there is no folder
    return [
        _stored_object(info)
        for info in infos
        if info["type"] == "file" and info["name"].startswith(prefix) and info["name"][-1] != "/"
    ]


def _walk_local(folder: str, recursive: bool, above: tuple[int, ...]) -> Iterator[Stored]:
    """`above` holds the inodes of the folders above, so that a link to one of them ends there."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = entry.stat()
            except OSError:  # gone, or a link to nowhere: it keeps its place, for reading to report
                yield Stored(uri=entry.path, size_bytes=0, version="")
                continue
            if stat.S_ISREG(found.st_mode):
                yield _stored_local(entry.path, found)
            elif stat.S_ISDIR(found.st_mode) and recursive and found.st_ino not in above:
                yield from _walk_local(entry.path, recursive, (*above, found.st_ino))


def _stored_local(path: str, found: os.stat_result) -> Stored:
    return Stored(uri=path, size_bytes=found.st_size, version=_local_version(found))


def _local_version(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _stored_object(info: dict[str, Any]) -> Stored:
    if info["type"] == "directory":
        raise FileNotFoundError(info["name"])
    version = str(info.get("ETag", "")).strip('"')
    return Stored(uri=f"s3://{info['name']}", size_bytes=info["size"], version=version)


class _WatchedFile(io.RawIOBase):
    """A file read from storage: its faults are StorageErrors, and so is a change underneath."""

    def __init__(self, uri: str, file: Any, is_changed: Callable[[], bool]):
        self._uri, self._file, self._is_changed = uri, file, is_changed

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._uri):
            count: int = self._file.readinto(buffer)
            if self._is_changed():
                raise ChangedError(f"{self._uri}: overwritten while it was being read")
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            super().close()


def open_read(uri: str, *, version: str = "") -> io.BufferedReader:
    """A binary file for reading forward or at random; close it.

    A version that differs from the one given, and a change while it is read, is a ChangedError
    (S3: every ranged GET asks for the ETag seen at the start; local: size and time of the file).
    """
    with storage_errors(uri):
        if is_s3(uri):
            file: Any = _s3().open(_key(uri), "rb", block_size=READ_BLOCK_BYTES)
            found = str(file.details.get("ETag", "")).strip('"')
            watched = _WatchedFile(uri, file, lambda: False)
        else:
            file = open(uri, "rb", buffering=0)  # noqa: SIM115 (closed by _WatchedFile)
            found = _local_version(os.fstat(file.fileno()))
            watched = _WatchedFile(
                uri, file, lambda: _local_version(os.fstat(file.fileno())) != found
            )
    if version and version != found:
        watched.close()
        raise ChangedError(f"{uri}: overwritten since the input was listed")
    return io.BufferedReader(watched, buffer_size=2**18)


def read_bytes(uri: str, *, limit_bytes: int = 5 * 2**40) -> bytes:
    """A whole file, or its first `limit_bytes`; one request on S3."""
    with storage_errors(uri):
        if not is_s3(uri):
            with open(uri, "rb") as file:
                return file.read(min(limit_bytes, os.fstat(file.fileno()).st_size))
        try:
            data: bytes = _s3().cat_file(_key(uri), start=0, end=limit_bytes)
        except OSError as error:
            if error_code(error) in ("InvalidRange", "416"):  # an object of zero bytes
                return b""
            raise
        return data


def write_bytes(uri: str, data: bytes) -> None:
    """Writes or replaces a file; a reader sees the old one or the whole new one."""
    with storage_errors(uri):
        if is_s3(uri):
            _s3().pipe_file(_key(uri), data)
        else:
            with _beside(uri) as temporary:
                temporary.write_bytes(data)
                os.replace(temporary, uri)


def write_new(uri: str, data: bytes) -> None:
    """Writes a file that must not exist yet: of several writers one wins.

    The others get FileExistsError. A reader sees nothing or the whole file. A local folder must
    be on a file system with hard links.
    """
    try:
        with storage_errors(uri):
            if is_s3(uri):
                _s3().pipe_file(_key(uri), data, mode="create")
            else:
                with _beside(uri) as temporary:
                    temporary.write_bytes(data)
                    os.link(temporary, uri)
    except ChangedError as error:  # a server that does not say which condition failed
        raise FileExistsError(uri) from error


def put_file(path: str | Path, uri: str) -> None:
    """Copies a finished local file to a URI; a reader sees the old one or the whole new one."""
    with storage_errors(uri):
        if is_s3(uri):
            _s3().put_file(str(path), _key(uri))
        else:
            with _beside(uri) as temporary:
                shutil.copyfile(path, temporary)
                os.replace(temporary, uri)


def delete_file(uri: str) -> None:
    """Deletes one file, which need not exist."""
    with storage_errors(uri):
        if is_s3(uri):
            _delete_objects(uri, [_key(uri)])
        else:
            Path(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Deletes everything below a folder, which need not exist; never a bucket or the root."""
    if parent(uri) == uri:
        raise UsageError(f"{uri}: refusing to delete a whole bucket or file system")
    with storage_errors(uri):
        if not is_s3(uri):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(uri)
            return
        prefix = f"{_key(uri)}/"
        keys = [key for key in _s3().find(_key(uri)) if key.startswith(prefix)]
        for start in range(0, len(keys), _DELETE_KEYS):
            _delete_objects(uri, keys[start : start + _DELETE_KEYS])


def _delete_objects(uri: str, keys: list[str]) -> None:
    bucket = keys[0].partition("/")[0]
    objects = [{"Key": key.partition("/")[2]} for key in keys]
    answer = _s3().call_s3(
        "delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True}
    )
    if failed := answer.get("Errors"):  # the request succeeds even where deletions do not
        raise StorageError(f"{uri}: {len(failed)} objects not deleted ({failed[0].get('Code')})")


@contextlib.contextmanager
def _beside(path: str) -> Iterator[Path]:
    """A temporary path in the folder of `path` (made if need be), gone afterwards."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(f"{folder}: a file stands where a folder is needed") from error
    temporary = Path(folder, f".{name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _key(uri: str) -> str:
    return uri[len("s3://") :]


def _s3() -> Any:
    return _s3_of_process(os.getpid())


@functools.lru_cache(maxsize=1)
def _s3_of_process(pid: int) -> Any:
    """One client per process, shared by its threads; listings are never cached."""
    import s3fs  # 0.5 s, and local runs need none of it

    return s3fs.S3FileSystem(
        anon=False,
        use_listings_cache=False,
        skip_instance_cache=True,
        # s3fs tries 5 times around these: 10 requests in all, not its default of 25.
        config_kwargs={"retries": {"mode": "standard", "max_attempts": 2}},
    )
