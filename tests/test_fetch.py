"""Checkpoints from folders, a hub and S3 (both on loopback): what is needed, nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from checkpoints import change_tensors, save, save_bin, small_clipseg, write_vocabulary
from fake_hub import FakeHub

from pipeline.config import log
from pipeline.demo import MODEL
from pipeline.errors import CheckpointError
from pipeline.infer.fetch import fetch
from pipeline.model.weights import hash_weights


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(save(small_clipseg(), tmp_path_factory.mktemp("single")))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small_clipseg(), tmp_path_factory.mktemp("sharded"), max_shard_size="30KB")


@pytest.fixture(scope="session")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bin(small_clipseg(), tmp_path_factory.mktemp("pickled"))


@pytest.fixture
def changing(single: Path, tmp_path: Path) -> Path:
    """A copy of `single` to change."""
    return Path(shutil.copytree(single, tmp_path / "changing"))


def test_local_folder(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(str(single)) == fetch(single.as_uri()) == single
    monkeypatch.chdir(single.parent)
    assert fetch(single.name).samefile(single)
    assert fetch(f"./{single.name}/").samefile(single)
    monkeypatch.setenv("HOME", str(single.parent))
    assert fetch(f"~/{single.name}").samefile(single)


def test_demo_is_the_bundled_model_in_any_folder(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name is in nobody's way, unless it might be the model that was meant."""
    monkeypatch.chdir(tmp_path)
    assert fetch("demo") == MODEL
    Path("demo").mkdir()
    assert fetch("demo") == MODEL
    shutil.rmtree("demo")
    shutil.copytree(single, "demo")
    with pytest.raises(CheckpointError, match=r"write \./demo for the folder"):
        fetch("demo")
    assert fetch("./demo").samefile("demo")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./org/name", "no such folder"),
        ("../name", "no such folder"),
        ("/no/where", "no such folder"),
        ("~/no-where-at-all", "no such folder"),
        ("a/b/c", "no such folder"),
        ("org/", "no such folder"),
        ("org/na me", "no such folder"),
        ("clipseg", r"no such folder \(a model on the hub is named org/name\)"),
        ("", "empty string"),
        ("file:///no/where", "no such folder"),
        ("gs://bucket/x", r"gs:// is not supported"),
        ("s3://user:secret@bucket/x", "must not hold credentials"),
    ],
)
def test_wrong_names(model: str, message: str, no_hub: None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(model)
    assert "secret" not in str(caught.value)


def test_incomplete_folders(single: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        fetch(str(tmp_path))
    shutil.copy(single / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no weights"):
        fetch(str(tmp_path))
    with pytest.raises(CheckpointError, match="is a file"):
        fetch(str(tmp_path / "config.json"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return cache


@pytest.fixture
def no_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that nobody answers for: any request would be an error of another kind."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    FakeHub.published.clear()
    FakeHub.asked.clear()
    yield FakeHub
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def test_a_download_tells_how_far_it_is(hub: type[FakeHub], changing: Path) -> None:
    """In bytes; the last of it is all of it. What is in the cache is not told of."""
    hub.publish("org/name", changing)
    said: list[str] = []
    log.how_far.append(said.append)
    try:
        folder = fetch("org/name")
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        assert said[-1] == "{0:,.1f} of {0:,.1f} MB downloaded from the hub".format(
            size_bytes / 1e6
        )
    finally:
        log.how_far.clear()


def test_hub_id_downloads_only_what_is_needed(
    hub: type[FakeHub], hub_cache: Path, changing: Path
) -> None:
    shutil.copy(changing / "model.safetensors", changing / "pytorch_model.bin")
    (changing / "modeling_remote.py").write_text("raise SystemExit")
    (changing / "onnx").mkdir()
    (changing / "onnx" / "model.safetensors").write_text("x")
    (changing / "tf_model.h5").write_text("x")
    hub.publish("org/name", changing)
    folder = fetch("org/name")
    assert folder.is_relative_to(hub_cache)
    names = {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert {path.name for path in folder.iterdir()} == names
    assert {Path(path).name for path in hub.asked if "/resolve/" in path} == names
    assert hash_weights(folder) == hash_weights(changing)


def test_hub_revisions(hub: type[FakeHub], single: Path, sharded: Path) -> None:
    hub.publish("org/name", single)
    hub.publish("org/name", sharded, "refs/pr/1")
    commit = hub.publish("org/name", sharded, "v1.0")
    assert (fetch("org/name@v1.0") / "model.safetensors.index.json").is_file()
    assert fetch("org/name@refs/pr/1") == fetch(f"org/name@{commit}") == fetch("org/name@v1.0")
    assert (fetch("org/name@main") / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"org/name@v9: the hub's org/name has no such rev"):
        fetch("org/name@v9")


def test_hub_bin_only_where_there_is_nothing_else(hub: type[FakeHub], pickled: Path) -> None:
    hub.publish("org/old", pickled)
    folder = fetch("org/old")
    assert (folder / "pytorch_model.bin").is_file()
    assert hash_weights(folder) == hash_weights(pickled)


@pytest.mark.parametrize("variant", ["model.fp16.safetensors", "pytorch_model.fp16.bin"])
@pytest.mark.parametrize("remote", ["hub", "s3"])
def test_added_tokens_and_variants_are_fetched(
    hub: type[FakeHub], s3: Any, bucket: str, cache: Path, changing: Path, variant: str, remote: str
) -> None:
    if variant.endswith(".bin"):
        save_bin(small_clipseg(), changing)
        (changing / "pytorch_model.bin").rename(changing / variant)
        (changing / "model.safetensors").unlink()
    else:
        (changing / "model.safetensors").rename(changing / variant)
    (changing / "added_tokens.json").write_text("{}")
    hub.publish("org/name", changing)
    upload(s3, changing, f"{bucket}/m")
    folder = fetch("org/name" if remote == "hub" else f"{bucket}/m")
    assert {f.name for f in folder.iterdir()} == {f.name for f in changing.iterdir()}
    assert hash_weights(folder) == hash_weights(changing)


@pytest.mark.parametrize("remote", ["folder", "hub", "s3"])
def test_open_clips_own_format_is_named(
    hub: type[FakeHub], s3: Any, bucket: str, cache: Path, tmp_path: Path, remote: str
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"x")
    hub.publish("org/open", folder)
    upload(s3, folder, f"{bucket}/open")
    model = {"folder": str(folder), "hub": "org/open", "s3": f"{bucket}/open"}[remote]
    with pytest.raises(CheckpointError, match="in open_clip's own format, which is not read"):
        fetch(model)


def test_hub_errors_are_one_clear_line(hub: type[FakeHub], single: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("x")
    hub.publish("org/bare", tmp_path / "bare")
    for model, message in {
        "org/unknown": "no such model on the hub .a private one",
        "CIDAS/clipseg-rd64-refine": "on the hub; did you mean CIDAS/clipseg-rd64-refined",
        "org/gated": "accept them on its page",
        "org/bare": r"has no config\.json",
        "org/-x..y--": "no valid hub id|no such model",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            fetch(model)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("model", ["unknown", "gated", "refused", "name@v9"])
@pytest.mark.parametrize("secret", ["CANARY", "CAN@ARY:CANARY"])
def test_a_password_in_the_hubs_address_is_not_said(
    hub: type[FakeHub], single: Path, model: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/name", single)
    address = os.environ["HF_ENDPOINT"].removeprefix("http://")
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:{secret}@{address}")
    with pytest.raises(CheckpointError) as caught:
        fetch(f"org/{model}")
    assert hub.asked
    assert "ARY" not in str(caught.value)
    if model == "refused":  # where the address is said
        assert f"401 Unauthorized' for url 'http://{address}api/models" in str(caught.value)


def test_hub_out_of_reach(no_hub: None) -> None:
    with pytest.raises(CheckpointError, match="cannot be reached; connect") as caught:
        fetch("org/name@v1")
    assert "hf download org/name --revision v1" in str(caught.value)


def test_hub_cache_serves_offline(
    hub: type[FakeHub], single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/name", single)
    hub.publish("org/name", single, "v1")
    folder = fetch("org/name@v1")
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert fetch("org/name@v1") == folder
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        fetch("org/other")
    assert not hub.asked


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPSEG_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def upload(s3: Any, source: Path, uri: str) -> None:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    for file in source.iterdir():
        s3.upload_file(str(file), bucket, f"{key}/{file.name}")


def test_s3_folder(s3: Any, bucket: str, changing: Path, cache: Path) -> None:
    uri = f"{bucket}/models/mine"
    (changing / "pytorch_model.bin").write_text("never fetched")
    (changing / "README.md").write_text("never fetched")
    upload(s3, changing, uri)
    folder = fetch(uri)
    assert folder.parent == cache
    names = {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert {path.name for path in folder.iterdir()} == names
    assert fetch(uri + "/") == folder
    assert hash_weights(folder) == hash_weights(changing)
    change_tensors(changing, lambda tensors: tensors["clip.logit_scale"].add_(1))
    upload(s3, changing, uri)
    assert hash_weights(fetch(uri)) == hash_weights(changing)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("form", ["sharded", "pickled"])
def test_s3_other_forms(
    s3: Any, bucket: str, cache: Path, form: str, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(form)
    upload(s3, source, f"{bucket}/m")
    assert hash_weights(fetch(f"{bucket}/m")) == hash_weights(source)


_FETCH = "import sys; from pipeline.infer.fetch import fetch; print(fetch(sys.argv[1]))"


def test_s3_by_several_processes_at_once(s3: Any, bucket: str, single: Path, cache: Path) -> None:
    upload(s3, single, f"{bucket}/m")
    command = [sys.executable, "-c", _FETCH, f"{bucket}/m"]
    root = Path(__file__).parents[1]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
            )
            for _ in range(2)
        ]
        folders = {process.communicate(timeout=300)[0].strip() for process in running}
    assert [str(path) for path in cache.iterdir()] == list(folders)
    assert hash_weights(next(iter(folders))) == hash_weights(single)


def test_s3_errors(s3: Any, bucket: str, single: Path, cache: Path, tmp_path: Path) -> None:
    for uri, message in {
        f"{bucket}/none": "holds no checkpoint",
        "s3://no-such-bucket-anywhere/m": "no-such-bucket-anywhere",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            fetch(uri)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(single / "config.json", bare)
    upload(s3, bare, f"{bucket}/bare")
    with pytest.raises(CheckpointError, match="has no weights"):
        fetch(f"{bucket}/bare")
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_s3_cache_that_cannot_be_written(
    s3: Any, bucket: str, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3, single, f"{bucket}/m")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPSEG_RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be stored in"):
        fetch(f"{bucket}/m")
