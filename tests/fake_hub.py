"""A model hub on loopback: the few answers of the hub's HTTP API that a download needs."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit


class FakeHub(BaseHTTPRequestHandler):
    """Serves the folders given to `publish`; `asked` holds the path of every request."""

    published: ClassVar[dict[tuple[str, str], tuple[str, Path]]] = {}
    asked: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    @classmethod
    def publish(cls, repo: str, folder: Path, revision: str = "main") -> str:
        """Makes a folder known as this revision of the repository; returns its commit."""
        commit = hashlib.sha1(f"{repo} {folder}".encode()).hexdigest()
        cls.published[repo, revision] = cls.published[repo, commit] = commit, folder
        return commit

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self._answer_api(*api.groups())
        elif file and (found := self._find(file[1], file[2])):
            data = (found[1] / file[3]).read_bytes()
            self._answer(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": found[0]})

    do_HEAD = do_GET  # noqa: N815 (the name that http.server looks for)

    def _answer_api(self, repo: str, what: str, revision: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        commit, folder = found
        files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
        value: Any = {"id": repo, "sha": commit, "tags": []}
        if what == "revision":
            value["siblings"] = [{"rfilename": name} for name in files]
        else:
            sizes = {name: (f.stat().st_size, _oid(f.read_bytes())) for name, f in files.items()}
            value = [
                {"type": "file", "path": name, "size": size, "oid": oid}
                for name, (size, oid) in sizes.items()
            ]
        self._answer(200, json.dumps(value).encode(), {})

    def _find(self, repo: str, revision: str) -> tuple[str, Path] | None:
        found = self.published.get((repo, revision))
        if found is None:
            known = repo in {name for name, _ in self.published}
            code = "RevisionNotFound" if known else "RepoNotFound"
            status, code = {
                "org/gated": (403, "GatedRepo"),
                "org/refused": (401, "ByAnyProxy"),
            }.get(repo, (404, code))
            self._answer(status, b"{}", {"X-Error-Code": code})
        return found

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
