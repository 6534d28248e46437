"""A proxy in front of an S3 server that goes wrong in the ways S3 and networks do, on request.

    with FaultProxy(server) as proxy:                     # server: "http://127.0.0.1:5000"
        proxy.add(Fault("slow_down", operation="GetObject", times=3))
        proxy.add(Fault("cut", key="data/*.tar", rate=0.05))
        ...                                               # AWS_ENDPOINT_URL=proxy.endpoint
        proxy.count("GetObject")                          # requests that arrived

The Host header passes unchanged, so signatures stay valid; addressing must be path-style, as it is
for endpoints that are IP addresses. Everything runs in threads of this process.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

# Answers that the proxy gives by itself, without asking the server: status, S3's error code.
ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "throttled": (429, "TooManyRequests"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "bad_signature": (403, "SignatureDoesNotMatch"),
    "missing": (404, "NoSuchKey"),
    "not_s3": (502, ""),  # a load balancer's HTML page
}
# What happens to the connection. `hang` and `reset` never reach the server, `lost_reply` does;
# `cut` ends the body early, `slow` sends it with a pause of `pause_s` between its eighths.
BREAKS = ("reset", "hang", "cut", "cut_reset", "slow", "lost_reply", "stuck_body")
# Harmful in passing only: a client that tries again ends with the right result.
PASSING = ("slow_down", "internal_error", "throttled", "not_s3", "reset", "cut", "cut_reset")


@dataclass
class Fault:
    """What goes wrong with the requests that match, in the order in which faults were added."""

    kind: str
    """A key of ANSWERS, one of BREAKS, "answer", or "pass": nothing but `first` happens."""
    operation: str = "*"
    """S3's name for it (see `Request.operation`), as a pattern."""
    key: str = "*"
    """Of the object, as a pattern."""
    times: int | None = 1
    """How many requests it hits; None is all."""
    skip: int = 0
    """How many matching requests it lets pass first."""
    rate: float = 1.0
    """The share of the matching requests that it hits, drawn with the proxy's seed."""
    pause_s: float = 0.0
    answer: tuple[int, str] = (200, "")
    """Status and body, for the kind "answer"."""
    first: Callable[[], Any] | None = None
    """Called before the request is dealt with: to overwrite or delete what is being read."""
    hits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert self.kind in {*ANSWERS, *BREAKS, "answer", "pass"}, self.kind


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    """time.monotonic() of its arrival."""

    @property
    def key(self) -> str:
        """Of the object; empty for a request to the bucket."""
        return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    @property
    def operation(self) -> str:
        """S3's name for the request, for those that the pipeline sends."""
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if not self.key:
            names = {"GET": "ListObjectsV2", "HEAD": "HeadBucket", "POST": "DeleteObjects"}
            return names.get(self.method, self.method)
        if "uploads" in query:
            return "CreateMultipartUpload"
        if "uploadId" in query:
            names = {"PUT": "UploadPart", "DELETE": "AbortMultipartUpload"}
            return names.get(self.method, "CompleteMultipartUpload")
        return f"{self.method.title()}Object"


class FaultProxy:
    """See the module. `requests` and `faults` may be looked at while it runs."""

    def __init__(self, server: str, *, seed: int = 0, without: tuple[str, ...] = ()):
        """`without` names headers that the server does not get to see, in lower case."""
        self._server = urlsplit(server).netloc
        self._without = {"expect", "connection", *without}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []

    def __enter__(self) -> FaultProxy:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, fault: Fault) -> Fault:
        """From now on; the first fault that matches a request is the one that happens."""
        with self._lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """No faults any more, and no requests so far."""
        with self._lock:
            self.faults, self.requests = [], []

    def count(self, operation: str = "*", key: str = "*") -> int:
        """How many requests arrived since `clear`."""
        with self._lock:
            return sum(_fits(request, operation, key) for request in self.requests)

    def _choose(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if not _fits(request, fault.operation, fault.key):
                    continue
                if fault.times is not None and fault.hits >= fault.times:
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.rate >= 1 or self._random.random() < fault.rate:
                    fault.hits += 1
                    return fault
        return None

    # ------------------------------------------------------------------- connections

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._sockets.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Requests on one connection until it ends."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = http.client.HTTPConnection(self._server)
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            contextlib.closing(server),
            connection.makefile("rb") as stream,
        ):
            while (request := self._receive(stream, connection)) is not None:
                if not self._deal_with(request, connection, server):
                    break
        with contextlib.suppress(OSError):
            connection.close()
        self._sockets.discard(connection)

    def _receive(self, stream: BinaryIO, connection: socket.socket) -> Request | None:
        words = stream.readline().split()
        if len(words) != 3:
            return None
        headers = dict(http.client.parse_headers(stream).items())  # type: ignore[arg-type]
        lower = {name.lower(): value for name, value in headers.items()}
        method, path = words[0].decode(), words[1].decode()
        length = int(lower.get("content-length", 0))
        if "expect" in lower:
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = stream.read(length) if length else b""
        return Request(method, path, lower, body, time.monotonic())

    def _deal_with(
        self, request: Request, connection: socket.socket, server: http.client.HTTPConnection
    ) -> bool:
        """Answer a request, rightly or wrongly; whether the connection goes on."""
        fault = self._choose(request)
        kind = fault.kind if fault else "pass"
        if fault and fault.first:
            fault.first()
        if kind == "hang":
            self._closing.wait()
            return False
        if kind == "reset":
            return _reset(connection)
        if kind in ANSWERS or (fault and kind == "answer"):
            status, body = _error(kind) if kind in ANSWERS else fault.answer
            connection.sendall(_answer(status, "" if request.method == "HEAD" else body))
            return True
        head, data = self._forward(request, server)
        if kind == "lost_reply":
            return _reset(connection)
        if fault and kind != "pass" and data:
            return self._send_badly(fault, connection, head, data)
        connection.sendall(head + data)
        return True

    def _send_badly(
        self, fault: Fault, connection: socket.socket, head: bytes, body: bytes
    ) -> bool:
        """A reply that breaks off in its middle, or takes its time."""
        if fault.kind == "slow":
            step = -(-len(body) // 8)
            connection.sendall(head)
            for start in range(0, len(body), step):
                time.sleep(fault.pause_s)
                connection.sendall(body[start : start + step])
            return True
        connection.sendall(head + body[: len(body) // 2])
        if fault.kind == "stuck_body":
            self._closing.wait()
        if fault.kind == "cut_reset":
            return _reset(connection)
        return False

    def _forward(self, request: Request, server: http.client.HTTPConnection) -> tuple[bytes, bytes]:
        """The server's reply: status line with headers, and body."""
        server.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name not in self._without:
                server.putheader(name, value)
        server.endheaders(request.body)
        reply = server.getresponse()
        body = reply.read()
        lines = [f"HTTP/1.1 {reply.status} {reply.reason}"]
        hop = ("connection", "transfer-encoding", "keep-alive")
        kept = [(n, v) for n, v in reply.getheaders() if n.lower() not in hop]
        if request.method != "HEAD" and reply.status != 204:
            kept = [(n, v) for n, v in kept if n.lower() != "content-length"]
            kept.append(("Content-Length", str(len(body))))
        lines += [f"{name}: {value}" for name, value in kept]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), body


def _fits(request: Request, operation: str, key: str) -> bool:
    return fnmatch.fnmatchcase(request.operation, operation) and fnmatch.fnmatchcase(
        request.key, key
    )


def _error(kind: str) -> tuple[int, str]:
    """An error as S3 words it."""
    status, code = ANSWERS[kind]
    xml = f"<Error><Code>{code}</Code><Message>as asked</Message></Error>"
    return status, xml if code else "<html>"


def _answer(status: int, body: str) -> bytes:
    return (
        f"HTTP/1.1 {status} as asked\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def _reset(connection: socket.socket) -> bool:
    """Send RST instead of an orderly end, also while the connection is open elsewhere as a file."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False
