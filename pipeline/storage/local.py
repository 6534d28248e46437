"""Local files: walked, matched and opened; a version is size, time and change of a file."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import stat
from collections.abc import Iterator
from typing import Any

from pipeline.errors import ChangedError
from pipeline.storage.retry import persist
from pipeline.storage.uri import FileInfo

SPECIAL = "special"  # the version of what is neither a file nor a folder


def glob_local(pattern: str) -> Iterator[FileInfo | str]:
    """Files, and the paths of folders."""
    for path in glob.glob(pattern, recursive=True):
        if os.path.isdir(path):
            yield path.rstrip("/")
        elif os.path.isfile(path):
            yield stored_local(path, os.stat(path))
        elif os.path.lexists(path):
            broken = not os.path.exists(path)
            yield FileInfo(uri=path, size_bytes=0, version="" if broken else SPECIAL)


def walk_local(folder: str, recursive: bool) -> Iterator[FileInfo]:
    """The files below a folder, pipes and broken links among them."""
    for entry in scan_local(folder, recursive):
        try:
            found = entry.stat()
        except OSError:  # gone, or a link to nowhere: it keeps its place, for reading to report
            yield FileInfo(uri=entry.path, size_bytes=0, version="")
            continue
        if stat.S_ISREG(found.st_mode):
            yield stored_local(entry.path, found)
        elif not stat.S_ISDIR(found.st_mode):
            yield FileInfo(uri=entry.path, size_bytes=0, version=SPECIAL)


def scan_local(
    folder: str, recursive: bool, above: tuple[str, ...] = (), linked: bool = False
) -> Iterator[os.DirEntry[str]]:
    """The entries below a folder that are no folders; without a look at any of them.

    Links are followed, but not to one of the folders `above`.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_folder(entry):
                yield entry
            elif recursive:
                behind_link = linked or entry.is_symlink()  # and so perhaps above itself
                if not (behind_link and _is_one_of(entry, (*above, folder))):
                    yield from scan_local(entry.path, recursive, (*above, folder), behind_link)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is, or a link leads to, a folder; a link in a circle leads nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_one_of(entry: os.DirEntry[str], folders: tuple[str, ...]) -> bool:
    with contextlib.suppress(OSError):
        return any(os.path.samestat(entry.stat(), os.stat(folder)) for folder in folders)
    return True  # gone


def stored_local(path: str, found: os.stat_result) -> FileInfo:
    return FileInfo(uri=path, size_bytes=found.st_size, version=local_version(found))


def local_version(found: os.stat_result) -> str:
    """Size and two times: mtime can be set back by anybody, ctime by nobody.

    No inode: some network file systems number their files anew.
    """
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def open_regular(path: str) -> io.FileIO:
    """A regular file; for a pipe in its place nobody waits."""
    file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(path)
    return file


class LocalFile(io.RawIOBase):
    """A local file with StorageErrors for its faults, and for a change underneath."""

    def __init__(self, path: str, file: io.FileIO):
        self._path, self._file = path, file
        self.version = self._version()

    def _version(self) -> str:
        return local_version(os.fstat(self.fileno()))

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        def attempt() -> int:
            try:
                count, version = self._file.readinto(buffer), self._version()
            except OSError:
                self._reopen()
                raise
            if version != self.version:
                raise ChangedError(f"{self._path}: overwritten while it was being read")
            return count or 0

        return persist(self._path, attempt)

    def _reopen(self) -> None:
        """Open the file again at the same place: a handle of a lost mount stays stale."""
        with contextlib.suppress(OSError):
            file = open_regular(self._path)
            file.seek(self._file.tell())
            self._file.close()
            self._file = file

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            super().close()
