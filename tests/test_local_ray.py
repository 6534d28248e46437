"""The Ray that a job starts on this machine: who may use it."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.demo import SHARDS

_START = """
import os, sys, ray
from pipeline.run.session import ray_session
with ray_session():
    print(ray.get_runtime_context().gcs_address, flush=True)
    print(os.environ.get("RAY_AUTH_TOKEN", ""), flush=True)
    sys.stdin.read()
"""
_ASK = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
print("ran", ray.get(ray.remote(num_cpus=0)(lambda: 1).remote()))
"""


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Without Ray's variables, and with a home of its own: no token that lies about is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    tries = {"RAY_NUM_REDIS_GET_RETRIES": "3"}  # a client that is refused tries 20 times, for 20 s
    return {**kept, **tries, "HOME": str(home), **variables}


def ask(address: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Another process of this machine that wants to run code in that cluster."""
    command = [sys.executable, "-W", "ignore", "-c", _ASK, address]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_only_who_knows_the_token_can_run_code(tmp_path: Path) -> None:
    home, stranger = tmp_path / "home", tmp_path / "stranger"
    home.mkdir()
    stranger.mkdir()
    job = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _START],
        env=environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdin is not None
    assert job.stdout is not None
    try:
        address, token = job.stdout.readline().strip(), job.stdout.readline().strip()
        assert len(token) == 64
        mode = {"RAY_AUTH_MODE": "token"}
        tokens = ({}, mode | {"RAY_AUTH_TOKEN": "0" * 64}, mode | {"RAY_AUTH_TOKEN": token})
        with ThreadPoolExecutor() as pool:
            asked = pool.map(lambda t: ask(address, environment(stranger, **t)), tokens)
            without, wrong, right = asked
    finally:
        job.stdin.close()
        job.wait(300)
    assert "ran 1" in right.stdout, right.stderr
    for refused in (without, wrong):
        assert refused.returncode != 0
        assert "ran" not in refused.stdout
    assert not list(home.rglob("auth_token"))


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.run.session import _require_token

    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    _require_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.soak
def test_on_a_terminal_nothing_of_rays_own_is_seen(tmp_path: Path) -> None:
    """Its C++ writes past Python, also while a phase is drawn."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "jobs", "segment", SHARDS, tmp_path / "out"]
    job = subprocess.Popen(
        [*command, "--model", "demo", "--prompt", "star"],
        env=environment(tmp_path),
        stdin=end,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    said = b""
    with contextlib.suppress(OSError):  # EIO, as the last who had it open is gone
        while some := os.read(terminal, 65536):
            said += some
    assert job.wait(300) == 0
    assert b"72 images in 2 shards: 72 done" in said
    assert b"starting Ray, loading the model" in said
    assert b".cc:" not in said and b"WARNING" not in said
