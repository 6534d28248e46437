"""A folder for unfinished files of an export; what killed exports left is swept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

_PREFIX = "clipseg-ray-export-"
_LOCK = "lock"


class TemporaryFolder:
    """A new folder below TMPDIR, locked as long as this process lives.

    Those of dead exports of this user are deleted first. A folder without a lock file is still
    being made by another process, and stays.
    """

    def __init__(self) -> None:
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            _sweep(path)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path / "new", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(self.path / "new", self.path / _LOCK)

    def cleanup(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(path: Path) -> None:
    """Delete a folder if nobody holds its lock."""
    with contextlib.suppress(OSError):  # of another user, locked, or gone meanwhile
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        finally:
            os.close(lock)
