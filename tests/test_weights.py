"""Checkpoints that transformers saved load bit for bit; wrong ones are refused by name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    change_tensors,
    clipseg_config,
    empty_clipseg,
    on_meta,
    save,
    save_bin,
    small_clip,
    small_clipseg,
    without_buffers,
    write_bin,
)
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import CheckpointError
from pipeline.model.weights import hash_weights, load_weights, read_scalar, read_shapes


@pytest.fixture(scope="session")
def oracle() -> Any:
    return small_clipseg()


@pytest.fixture(scope="session")
def single(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(oracle, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="session")
def sharded(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(oracle, tmp_path_factory.mktemp("sharded"), max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="session")
def pickled(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bin(oracle, tmp_path_factory.mktemp("pickled"))


@pytest.fixture
def broken(single: Path, tmp_path: Path) -> Path:
    """A copy of `single` to damage."""
    return Path(shutil.copytree(single, tmp_path / "broken"))


# Loading what is right


@pytest.mark.parametrize("form", ["single", "sharded", "pickled"])
def test_weights_arrive_bit_for_bit(form: str, oracle: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(form)
    module = empty_clipseg()
    digest = load_weights(module, folder)
    wanted = oracle.state_dict()
    assert read_shapes(folder) == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    loaded = module.state_dict()
    assert loaded.keys() == wanted.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted[name]), name
    assert all(p.requires_grad for p in module.parameters())
    assert digest == hash_weights(folder) == expected_hash(wanted)


def expected_hash(tensors: dict[str, torch.Tensor]) -> str:
    """The definition, spelled out without the code under test."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0float32\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_sharded_bin(oracle: Any, tmp_path: Path) -> None:
    oracle.config.save_pretrained(tmp_path)
    state = oracle.state_dict()
    names = sorted(state)
    places = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(names)}
    for shard in set(places.values()):
        part = {name: state[name].clone() for name in names if places[name] == shard}
        torch.save(part, tmp_path / shard)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load_weights(empty_clipseg(), tmp_path) == expected_hash(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(dtype: torch.dtype, oracle: Any, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in oracle.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    module = empty_clipseg()
    digest = load_weights(module, tmp_path)
    assert digest == hash_weights(write_bin(tmp_path, state))
    assert digest != expected_hash(oracle.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name].float())
    half = empty_clipseg()
    load_weights(half, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}


def test_bin_of_transposed_parameters(oracle: Any, tmp_path: Path) -> None:
    state = {
        name: nn.Parameter(t.t().contiguous().t()) if t.ndim == 2 else t
        for name, t in oracle.state_dict().items()
    }
    module = empty_clipseg()
    assert load_weights(module, write_bin(tmp_path, state)) == expected_hash(oracle.state_dict())
    assert all(p.is_contiguous() and p.is_leaf for p in module.parameters())


def test_later_changes_of_the_file_do_not_show(broken: Path, oracle: Any) -> None:
    module = empty_clipseg()
    load_weights(module, broken)
    data = (broken / "model.safetensors").read_bytes()
    with (broken / "model.safetensors").open("r+b") as file:
        file.write(bytes(len(data)))
    assert torch.equal(module.state_dict()["clip.logit_scale"], oracle.clip.logit_scale)


def test_legacy_position_ids_are_ignored(broken: Path) -> None:
    before = hash_weights(broken)
    ids = torch.arange(16)[None]
    change_tensors(
        broken,
        lambda tensors: tensors.update(
            {
                f"clip.{tower}_model.embeddings.position_ids": ids.clone()
                for tower in ("text", "vision")
            }
        ),
    )
    assert load_weights(empty_clipseg(), broken) == before
    assert not [name for name in read_shapes(broken) if "position_ids" in name]


def test_symlinks_as_in_the_hub_cache(single: Path, tmp_path: Path) -> None:
    for file in single.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert load_weights(empty_clipseg(), tmp_path) == hash_weights(single)


TOWERS = {
    "text": (transformers.CLIPTextModel, "text_config", "text_model."),
    "vision": (transformers.CLIPVisionModel, "vision_config", "vision_model."),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_alone_from_a_full_checkpoint(tower: str, single: Path, tmp_path: Path) -> None:
    kind, section, prefix = TOWERS[tower]
    clip = small_clip()
    save(clip, tmp_path)
    for folder, start in ((single, "clip." + prefix), (tmp_path, prefix)):
        config = transformers.AutoConfig.from_pretrained(folder).get_text_config
        config = getattr(transformers.AutoConfig.from_pretrained(folder), section)
        if folder == single:
            config = getattr(transformers, kind.__name__.replace("Model", "Config"))(
                **{k: v for k, v in config.to_dict().items() if k != "model_type"}
            )
        module = without_buffers(on_meta(kind, config))
        assert load_weights(module, folder, prefix=start) == hash_weights(folder)
        stored = load_file(folder / "model.safetensors")
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, stored[start + name])


def test_towers_with_projection_by_only(single: Path) -> None:
    config = transformers.CLIPVisionConfig(
        **clipseg_config().vision_config.to_dict() | {"projection_dim": 28, "model_type": None}
    )
    module = without_buffers(on_meta(transformers.CLIPVisionModelWithProjection, config))
    parts = ("vision_model.", "visual_projection.")
    load_weights(module, single, prefix="clip.", only=lambda name: name.startswith(parts))
    stored = load_file(single / "model.safetensors")["clip.visual_projection.weight"]
    assert torch.equal(module.state_dict()["visual_projection.weight"], stored)
    with pytest.raises(CheckpointError, match=r"clip\.logit_scale is unexpected"):
        load_weights(module, single, prefix="clip.")


# Tensors that do not fit


def test_every_tensor_that_does_not_fit_is_named(broken: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.film_mul.bias"]
        tensors["decoder.film_sub.bias"] = torch.zeros(3)
        tensors["clip.logit_scale"] = torch.zeros(2)

    change_tensors(broken, change)
    module = empty_clipseg()
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, broken)
    message = str(caught.value)
    assert "decoder.film_mul.bias is missing" in message
    assert "decoder.film_sub.bias is unexpected" in message
    assert "clip.logit_scale has the shape (2,), not ()" in message
    assert all(p.is_meta for p in module.parameters())


def test_at_most_ten_tensors_are_listed(broken: Path) -> None:
    change_tensors(broken, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:25]])
    with pytest.raises(CheckpointError, match="and 15 more") as caught:
        load_weights(empty_clipseg(), broken)
    assert str(caught.value).count("is missing") == 10


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_only_floats_are_weights(broken: Path, oracle: Any, dtype: torch.dtype) -> None:
    state = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    state["decoder.film_mul.bias"] = state["decoder.film_mul.bias"].to(dtype)
    save_file(state, broken / "model.safetensors")
    for folder in (broken, write_bin(broken, state)):
        with pytest.raises(CheckpointError, match=r"decoder\.film_mul\.bias is .*not a floating"):
            load_weights(empty_clipseg(), folder)


def test_a_buffer_that_no_checkpoint_can_fill_is_our_mistake(single: Path) -> None:
    module = on_meta(transformers.CLIPSegForImageSegmentation, clipseg_config())
    with pytest.raises(RuntimeError, match="position_ids"):
        load_weights(module, single)


# Forms that are not what save_pretrained writes today


def test_a_number_that_is_a_vector_of_one(oracle: Any, single: Path, broken: Path) -> None:
    """As torch 0.3 saved numbers; torch's own load_state_dict takes it, too."""
    wanted = oracle.state_dict()["clip.logit_scale"]
    change_tensors(broken, lambda t: t.update({"clip.logit_scale": wanted.reshape(1)}))
    module = empty_clipseg()
    load_weights(module, broken)
    assert torch.equal(module.state_dict()["clip.logit_scale"], wanted)
    assert read_scalar(broken, "clip.logit_scale") == wanted.item()
    change_tensors(broken, lambda t: t.update({"clip.logit_scale": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="logit_scale has the shape"):
        load_weights(module, broken)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_model(oracle: Any, tmp_path: Path, wrapper: str) -> None:
    """The names that DistributedDataParallel and torch.compile make."""
    state = oracle.state_dict()
    write_bin(tmp_path, {wrapper + name: tensor for name, tensor in state.items()})
    assert load_weights(empty_clipseg(), tmp_path) == expected_hash(state)
    assert "clip.logit_scale" in read_shapes(tmp_path)
    write_bin(tmp_path, {wrapper + name: t for name, t in state.items()} | {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"clip\.logit_scale is missing"):
        load_weights(empty_clipseg(), tmp_path)


@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_a_variant_where_there_is_nothing_else(oracle: Any, tmp_path: Path, size: str) -> None:
    """Saved by the reference as model.fp16.safetensors, or as shards and their index."""
    save(oracle, tmp_path, variant="fp16", max_shard_size=size)
    assert not (tmp_path / "model.safetensors").exists()
    assert load_weights(empty_clipseg(), tmp_path) == expected_hash(oracle.state_dict())
    shutil.copy(next(tmp_path.glob("*.safetensors")), tmp_path / "model.bf16.safetensors")
    if size == "5GB":
        with pytest.raises(CheckpointError, match=r"model\.bf16\.safetensors, model\.fp16"):
            load_weights(empty_clipseg(), tmp_path)
    save(oracle, tmp_path)
    assert load_weights(empty_clipseg(), tmp_path) == expected_hash(oracle.state_dict())


def test_a_variant_of_a_bin(oracle: Any, tmp_path: Path) -> None:
    write_bin(tmp_path, oracle.state_dict())
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model.fp16.bin")
    assert load_weights(empty_clipseg(), tmp_path) == expected_hash(oracle.state_dict())


def test_a_bin_of_old_torch_says_how_to_convert_it(oracle: Any, tmp_path: Path) -> None:
    write_bin(tmp_path, oracle.state_dict(), _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: .*before 1\.6") as caught:
        load_weights(empty_clipseg(), tmp_path)
    command = re.search(r'python -c "(.*)"', str(caught.value))
    assert command
    subprocess.run([sys.executable, "-c", command[1]], cwd=tmp_path, check=True)
    assert load_weights(empty_clipseg(), tmp_path) == expected_hash(oracle.state_dict())


def test_what_is_no_file_of_weights_is_named(oracle: Any, broken: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (broken / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="a Git LFS pointer, not the file"):
        load_weights(empty_clipseg(), broken)
    write_bin(broken, {"epoch": 3, "state_dict": oracle.state_dict()})
    with pytest.raises(CheckpointError, match="training checkpoint; save its `state_dict` alone"):
        load_weights(empty_clipseg(), broken)
