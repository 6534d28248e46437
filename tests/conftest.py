"""Fixtures shared by the tests: a real S3 server on loopback, and folders on either storage."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pipeline import storage
from tests.drivers import STEPS

# The same cases every time: a commit fails for what it changed. For new ones see CONTRIBUTING.md.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Says where it listens, and ends when its standard input does: also when the tests are killed.
_SERVE_S3 = """
import os, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def serve_s3() -> Iterator[Any]:
    """A boto3 client of a moto server; meanwhile the AWS environment points at it."""
    import boto3

    # A process of its own: it shares no lock with the tests, and its warnings are not theirs.
    # Listings come in pages of 50, so that a page's end is met.
    env = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "50"}
    command = [sys.executable, "-W", "ignore", "-c", _SERVE_S3]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    endpoint = server.stdout.readline().strip()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3")
        yield client
        client.close()
    server.stdin.close()
    server.stdout.close()
    server.wait(30)


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 server for the session: see serve_s3."""
    with serve_s3() as client:
        yield client


@pytest.fixture
def fresh_client(s3: Any) -> Iterator[None]:
    """The S3 client is made anew in the test, from the environment as the test leaves it."""
    from pipeline.storage.s3 import _client_of

    _client_of.cache_clear()
    yield
    _client_of.cache_clear()


@pytest.fixture(scope="session")
def local_ray(s3: Any) -> Iterator[None]:
    """One Ray for all tests; it starts after S3, whose endpoint its workers inherit."""
    import ray

    # Workers outlive the jobs of the tests, with what they have imported.
    os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "600000"  # noqa: SIM112
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, **options)
    yield
    ray.shutdown()


@pytest.fixture
def bucket(s3: Any) -> str:
    """A fresh bucket: "s3://name"."""
    name = f"test-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty folder, once on local disk and once on S3."""
    if request.param == "local":
        return str(tmp_path / "data")
    return f"{request.getfixturevalue('bucket')}/data"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[str], None]]:
    """A list whose function, if any, is called before and after every change of the storage."""
    hooks: list[Callable[[str], None]] = []

    def watch(name: str) -> None:
        change = getattr(storage, name)

        def watched(*args: Any) -> None:
            for hook in hooks:
                hook("before")
            change(*args)
            for hook in hooks:
                hook("after")

        monkeypatch.setattr(storage, name, watched)

    for name in STEPS:
        watch(name)
    return hooks
