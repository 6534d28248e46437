"""No credential comes out of a job: not on the terminal, in a table, page, picture or Ray's logs.

Real commands against an S3 server, with credentials that are found again wherever they turn up. In
front of the server stands a proxy that refuses some objects as AWS does, quoting the session token.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embeddings import random_vectors, write_table
from PIL import Image
from shards import make_tar

from jobs import classify, duplicates, embed, index, search, segment
from pipeline import storage
from pipeline.demo import MODEL
from pipeline.storage.s3 import _client_of

ROOT = Path(__file__).parent.parent
SHARD = (ROOT / "pipeline/demo/shards/scenes-000000.tar").read_bytes()
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "CANARYsecretkey/7Qz+aa9",
    "AWS_SESSION_TOKEN": "CANARYsessiontoken//3fK+x8==",
    "HF_TOKEN": "hf_CANARYhubtokenW2vB6",
    "RAY_AUTH_TOKEN": "CANARYraytoken0123456789abcdef",
}
IN_URI = "CANARYinuri9Zt4"
FORMS = {
    form
    for secret in [*SECRETS.values(), IN_URI]
    for form in (
        secret,
        quote(secret),
        quote(secret, safe=""),
        base64.b64encode(secret.encode()).decode(),
    )
}


class Refusing(BaseHTTPRequestHandler):
    """Hands requests on to the S3 server, but refuses whatever has `refused` in its path."""

    behind: ClassVar[str] = ""
    tokens: ClassVar[set[str]] = set()
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("x-amz-security-token", "")
        self.tokens.add(token)
        if "refused" in self.path:
            quoted = f"Bad token {token} {self.headers.get('Authorization', '')}"
            text = f"<Error><Code>InvalidToken</Code><Message>{quoted}</Message>"
            self.answer(400, {}, f"{text}<Token-0>{token}</Token-0></Error>".encode())
            return
        connection = http.client.HTTPConnection(self.behind)
        connection.request(self.command, self.path, body, dict(self.headers))
        found = connection.getresponse()
        self.answer(found.status, dict(found.getheaders()), found.read())
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        kept = {
            k: v for k, v in headers.items() if k.lower() not in ("transfer-encoding", "connection")
        }
        for name, value in ({"Content-Length": str(len(body))} | kept).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def endpoint(s3: Any) -> Iterator[str]:
    """The address of the proxy."""
    Refusing.behind = urlsplit(s3.meta.endpoint_url).netloc
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs; its sockets lie there too, so the path must be short."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


# One after the other in one process, and so with one Ray.
_RUN = """
import json, sys
from jobs.__main__ import main
codes = []
for sys.argv[1:] in json.loads(sys.argv[1]):
    codes.append(main())
print("exit codes", codes)
"""


def run(endpoint: str, ray_folder: Path, *commands: tuple[str, ...], **variables: str) -> str:
    """All that these commands say with the secrets in their environment, their exit codes last."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {**SECRETS, "AWS_ENDPOINT_URL": endpoint, "RAY_TMPDIR": str(ray_folder), **variables}
    command = [sys.executable, "-W", "ignore", "-c", _RUN, json.dumps(commands)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.stdout.decode()


def leaks(text: str | bytes) -> list[str]:
    data = text if isinstance(text, bytes) else text.encode()
    return [form for form in FORMS if form.encode() in data]


def leaks_of_folder(folder: Path) -> dict[str, list[str]]:
    """What each file gives away: its bytes, and what is compressed in them."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        texts: list[str | bytes] = [path.read_bytes()]
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            texts += [repr(table.to_pylist()), repr(table.schema.metadata)]
        elif path.suffix == ".png":
            texts.append(repr(Image.open(path).info))
        if names := [form for text in texts for form in leaks(text)]:
            found[str(path)] = names
    return found


def download(uri: str, folder: Path) -> None:
    for i, file in enumerate(storage.list_files(uri)):
        path = folder / f"{i}-{file.uri.rpartition('/')[2]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(storage.read_bytes(file.uri))


def test_jobs_as_a_whole(endpoint: str, bucket: str, ray_folder: Path, tmp_path: Path) -> None:
    """With a shard that breaks off and one without images: errors have a detail.

    Of the last job the listing shows the shard; who reads it is refused, and Ray logs the error.
    """
    storage.write_bytes(f"{bucket}/in/00000.tar", SHARD)
    storage.write_bytes(f"{bucket}/in/00001.tar", SHARD[:70_000])
    storage.write_bytes(f"{bucket}/in/00002.tar", make_tar([("a.jpg", b"not an image")]))
    model, sheet = ("--model", str(MODEL)), tmp_path / "out/sheet.png"
    page, table = tmp_path / "out/found.html", tmp_path / "out/found.parquet"
    source, masks = f"{bucket}/in", f"{bucket}/masks"
    more = ("--keep-probabilities", "88", "--embed", "--contact-sheet", str(sheet))
    files = ("--gallery", str(page), "--output", str(table))
    storage.write_bytes(f"{bucket}/no/refused.tar", SHARD)
    Refusing.tokens.clear()
    said = run(
        endpoint,
        ray_folder,
        ("segment", source, masks, "--prompt", "star", *model, *more),
        ("search", masks, "--text", "red", *model, *files),
        ("embed", f"{bucket}/no", str(tmp_path / "out" / "no"), *model),
    )
    assert "exit codes [0, 0, 1]" in said
    assert "access denied" in said
    assert {SECRETS["AWS_SESSION_TOKEN"]} == Refusing.tokens
    assert not leaks(said)
    download(masks, tmp_path / "out" / "masks")
    assert sheet.exists() and page.exists() and len(list((tmp_path / "out").rglob("*.parquet"))) > 8
    assert not leaks_of_folder(tmp_path / "out")
    assert len(list(ray_folder.rglob("*.log"))) > 5
    assert not leaks_of_folder(ray_folder)


@pytest.mark.parametrize(
    ("source", "output", "model"),
    [
        ("s3://no-such-bucket-here/in", "{local}", str(MODEL)),
        ("{bucket}/refused", "{local}", str(MODEL)),
        ("{bucket}/in", "{bucket}/refused", str(MODEL)),
        ("{bucket}/in", "{local}", "{bucket}/no-model"),
        ("{bucket}/in", "{local}", "{bucket}/refused"),
        (f"s3://KEY:{IN_URI}@bucket/in", "{local}", str(MODEL)),
        ("{bucket}/in", f"s3://KEY:{IN_URI}@bucket/out", str(MODEL)),
        ("{bucket}/in", "{local}", f"s3://KEY:{IN_URI}@bucket/model"),
        (f"https://user:{IN_URI}@host/in", "{local}", str(MODEL)),
    ],
)
@pytest.mark.usefixtures("fresh_client")
def test_jobs_that_fail(
    source: str,
    output: str,
    model: str,
    endpoint: str,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before Ray starts, so that they need no process of their own."""
    storage.write_bytes(f"{bucket}/in/00000.tar", SHARD)
    _client_of.cache_clear()
    for name, value in {**SECRETS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    names = {"bucket": bucket, "local": str(tmp_path / "out")}
    source, output, model = (text.format(**names) for text in (source, output, model))
    code = embed.main([source, output, "--model", model, "--quiet"])
    said = "".join(capfd.readouterr())
    assert code in (1, 2), said
    assert said.startswith("clipseg-ray embed: error: ")
    assert "Traceback" not in said
    assert not leaks(said)
    assert not leaks_of_folder(tmp_path)


SECRET_URI = f"s3://KEY:{IN_URI}@bucket/file"


@pytest.mark.parametrize(
    ("job", "options", "named"),
    [
        (segment, ("{in}", "{out}", "--prompt", "x", "--contact-sheet"), "--contact-sheet"),
        (segment, ("{in}", "{out}", "--prompts"), "--prompts"),
        (classify, ("{in}", "{out}", "--model", str(MODEL), "--labels"), "--labels"),
        (search, ("{table}", "--queries"), "--queries"),
        (search, ("{gone}", "--text", "x", "--output"), "--output"),
        (search, ("{gone}", "--text", "x", "--gallery"), "--gallery"),
        (search, ("{gone}", "--image"), "--image"),
        (duplicates, ("{gone}", "--output"), "--output"),
        (index, ("{gone}",), "DEST"),
    ],
)
@pytest.mark.parametrize("secret", [SECRET_URI, f"https://user:{IN_URI}@host/file"])
def test_files_named_with_a_secret_are_refused_at_once(
    job: Any,
    options: tuple[str, ...],
    named: str,
    secret: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    storage.write_bytes(f"{tmp_path}/in/00000.tar", SHARD)
    write_table(f"{tmp_path}/table", random_vectors(9))
    names = {name: str(tmp_path / name) for name in ("in", "out", "table", "gone")}
    assert job.main([*(option.format(**names) for option in options), secret]) == 2
    said = "".join(capfd.readouterr())
    assert f"error: {named}: " in said
    assert said.count("\n") == 1
    assert not leaks(said)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses(endpoint: str, bucket: str, ray_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    storage.write_bytes(f"{bucket}/in/00000.tar", SHARD)
    named = endpoint.replace("://", f"://user:{IN_URI}@")
    hub = {"HF_ENDPOINT": f"{named}/refused", "HF_HOME": str(tmp_path / "hub")}
    arguments = (f"{bucket}/in", str(tmp_path / "out"), "--model", "org/no-such-model")
    said = run(endpoint, ray_folder, ("embed", *arguments), **hub)
    assert re.search(r"exit codes \[[12]\]", said), said
    assert "Traceback" not in said
    assert not leaks(said)
    assert not leaks_of_folder(tmp_path)


def test_a_leak_is_found(tmp_path: Path) -> None:
    """What the tests above rest on, for each form and wherever it is compressed."""
    assert all(leaks(f"said {secret} aloud") for secret in SECRETS.values())
    for name, secret in SECRETS.items():
        table = pa.table({"detail": [secret]}).replace_schema_metadata({"note": secret})
        pq.write_table(table, tmp_path / f"{name}.parquet", compression="zstd")
        (tmp_path / f"{name}.json").write_text(
            f'{{"url": "http://host/?{quote(secret, safe="")}"}}'
        )
    assert len(leaks_of_folder(tmp_path)) == 2 * len(SECRETS)
