"""A second of every fuzz target; `python -m tests.fuzz` runs them for longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz import TARGETS, fuzz, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_a_second_of_fuzzing(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where an input that fails is left
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"python -m tests.fuzz {target} 10 --seed {seed}")
    for data in seeds(target):
        TARGETS[target](data)
    assert fuzz(target, 1, seed) > 20
