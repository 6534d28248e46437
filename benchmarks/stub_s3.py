"""S3 as far as the pipeline uses it, in memory, with a pause before every answer; requests counted.

    with StubS3(pause_s=0.03) as s3:       # in a thread of this process
        s3.put("bucket/key", b"...")
        ...                                # AWS_ENDPOINT_URL=s3.endpoint
        s3.counts                          # Counter({"ListObjectsV2": 12, ...})

For what a real server takes too long for: a million objects, and requests that take as long as they
do in a data centre. No uploads in parts, no signatures are checked; path-style addresses.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import hashlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

PAGE_KEYS = 1000
_DATE = "Wed, 25 Nov 2026 12:00:00 GMT"


@dataclass
class StubS3:
    """See the module. Objects are named "bucket/key"."""

    pause_s: float = 0.03
    counts: Counter[str] = field(default_factory=Counter)
    """Requests by S3's name for them."""
    _keys: list[str] = field(default_factory=list)
    _objects: dict[str, bytes] = field(default_factory=dict)
    _is_sorted: bool = True

    def __enter__(self) -> StubS3:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    def put(self, name: str, data: bytes = b"") -> None:
        """Store an object."""
        if name not in self._objects:
            self._keys.append(name)
            self._is_sorted = False
        self._objects[name] = data

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        )
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                method, target, _ = line.decode().split(" ", 2)
                headers = {}
                while (header := await reader.readline()) not in (b"\r\n", b""):
                    name, _, value = header.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                if headers.get("expect"):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await asyncio.sleep(self.pause_s)
                writer.write(self._answer(method, target, headers, body))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended first
                writer.close()

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
        parts = urlsplit(target)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if not key and method == "GET":
            self.counts["ListObjectsV2"] += 1
            return _reply(200, self._list(bucket, query), kind="application/xml")
        if not key and method == "POST":
            self.counts["DeleteObjects"] += 1
            found = ElementTree.fromstring(body).iter()
            for element in found:
                if element.tag.endswith("Key"):
                    self._delete(f"{bucket}/{element.text}")
            return _reply(200, b"<DeleteResult></DeleteResult>", kind="application/xml")
        name = f"{bucket}/{key}"
        self.counts[f"{method.title()}{'Object' if key else 'Bucket'}"] += 1
        stored = self._objects.get(name)
        if method == "PUT":
            if headers.get("if-none-match") == "*" and stored is not None:
                return _error(412, "PreconditionFailed")
            wanted = headers.get("if-match")
            if wanted and (stored is None or wanted.strip('"') != _etag(stored)):
                return _error(412, "PreconditionFailed")
            self.put(name, _unchunked(body, headers))
            return _reply(200, b"", etag=_etag(self._objects[name]))
        if method == "DELETE":
            self._delete(name)
            return _reply(204, b"")
        if stored is None:
            return _error(404, "NoSuchKey", empty=method == "HEAD")
        if method == "HEAD":
            return _reply(200, b"", length=len(stored), etag=_etag(stored))
        return _get(stored, headers)

    def _delete(self, name: str) -> None:
        if self._objects.pop(name, None) is not None:
            self._sort()
            del self._keys[bisect.bisect_left(self._keys, name)]

    def _sort(self) -> None:
        if not self._is_sorted:
            self._keys.sort()
            self._is_sorted = True

    def _list(self, bucket: str, query: dict[str, str]) -> bytes:
        self._sort()
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after") or ""
        start = f"{bucket}/{prefix}"
        index = bisect.bisect_left(self._keys, start)
        if after:
            index = max(index, bisect.bisect_right(self._keys, f"{bucket}/{after}"))
        count = int(query.get("max-keys", PAGE_KEYS))
        found: list[str] = []
        folders: list[str] = []
        last, truncated = after, False
        while index < len(self._keys) and self._keys[index].startswith(start):
            if len(found) + len(folders) == count:
                truncated = True
                break
            name = self._keys[index]
            key = name[len(bucket) + 1 :]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut >= 0:
                folder = key[: cut + 1]
                if folder > after or not folder.startswith(after):
                    folders.append(folder)
                last = folder + "\U0010ffff"
                index = bisect.bisect_right(self._keys, f"{bucket}/{last}")
                continue
            data = self._objects[name]
            found.append(
                f"<Contents><Key>{quote(key)}</Key><LastModified>2026-11-25T12:00:00.000Z"
                f"</LastModified><ETag>&quot;{_etag(data)}&quot;</ETag><Size>{len(data)}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
            last = key
            index += 1
        below = [f"<CommonPrefixes><Prefix>{quote(f)}</Prefix></CommonPrefixes>" for f in folders]
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>"
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix><MaxKeys>{count}</MaxKeys>"
            f"<EncodingType>url</EncodingType><KeyCount>{len(found) + len(below)}</KeyCount>"
            f"<IsTruncated>{str(truncated).lower()}</IsTruncated>{token if truncated else ''}"
            f"{''.join(found)}{''.join(below)}</ListBucketResult>"
        ).encode()


def _etag(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def _unchunked(body: bytes, headers: dict[str, str]) -> bytes:
    """The content of a body that was sent in chunks with a checksum behind them."""
    if "aws-chunked" not in headers.get("content-encoding", ""):
        return body
    data = b""
    while True:
        line, _, rest = body.partition(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if not size:
            return data
        data, body = data + rest[:size], rest[size + 2 :]


def _get(stored: bytes, headers: dict[str, str]) -> bytes:
    wanted = headers.get("if-match")
    if wanted and wanted.strip('"') != _etag(stored):
        return _error(412, "PreconditionFailed")
    given = headers.get("range", "")
    if not given:
        return _reply(200, stored, etag=_etag(stored))
    first, last = (int(n) for n in given.removeprefix("bytes=").split("-"))
    if first >= len(stored):
        return _error(416, "InvalidRange")
    piece = stored[first : last + 1]
    place = f"bytes {first}-{first + len(piece) - 1}/{len(stored)}"
    return _reply(206, piece, etag=_etag(stored), place=place)


def _error(status: int, code: str, *, empty: bool = False) -> bytes:
    body = "" if empty else f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return _reply(status, body.encode(), kind="application/xml")


def _reply(status: int, body: bytes, *, length: int | None = None, **more: Any) -> bytes:
    lines = [
        f"HTTP/1.1 {status} -",
        f"Date: {_DATE}",
        f"Last-Modified: {_DATE}",
        f"Content-Length: {len(body) if length is None else length}",
    ]
    if "kind" in more:
        lines.append(f"Content-Type: {more['kind']}")
    if "etag" in more:
        lines.append(f'ETag: "{more["etag"]}"')
    if "place" in more:
        lines.append(f"Content-Range: {more['place']}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
