"""Weights that are damaged, or made to harm, are refused by file name and run nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_json, empty_clipseg, save, save_bin, small_clipseg, write_bin
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError
from pipeline.model.weights import load_weights, read_shapes
from pipeline.storage.documents import read_json


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small_clipseg(), tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="session")
def good_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small_clipseg(), tmp_path_factory.mktemp("good"), max_shard_size="30KB")


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to damage."""
    return Path(shutil.copytree(good, tmp_path / "broken"))


@pytest.fixture
def broken_shards(good_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_shards, tmp_path / "broken"))


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    return save_bin(small_clipseg(), tmp_path / "pickled")


def long_header(length: int) -> bytes:
    return length.to_bytes(8, "little") + b"{}"


DAMAGED = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "truncated header": lambda data: data[:100],
    "truncated data": lambda data: data[:-1],
    "appended": lambda data: data + b"\0",
    "header of 2^63": lambda data: long_header(1 << 63),
    "header of 99 MB": lambda data: long_header(99_000_000) + bytes(1000),
    "header not json": lambda data: data[:8] + b"x" + data[9:],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors(broken: Path, damage: str) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ") as caught:
        load_weights(empty_clipseg(), broken)
    assert len(str(caught.value).splitlines()) == 1


def test_safetensors_without_tensors(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(long_header(2))
    with pytest.raises(CheckpointError, match=r"is missing.*more"):
        load_weights(empty_clipseg(), broken)


HOSTILE_PLACES = [
    "../single/model.safetensors",
    "/etc/passwd",
    "sub/model-1.safetensors",
    "..",
    "",
    ".hidden.safetensors",
    "model-1.bin",
    "model\0.safetensors",
    "model-1.safetensors\n",
    7,
    None,
    ["a"],
]


@pytest.mark.parametrize("place", HOSTILE_PLACES)
def test_index_with_strange_file_names(broken_shards: Path, place: Any) -> None:
    path = broken_shards / "model.safetensors.index.json"
    change_json(path, lambda index: index["weight_map"].update({"clip.logit_scale": place}))
    with pytest.raises(CheckpointError, match=r"index\.json: names the file"):
        read_shapes(broken_shards)


def test_index_at_odds_with_its_shards(broken_shards: Path) -> None:
    path = broken_shards / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    name, shard = next(iter(places.items()))
    other = next(place for place in places.values() if place != shard)
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda index: index["weight_map"].update({name: other}), re.escape(name)),
        (lambda index: index["weight_map"].pop(name), re.escape(name)),
        (lambda index: index["weight_map"].update({"made.up": shard}), r"made\.up"),
        (lambda index: index["weight_map"].update({name: "gone.safetensors"}), "no such file"),
        (lambda index: index.update(weight_map=[]), "no weight_map"),
        (lambda index: index.clear(), "no weight_map"),
    ]
    original = path.read_text()
    for change, message in changes:
        path.write_text(original)
        change_json(path, change)
        with pytest.raises(CheckpointError, match=message):
            read_shapes(broken_shards)


def test_tensor_in_two_shards(broken_shards: Path) -> None:
    first, second = sorted(broken_shards.glob("model-*.safetensors"))[:2]
    doubled = load_file(first)
    save_file(load_file(second) | {next(iter(doubled)): next(iter(doubled.values()))}, second)
    with pytest.raises(CheckpointError, match=second.name):
        read_shapes(broken_shards)


def test_json_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    for content in ("", "[]", "{", '{"a": 1, "a": 2}', "[" * 10**5, '{"a": %s}' % ("9" * 5000)):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"x\.json"):
            read_json(path)
    path.write_text('{"a": "%s"}' % ("x" * 100))
    with pytest.raises(CheckpointError, match="larger than 50 bytes"):
        read_json(path, limit_bytes=50)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "none.json")


class Trap:
    """A pickle of this runs a command when it is loaded without restriction."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_do_not_run(broken: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    trap = {"clip.logit_scale": Trap(mark)}
    write_bin(broken, trap, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: (not weights|in the format)"
    ) as caught:
        load_weights(empty_clipseg(), broken)
    assert len(str(caught.value).splitlines()) == 1
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(trap))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not weights"):
        load_weights(empty_clipseg(), broken)
    assert not mark.exists()


NOT_WEIGHTS = {
    "list": ([torch.zeros(1)], "must hold tensors by name"),
    "numbers": ({1: torch.zeros(1)}, "must hold tensors by name"),
    "nested": ({"state_dict": {"a": torch.zeros(1)}}, "save its `state_dict` alone"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "a is not a plain tensor"),
    "meta": ({"a": torch.zeros(3, device="meta")}, "a is not a plain tensor"),
    "repeated": ({"a": torch.zeros(1).expand(10**6, 10**6)}, "more than it has"),
}


@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_bin_that_holds_no_weights(tmp_path: Path, case: str) -> None:
    value, message = NOT_WEIGHTS[case]
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{message}"):
        read_shapes(write_bin(tmp_path, value))


def test_damaged_bin(pickled: Path, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    data = (pickled / "pytorch_model.bin").read_bytes()
    for content in (b"", data[:1000], data[:-1000], b"\x80\x02}q\x00.", b"text"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not weights"):
            read_shapes(tmp_path)
    source = zipfile.ZipFile(pickled / "pytorch_model.bin")
    with source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_shapes(tmp_path)


def test_bin_needs_a_torch_that_reads_it_safely(
    pickled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match=r"needs torch 2\.10, not 2\.9\.1"):
        read_shapes(pickled)
