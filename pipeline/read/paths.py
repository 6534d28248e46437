"""Files named by the cells of a Parquet file: read from inside the input alone.

A path is anybody's. It is exact, absolute or relative to the Parquet file, and read only if it
leads to a regular file inside the input, past all links.
"""

from __future__ import annotations

import errno
import os
import stat

from pipeline import storage
from pipeline.errors import NotFoundError, RowError
from pipeline.read.shard import IMAGE_LIMIT_BYTES, Shard
from pipeline.storage.uri import prefix_of

_PATH_BYTES = 1024  # the longest key of S3
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class PathReader:
    """The bytes of a file by its path in a cell; picklable, and called from threads."""

    def __init__(self, shard: Shard):
        self._folder = storage.parent(shard.uri)
        root = shard.inside or self._folder
        self._root = prefix_of(root if storage.is_s3(root) else os.path.realpath(root))

    def __call__(self, path: str) -> bytes:
        """At most IMAGE_LIMIT_BYTES and one byte more.

        Raises RowError (no_image) for what is not there or outside the input, and StorageError.
        """
        shown = path[:200]
        if len(path.encode()) > _PATH_BYTES or "\0" in path:
            raise RowError("read", "no_image", f"only a path, which cannot be one: {shown}")
        absolute = path.startswith("s3://")
        uri = path if absolute else self._resolve(path, shown)
        if not uri.startswith(self._root):
            detail = f"only a path, which leads out of the input: {shown}"
            raise RowError("read", "no_image", detail)
        try:
            return storage.read_bytes(uri, limit_bytes=IMAGE_LIMIT_BYTES + 1)
        except NotFoundError as error:
            detail = f"only a path, at which no file is: {shown}"
            raise RowError("read", "no_image", detail) from error

    def _resolve(self, path: str, shown: str) -> str:
        """The URI of a file; a local one past all links, if it is a regular file."""
        if storage.is_s3(self._folder):
            return storage.join(self._folder, path)
        real = os.path.realpath(os.path.join(self._folder, path))
        if not real.startswith(self._root):
            return real  # to be refused
        try:
            if stat.S_ISREG(os.stat(real).st_mode):
                return real
        except OSError as error:
            if error.errno not in _NO_FILE:
                return real  # for reading to report
        raise RowError("read", "no_image", f"only a path, at which no file is: {shown}")
