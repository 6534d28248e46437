"""Local disk and S3 behind a few functions: list, read, and write so that nobody sees half a file.

Functions take URIs (see `uri`), not file system objects. Endpoint and credentials come from the
usual AWS environment (AWS_ENDPOINT_URL, AWS_PROFILE, ...), never from the URI and never
anonymously. What goes wrong is a StorageError (see `faults`). On S3 what may pass is tried again
(see `retry`); a local disk that fails is not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob as local_glob
import io
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ChangedError, NotFoundError, StorageError, UsageError
from pipeline.storage import s3
from pipeline.storage.faults import storage_errors
from pipeline.storage.s3_read import ObjectFile, read_object
from pipeline.storage.s3_write import put_object, replace_object
from pipeline.storage.uri import Stored, is_s3, join, parent

SPECIAL = "special"  # the version of what is neither a file nor a folder
_FOLDER_TRIES = 10  # to write into, or to delete, a folder that others delete or write into
_PROBES = 3
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp", re.DOTALL)  # as _beside names them


def stat_file(uri: str) -> Stored:
    """Size and version of one file; NotFoundError when there is none (a folder is none)."""
    if is_s3(uri):
        return s3.stat_object(uri)
    with storage_errors(uri):
        found = os.stat(uri)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(uri)
        return _stored_local(uri, found)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    return s3.object_exists(uri) if is_s3(uri) else os.path.exists(uri)


def is_file(uri: str) -> bool:
    """Whether a file is there, not a folder."""
    try:
        stat_file(uri)
    except NotFoundError:
        return False
    return True


def is_empty(folder: str) -> bool:
    """Whether neither files nor folders are in a folder, which need not exist.

    Files that a writer here has not finished, or was killed in, are nothing.
    """
    if is_s3(folder):
        return s3.is_empty(folder)
    try:
        with storage_errors(folder):
            return all(_TEMPORARY.fullmatch(name) for name in os.listdir(folder))
    except NotFoundError:
        return True


def list_files(folder: str, *, recursive: bool = True, special: bool = False) -> list[Stored]:
    """The files below a folder, sorted by URI; empty when nothing is there.

    One listing and no request per object. Local links are followed. Pipes, sockets and devices are
    left out, unless `special` asks for them, with the version SPECIAL.
    """
    with storage_errors(folder):
        if is_s3(folder):
            files = list(s3.list_objects(folder, recursive=recursive))
        elif os.path.isdir(folder):
            files = list(_walk_local(folder, recursive, (_identity(os.stat(folder)),)))
        else:
            return []
    kept = [file for file in files if special or file.version != SPECIAL]
    return sorted(kept, key=lambda file: file.uri)


def glob_files(pattern: str, *, special: bool = False) -> list[Stored]:
    """The files that a pattern matches (`*`, `?`, `[..]`; `**` crosses folders), sorted by URI.

    A folder that matches stands for everything below it, except where `**` has been there already.
    `special` as for list_files.
    """
    with storage_errors(pattern):
        matched = list(s3.glob_objects(pattern) if is_s3(pattern) else _glob_local(pattern))
    found = {file.uri: file for file in matched if isinstance(file, Stored)}
    for folder in matched if "**" not in pattern else []:
        if isinstance(folder, str):
            found.update((file.uri, file) for file in list_files(folder, special=special))
    return [found[uri] for uri in sorted(found) if special or found[uri].version != SPECIAL]


def _glob_local(pattern: str) -> Iterator[Stored | str]:
    """Files, and the paths of folders."""
    for path in local_glob.glob(pattern, recursive=True):
        if os.path.isdir(path):
            yield path.rstrip("/")
        elif os.path.isfile(path):
            yield _stored_local(path, os.stat(path))
        elif os.path.lexists(path):
            broken = not os.path.exists(path)
            yield Stored(uri=path, size_bytes=0, version="" if broken else SPECIAL)


def _walk_local(
    folder: str, recursive: bool, above: tuple[tuple[int, int], ...]
) -> Iterator[Stored]:
    """`above` holds the identities of the folders above: a link to one of them ends there."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = entry.stat()
            except OSError:  # gone, or a link to nowhere: it keeps its place, for reading to report
                yield Stored(uri=entry.path, size_bytes=0, version="")
                continue
            if stat.S_ISREG(found.st_mode):
                yield _stored_local(entry.path, found)
            elif not stat.S_ISDIR(found.st_mode):
                yield Stored(uri=entry.path, size_bytes=0, version=SPECIAL)
            elif recursive and _identity(found) not in above:
                yield from _walk_local(entry.path, recursive, (*above, _identity(found)))


def _identity(found: os.stat_result) -> tuple[int, int]:
    """The roots of two mounts may have one inode number."""
    return (found.st_dev, found.st_ino)


def _stored_local(path: str, found: os.stat_result) -> Stored:
    return Stored(uri=path, size_bytes=found.st_size, version=_local_version(found))


def _local_version(found: os.stat_result) -> str:
    """Size and two times: mtime can be set back by anybody, ctime by nobody.

    No inode: some network file systems number their files anew.
    """
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def _open_regular(path: str) -> io.FileIO:
    """A regular file; for a pipe in its place nobody waits."""
    file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(path)
    return file


class _LocalFile(io.RawIOBase):
    """A local file whose faults are StorageErrors, and so is a change underneath."""

    def __init__(self, path: str, file: io.FileIO):
        self._path, self._file = path, file
        self.version = self._version()

    def _version(self) -> str:
        return _local_version(os.fstat(self.fileno()))

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._path):
            count = self._file.readinto(buffer)
            if self._version() != self.version:
                raise ChangedError(f"{self._path}: overwritten while it was being read")
        return count or 0

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            super().close()


def open_read(uri: str, *, version: str = "") -> io.BufferedReader:
    """A binary file for reading forward or at random; close it.

    A version that differs from the one given, and a change while it is read, is a ChangedError
    (S3: every ranged GET asks for the ETag seen at the start; local: size and times of the file).
    """
    with storage_errors(uri):
        file = ObjectFile(uri) if is_s3(uri) else _LocalFile(uri, _open_regular(uri))
    if version and version != file.version:
        file.close()
        raise ChangedError(f"{uri}: overwritten since the input was listed")
    return io.BufferedReader(file, buffer_size=2**18)


def read_bytes(uri: str, *, limit_bytes: int = 5 * 2**40, version: str = "") -> bytes:
    """A whole file, or its first `limit_bytes`; one request on S3, unless it is large.

    With a version, another one and a change while it is read are a ChangedError, as in open_read.
    """
    if is_s3(uri):
        return read_object(uri, limit_bytes, version)
    with storage_errors(uri):
        file = open_read(uri, version=version) if version else io.BufferedReader(_open_regular(uri))
        with file:
            return file.read(min(limit_bytes, os.fstat(file.fileno()).st_size))


def write_bytes(uri: str, data: bytes) -> None:
    """Writes or replaces a file; a reader sees the old one or the whole new one."""
    if is_s3(uri):
        put_object(uri, data)
        return
    _place(uri, lambda temporary: temporary.write_bytes(data), os.replace)


def write_new(uri: str, data: bytes) -> None:
    """Writes a file that must not exist yet: of several writers one wins.

    The others get FileExistsError. A reader sees nothing or the whole file. A local folder must
    be on a file system with hard links; of S3 servers see `ignores_create_only`.
    """
    if is_s3(uri):
        put_object(uri, data, create=True)
        return
    _place(uri, lambda temporary: temporary.write_bytes(data), os.link)


def replace_file(uri: str, data: bytes, version: str) -> None:
    """Replaces a file that still has this version (see stat_file).

    Raises ChangedError where it has another by now, NotFoundError where it is gone. On a local file
    system without locks two replacements in the same instant may both succeed.
    """
    if is_s3(uri):
        replace_object(uri, data, version)
        return
    with _locked(os.path.dirname(uri)):
        if stat_file(uri).version != version:
            raise ChangedError(f"{uri}: overwritten by another process")
        write_bytes(uri, data)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Holds the lock of a local folder, which the kernel lets go with the process."""
    with storage_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def ignores_create_only(folder: str, *, write: Callable[[str, bytes], None] = write_new) -> bool:
    """Whether a server lets `write` overwrite: some S3 servers ignore that it must not.

    Tried with files of a few bytes, which are deleted afterwards: with several, since another
    process may delete one between its two writes.
    """
    return all(_overwrites(folder, write) for _ in range(_PROBES))


def _overwrites(folder: str, write: Callable[[str, bytes], None]) -> bool:
    uri = join(folder, f".create-only-{uuid.uuid4().hex}")
    write(uri, b"first")
    try:
        write(uri, b"second")
    except FileExistsError:
        return False
    finally:
        delete_file(uri)
    return True


def put_file(path: str | Path, uri: str) -> None:
    """Copies a finished local file to a URI; a reader sees the old one or the whole new one."""
    if is_s3(uri):
        put_object(uri, Path(path))
        return
    _place(uri, lambda temporary: shutil.copyfile(path, temporary), os.replace)


def delete_file(uri: str) -> None:
    """Deletes one file, which need not exist."""
    if is_s3(uri):
        s3.delete_object(uri)
        return
    with storage_errors(uri):
        Path(uri).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Deletes everything below a folder, which need not exist; never a bucket or the root.

    What others write there meanwhile may stay.
    """
    if parent(uri) == uri:
        raise UsageError(f"{uri}: refusing to delete a whole bucket or file system")
    if is_s3(uri):
        s3.delete_objects(uri)
        return
    for _ in range(_FOLDER_TRIES):
        shutil.rmtree(uri, ignore_errors=True)  # goes on past what others delete or write
        if not os.path.lexists(uri):
            return
    with storage_errors(uri), contextlib.suppress(FileNotFoundError):
        try:
            shutil.rmtree(uri)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise


def _place(path: str, fill: Callable[[Path], object], publish: Callable[[Path, str], None]) -> None:
    """Fill a temporary file beside `path`, and publish it there once it is on the disk."""
    with storage_errors(path):
        for tries_left in range(_FOLDER_TRIES, 0, -1):
            try:
                with _beside(path) as temporary:
                    fill(temporary)
                    with open(temporary, "rb") as file:
                        os.fsync(file.fileno())  # or a power cut keeps the name and not the bytes
                    publish(temporary, path)
                return
            except FileNotFoundError:  # somebody has just deleted the folder
                if tries_left == 1:
                    raise


@contextlib.contextmanager
def _beside(path: str) -> Iterator[Path]:
    """A temporary path in the folder of `path` (made if need be), gone afterwards."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise StorageError(f"{folder}: a file stands where a folder is needed") from error
        raise FileNotFoundError(folder) from error  # deleted and made again since: see _place
    temporary = Path(folder, f".{name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
