"""`ray job submit` as cluster.yaml has it, on a head of one machine with dashboard and token.

Needs the extra `cluster`, which the others of our tests would only start slower with.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest

from pipeline.demo import SHARDS

pytest.importorskip("opencensus", reason="pip install -e '.[cluster]' for ray job submit")
pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LIMIT_S = 300


class Head(NamedTuple):
    """A running head."""

    dashboard: str
    home: Path
    """Holds .ray/auth_token."""


def environment(home: Path, *, mode: str) -> dict[str, str]:
    """Of a machine of the cluster, of its client, or of a stranger; all have this code."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    own = {"PATH": f"{BIN}{os.pathsep}{kept['PATH']}", "PYTHONPATH": path}
    return {**kept, **own, "HOME": str(home), "RAY_AUTH_MODE": mode, "RAY_USAGE_STATS_ENABLED": "0"}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    some = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in some]
    for each in some:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    dashboard, client, agent = free_ports(3)
    options = {
        "port": 0,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "temp-dir": tempfile.mkdtemp(dir="/tmp"),  # paths of sockets are short
    }
    command = ["ray", "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment(folder, mode="token"),
            cwd=folder,
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        ends = time.monotonic() + LIMIT_S
        while not is_listening(dashboard):
            assert process.poll() is None and time.monotonic() < ends, (folder / "log").read_text()
            time.sleep(0.2)  # nothing tells when it is there
        yield Head(f"http://127.0.0.1:{dashboard}", folder)
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        shutil.rmtree(str(options["temp-dir"]), ignore_errors=True)


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def submit(head: Head, output: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The line of cluster.yaml, with this address, input and output, and the bundled model."""
    page = (ROOT / "cluster.yaml").read_text()
    (line,) = re.findall(r"^# +(ray job submit .*)$", page, re.MULTILINE)
    address, source, target = "http://localhost:8265", str(SHARDS), str(output)
    assert address in line and line.count("s3://...") == 2
    line = line.replace(address, head.dashboard)
    line = line.replace("s3://...", source, 1).replace("s3://...", target, 1)
    words = [*shlex.split(line), "--model", "demo"]
    return subprocess.run(
        words,
        env=env,
        cwd=output.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


def test_a_job_is_submitted_with_a_token_and_without_one_refused(
    head: Head, tmp_path: Path
) -> None:
    for mode in ("disabled", "token"):  # of who has none, of who has another
        stranger = tmp_path / mode
        (stranger / ".ray").mkdir(parents=True)
        if mode == "token":
            (stranger / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        refused = submit(head, tmp_path / "none", environment(stranger, mode=mode))
        assert refused.returncode != 0
        assert not (tmp_path / "none").exists()
    done = submit(head, tmp_path / "masks", environment(head.home, mode="token"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "72 images in 2 shards: 72 done, 0 failed" in done.stdout + done.stderr
    assert (tmp_path / "masks" / "_SUCCESS").exists()
    parts = (tmp_path / "masks" / "masks").glob("*.parquet")
    assert sum(pq.read_table(part).num_rows for part in parts) == 72
