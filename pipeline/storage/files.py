"""List, read and write files on local disk or S3; no reader ever sees half a file.

Functions take URIs (see `uri`), not file system objects. Endpoint and credentials come from the
usual AWS environment (AWS_ENDPOINT_URL, AWS_PROFILE, ...), never from the URI and never
anonymously. Every failure is a StorageError (see `faults`). Transient faults are retried (see
`retry`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipeline.errors import ChangedError, NotFoundError, StorageError, UsageError
from pipeline.storage import s3
from pipeline.storage.faults import storage_errors
from pipeline.storage.local import (
    SPECIAL,
    LocalFile,
    glob_local,
    open_regular,
    scan_local,
    stored_local,
    walk_local,
)
from pipeline.storage.retry import persist
from pipeline.storage.s3_read import ObjectFile, read_object
from pipeline.storage.s3_write import put_object, replace_object
from pipeline.storage.uri import FileInfo, is_s3, join, parent, relative

_FOLDER_TRIES = 10  # to write into, or to delete, a folder that others delete or write into
_PROBES = 3
OLD_S = 3600.0  # since the last change of a file, after which its writer is taken for dead
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp", re.DOTALL)  # as _beside names them


def stat_file(uri: str) -> FileInfo:
    """Size and version of one file; NotFoundError when there is none (a folder is none)."""
    if is_s3(uri):
        return s3.stat_object(uri)
    found = persist(uri, lambda: os.stat(uri))
    if not stat.S_ISREG(found.st_mode):
        raise NotFoundError(f"{uri}: not found")
    return stored_local(uri, found)


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
    """Whether a folder is empty or missing.

    Unfinished files of writers here do not count.
    """
    if is_s3(folder):
        return s3.is_empty(folder)
    try:
        with storage_errors(folder):
            return all(_TEMPORARY.fullmatch(name) for name in os.listdir(folder))
    except NotFoundError:
        return True


def list_files(folder: str, *, recursive: bool = True, special: bool = False) -> list[FileInfo]:
    """List the files below a folder, sorted by URI; empty if there are none.

    One listing and no request per object. Local links are followed. Pipes, sockets and devices are
    left out, unless `special` asks for them, with the version SPECIAL.
    """
    with storage_errors(folder):
        if is_s3(folder):
            files = list(s3.list_objects(folder, recursive=recursive))
        elif os.path.isdir(folder):
            files = list(walk_local(folder, recursive))
        else:
            return []
    kept = [file for file in files if special or file.version != SPECIAL]
    return sorted(kept, key=lambda file: file.uri)


def list_names(folder: str) -> Iterator[str]:
    """The URIs of the files below a folder, in any order, while they are listed.

    Cheaper than list_files: nothing is asked of a local file but its name.
    """
    with storage_errors(folder):
        if is_s3(folder):
            yield from (uri for uri, _ in s3.list_sizes(folder, recursive=True))
        elif os.path.isdir(folder):
            yield from (entry.path for entry in scan_local(folder, recursive=True))


def list_sizes(folder: str) -> Iterator[tuple[str, int]]:
    """Name and bytes of each file in a folder, and not below, in any order."""
    with storage_errors(folder):
        if is_s3(folder):
            for uri, size_bytes in s3.list_sizes(folder, recursive=False):
                yield relative(folder, uri), size_bytes
        elif os.path.isdir(folder):
            for entry in scan_local(folder, recursive=False):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat().st_size


def glob_files(pattern: str, *, special: bool = False) -> list[FileInfo]:
    """Match files by a pattern (`*`, `?`, `[..]`; `**` crosses folders), sorted by URI.

    A matching folder stands for everything below it, unless `**` has been there already.
    `special` as for list_files.
    """
    with storage_errors(pattern):
        matched = list(s3.glob_objects(pattern) if is_s3(pattern) else glob_local(pattern))
    found = {file.uri: file for file in matched if isinstance(file, FileInfo)}
    for folder in matched if "**" not in pattern else []:
        if isinstance(folder, str):
            found.update((file.uri, file) for file in list_files(folder, special=special))
    return [found[uri] for uri in sorted(found) if special or found[uri].version != SPECIAL]


def open_read(uri: str, *, version: str = "") -> io.BufferedReader:
    """Open a binary file for reading forward or at random; close it.

    Another version than the one given, and a change while it is read, is a ChangedError
    (S3: every ranged GET asks for the ETag seen at the start; local: size and times of the file).
    """
    if is_s3(uri):
        with storage_errors(uri):
            file: ObjectFile | LocalFile = ObjectFile(uri)
    else:
        file = persist(uri, lambda: LocalFile(uri, open_regular(uri)))
    if version and version != file.version:
        file.close()
        raise ChangedError(f"{uri}: overwritten since the input was listed")
    return io.BufferedReader(file, buffer_size=2**18)


def read_bytes(uri: str, *, limit_bytes: int = 5 * 2**40, version: str = "") -> bytes:
    """Read a whole file, or its first `limit_bytes`; one request on S3, unless it is large.

    With a version, another one and a change while it is read are a ChangedError, as in open_read.
    """
    if is_s3(uri):
        return read_object(uri, limit_bytes, version)
    if version:
        with open_read(uri, version=version) as seen:
            return seen.read(min(limit_bytes, os.fstat(seen.fileno()).st_size))

    def attempt() -> bytes:
        with io.BufferedReader(open_regular(uri)) as file:
            return file.read(min(limit_bytes, os.fstat(file.fileno()).st_size))

    return persist(uri, attempt)


def write_bytes(uri: str, data: bytes) -> None:
    """Write or replace a file; a reader sees the old one or the whole new one."""
    if is_s3(uri):
        put_object(uri, data)
        return
    _place(uri, lambda temporary: temporary.write_bytes(data), os.replace)


def write_new(uri: str, data: bytes) -> None:
    """Create a file: of several writers one wins.

    The others get FileExistsError. A reader sees nothing or the whole file. A local folder must
    be on a file system with hard links; of S3 servers see `ignores_create_only`.
    """
    if is_s3(uri):
        put_object(uri, data, create=True)
        return
    _place(uri, lambda temporary: temporary.write_bytes(data), _link)


def replace_file(uri: str, data: bytes, version: str) -> None:
    """Replace a file of this version (see stat_file).

    Raises ChangedError if it has another by now, NotFoundError if it is gone. On a local file
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
    """Hold the lock of a local folder; the kernel releases it with the process."""
    handle = persist(folder, lambda: os.open(folder, os.O_RDONLY))
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def ignores_create_only(folder: str, *, write: Callable[[str, bytes], None] = write_new) -> bool:
    """Whether a server ignores create-only conditions, as some S3 servers do.

    Writes files of a few bytes and deletes them: several, because another process may delete one
    between its two writes.
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
    """Copy a finished local file to a URI; a reader sees the old one or the whole new one."""
    if is_s3(uri):
        put_object(uri, Path(path))
        return
    _place(uri, lambda temporary: shutil.copyfile(path, temporary), os.replace)


def delete_file(uri: str) -> None:
    """Delete one file, if it exists."""
    if is_s3(uri):
        s3.delete_object(uri)
        return
    persist(uri, lambda: Path(uri).unlink(missing_ok=True))


def delete_folder(uri: str) -> None:
    """Delete everything below a folder, if it exists; never a bucket or the root.

    Files written there meanwhile may stay.
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

    def rest() -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                shutil.rmtree(uri)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise

    persist(uri, rest)


def delete_unfinished(uris: Iterable[str], older_than_s: float = OLD_S) -> None:
    """Delete those of some local files that a killed writer has left beside what it was to become.

    Told by their names, which no other program gives, and by the time of their last change. Should
    one have a writer after all, that has slept for an hour, it finds its file gone and writes it
    once more. Faults are passed over: the files do no harm.
    """
    for uri in uris:
        if not is_s3(uri) and _TEMPORARY.fullmatch(os.path.basename(uri)):
            with contextlib.suppress(OSError):
                if time.time() - os.lstat(uri).st_mtime > older_than_s:
                    os.unlink(uri)


def _place(path: str, fill: Callable[[Path], object], publish: Callable[[Path, str], None]) -> None:
    """Fill a temporary file beside `path`, and publish it there once it is on the disk."""

    def attempt() -> None:
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

    persist(path, attempt)


def _link(temporary: Path, path: str) -> None:
    """Give a file its name, unless that is taken.

    A server may lose the reply to the first request and refuse the second: then there are two names
    all the same.
    """
    try:
        os.link(temporary, path)
    except OSError:
        if os.stat(temporary).st_nlink < 2:
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
        with contextlib.suppress(OSError):  # of a writer that could not write, which is told
            temporary.unlink(missing_ok=True)
