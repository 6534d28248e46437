"""RAY_ADDRESS where nobody listens, and where somebody does."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.demo import MODEL, SHARDS
from pipeline.errors import JobError
from pipeline.run.address import refuse_nobody


@pytest.fixture
def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_an_address_is_tried_before_ray_tries_it(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "local", "", "a name"):
        refuse_nobody(address)
    listening.close()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"[::1]:{port}"):
        with pytest.raises(
            JobError, match=r"^no Ray cluster at RAY_ADDRESS=.*; correct it, or unset"
        ):
            refuse_nobody(address)
    with pytest.raises(JobError, match=r"no Ray cluster at RAY_ADDRESS=nobody.invalid:1: "):
        refuse_nobody("nobody.invalid:1")
    with pytest.raises(JobError, match=r"RAY_ADDRESS=127.0.0.1:99999: "):
        refuse_nobody("127.0.0.1:99999")


def test_a_job_ends_in_one_line_without_waiting_for_ray(
    listening: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own attempt takes more than three minutes."""
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()
    monkeypatch.setenv("RAY_ADDRESS", address)
    command = [sys.executable, "-m", "jobs", "segment", SHARDS, tmp_path, "--prompt", "star"]
    done = subprocess.run(
        [*command, "--model", MODEL], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = f"clipseg-ray segment: error: no Ray cluster at RAY_ADDRESS={address}: "
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
