"""The folder of an export: claimed for it, small files side by side, large ones by and by.

DEST/_export.json     what was asked for, and whether all of it is there
DEST/_images.parquet  for each image its file name, split, shard, row, key and member
"""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pipeline import storage
from pipeline.annotations.temporary import TemporaryFolder
from pipeline.errors import JobError, NotFoundError, UsageError

MARKER = "_export.json"

_AT_ONCE = 16  # files that are written: hides the latency of a request
_PENDING_BYTES = 256 * 2**20  # of files that wait


class Destination:
    """Writes files below a folder; use it in a `with` block.

    A file appears whole. The marker is written first, and again by `finish`: a folder without
    {"status": "complete"} in it is a stopped export.
    """

    def __init__(self, folder: str, asked: dict[str, Any]):
        """`asked`: what decides the files. Raises UsageError for a folder with files other than
        those of the same export, not yet complete."""
        self.folder = storage.check_uri(folder)
        self._asked = asked
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._pending_bytes = 0
        self._streams: dict[str, TextIO] = {}
        self._made = 0
        _refuse_other_files(self.folder, asked)
        self._mark({"status": "running"})
        self._temporary = TemporaryFolder()

    def __enter__(self) -> Destination:
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams.values():
            stream.close()
        self._pool.shutdown(cancel_futures=True)
        self._temporary.cleanup()

    def put(self, name: str, data: bytes) -> None:
        """Write a file in the background; its error is raised by a later call."""
        uri = storage.join(self.folder, name)
        self._pending.append((len(data), self._pool.submit(storage.write_bytes, uri, data)))
        self._pending_bytes += len(data)
        while len(self._pending) > 2 * _AT_ONCE or self._pending_bytes > _PENDING_BYTES:
            self._await_first()

    def stream(self, name: str) -> TextIO:
        """A text file to be written by and by; always the same one for a name."""
        if name not in self._streams:
            self._made += 1
            path = self.local_path(f"{self._made}.part")
            self._streams[name] = path.open("w", encoding="utf-8", newline="\n")
        return self._streams[name]

    def publish(self, name: str) -> None:
        """End a stream and make it a file of the export."""
        stream = self._streams.pop(name)
        stream.close()
        self.publish_path(name, Path(stream.name))

    def discard(self, name: str) -> None:
        """End a temporary stream without publishing it."""
        stream = self._streams.pop(name)
        stream.close()
        Path(stream.name).unlink()

    def publish_path(self, name: str, path: Path) -> None:
        """Make a finished local file one of the export, and delete it."""
        storage.put_file(path, storage.join(self.folder, name))
        path.unlink()

    def local_path(self, name: str) -> Path:
        """Path of a local file to write for publish_path."""
        return self._temporary.path / name

    def finish(self, counts: dict[str, Any]) -> None:
        """Wait for all files, and mark the export as complete. Raises StorageError."""
        while self._pending:
            self._await_first()
        if self._streams:
            raise JobError(f"{next(iter(self._streams))}: was not written to its end")
        self._mark({"status": "complete", **counts})

    def _await_first(self) -> None:
        size_bytes, done = self._pending.popleft()
        self._pending_bytes -= size_bytes
        done.result()

    def _mark(self, content: dict[str, Any]) -> None:
        text = json.dumps({**content, "asked": self._asked}, indent=1) + "\n"
        storage.write_bytes(storage.join(self.folder, MARKER), text.encode())


class JsonEntries:
    """The entries of a JSON list, written one by one; its brackets are the caller's."""

    def __init__(self, stream: TextIO):
        self.stream, self.count = stream, 0

    def add(self, entry: Any) -> None:
        """Write one more entry."""
        self.stream.write(",\n" if self.count else "\n")
        self.stream.write(json.dumps(entry))
        self.count += 1


def read_finished(folder: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Facts given to `finish` for the export of `asked` in a folder; None if it is not done."""
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, MARKER)))
        same = (found.pop("status"), found.pop("asked")) == ("complete", _as_read(asked))
    except (NotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # _refuse_other_files says which
    return found if same else None


def _as_read(asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asked))
    return found


def _refuse_other_files(folder: str, asked: dict[str, Any]) -> None:
    try:
        found = json.loads(storage.read_bytes(storage.join(folder, MARKER)))
        status, before = found["status"], found["asked"]
    except NotFoundError as error:
        if not storage.is_empty(folder):
            message = f"{folder}: holds files that are not from an export; choose another folder"
            raise UsageError(message) from error
        return
    except (ValueError, KeyError, TypeError) as error:
        message = f"{folder}/{MARKER}: damaged; delete the folder or choose another"
        raise UsageError(message) from error
    if status == "complete":
        raise UsageError(
            f"{folder}: holds another export, finished; delete it or choose another folder"
        )
    if before != _as_read(asked):
        differs = [k for k in {**before, **asked} if before.get(k) != asked.get(k)]
        raise UsageError(
            f"{folder}: holds an unfinished export with other options ({', '.join(differs)}); "
            "delete it or choose another folder"
        )
