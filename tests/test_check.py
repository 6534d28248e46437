"""A config.json whose sizes are not the tensors' own is refused by field, at no cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    change_json,
    change_tensors,
    clipseg_config,
    on_meta,
    save,
    small_clip,
    small_clipseg,
)

from pipeline.errors import CheckpointError
from pipeline.model.check import check_config, read_config
from pipeline.model.clip import CLIP
from pipeline.model.clipseg import CLIPSeg
from pipeline.model.encoders import ImageEncoder, TextEncoder


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small_clipseg(), tmp_path_factory.mktemp("good"))


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to damage."""
    return Path(shutil.copytree(good, tmp_path / "broken"))


ALONE = {
    "CLIPTextModel": "text_config",
    "CLIPTextModelWithProjection": "text_config",
    "CLIPVisionModel": "vision_config",
    "CLIPVisionModelWithProjection": "vision_config",
    "CLIPForImageClassification": "",
    "CLIPModel": "",
}


@pytest.mark.parametrize("name", ALONE)
def test_configs_of_every_clip_model_pass(name: str, tmp_path: Path) -> None:
    config = small_clip().config
    config.text_config.projection_dim = config.vision_config.projection_dim = config.projection_dim
    part = getattr(config, ALONE[name]) if ALONE[name] else config
    save(getattr(transformers, name)(part), tmp_path)
    assert read_config(tmp_path)["model_type"] == part.model_type


def test_clipseg_without_decoder_passes(tmp_path: Path) -> None:
    save(transformers.CLIPSegModel(clipseg_config()), tmp_path)
    read_config(tmp_path)


def field(*names: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the config at this path."""

    def change(config: dict[str, Any]) -> None:
        for name in names[:-1]:
            config = config[name]
        config[names[-1]] = value

    return change


WRONG_FIELDS = [
    (["text_config", "num_hidden_layers"], 10**9),
    (["text_config", "num_hidden_layers"], 3),
    (["text_config", "hidden_size"], 10**12),
    (["text_config", "hidden_size"], 27),
    (["text_config", "vocab_size"], 10**12),
    (["text_config", "vocab_size"], 49408),
    (["text_config", "vocab_size"], 557.0),
    (["text_config", "intermediate_size"], -1),
    (["text_config", "intermediate_size"], 41),
    (["text_config", "max_position_embeddings"], 77),
    (["text_config", "num_attention_heads"], 5),
    (["text_config", "num_attention_heads"], 0),
    (["vision_config", "num_hidden_layers"], 10**9),
    (["vision_config", "num_hidden_layers"], 3),
    (["vision_config", "num_hidden_layers"], True),
    (["vision_config", "hidden_size"], "32"),
    (["vision_config", "hidden_size"], 64),
    (["vision_config", "intermediate_size"], 10**18),
    (["vision_config", "num_channels"], 4),
    (["vision_config", "image_size"], 352),
    (["vision_config", "image_size"], [64, 64]),
    (["vision_config", "patch_size"], 32),
    (["projection_dim"], 512),
    (["projection_dim"], 10**12),
    (["reduce_dim"], 64),
    (["decoder_intermediate_size"], 2048),
    (["decoder_num_attention_heads"], 5),
    (["extract_layers"], [0, 1, 4]),
    (["extract_layers"], [0, 1]),
    (["extract_layers"], []),
    (["extract_layers"], [0, 1, -1]),
    (["extract_layers"], [0, 1, 10**9]),
    (["extract_layers"], 3),
    (["conditional_layer"], 10**9),
    (["conditional_layer"], "0"),
    (["use_complex_transposed_convolution"], "yes"),
    (["text_config"], []),
    (["model_type"], "bert"),
    (["model_type"], None),
]


@pytest.mark.parametrize(("path", "value"), WRONG_FIELDS)
def test_wrong_sizes_are_named(broken: Path, path: list[str], value: Any) -> None:
    change_json(broken / "config.json", field(*path, value=value))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{path[-1]}") as caught:
        read_config(broken)
    assert len(str(caught.value)) < 500


def test_missing_fields_take_the_defaults(broken: Path) -> None:
    path = broken / "config.json"
    change_json(path, lambda config: config["text_config"].pop("num_hidden_layers"))
    with pytest.raises(CheckpointError, match=r"text_config\.num_hidden_layers is 12"):
        read_config(broken)
    check_config({"model_type": "clip"}, full_size_shapes())


def full_size_shapes() -> dict[str, tuple[int, ...]]:
    module = on_meta(transformers.CLIPModel, transformers.CLIPConfig())
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_tensors_that_a_layer_count_leaves_out(broken: Path) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "text_model.encoder.layers.1." in n]:
            tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)

    change_tensors(broken, move)
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        read_config(broken)


def test_sections_repeated_as_old_files_do(broken: Path) -> None:
    """As transformers reads them: the repetition wins, with defaults for what it leaves out."""
    path = broken / "config.json"
    tower = json.loads(path.read_text())["vision_config"]
    repetition = {key: value for key, value in tower.items() if key != "hidden_act"}
    change_json(path, field("vision_config_dict", value=repetition))
    change_json(path, field("vision_config", value={"hidden_size": 5, "hidden_act": "gelu"}))
    change_json(path, field("text_config_dict", value=None))
    config = read_config(broken)
    wanted = transformers.CLIPSegConfig.from_pretrained(broken).vision_config
    for name in ("hidden_size", "hidden_act", "num_hidden_layers", "layer_norm_eps", "patch_size"):
        assert config["vision_config"][name] == getattr(wanted, name)
    assert "vision_config_dict" not in config


def test_other_models_are_named(tmp_path: Path) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1}
    text = small | {"vocab_size": 9, "projection_size": 8}
    vision = small | {"image_size": 8, "patch_size": 4}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    save(transformers.SiglipModel(config), tmp_path / "siglip")
    for open_model in (CLIP, CLIPSeg, ImageEncoder, TextEncoder):
        with pytest.raises(CheckpointError, match="model_type is 'siglip', which is no CLIP"):
            open_model.from_folder(tmp_path / "siglip")
    save(small_clip(), tmp_path / "clip")
    with pytest.raises(CheckpointError, match="is a clip model, without a decoder") as caught:
        CLIPSeg.from_folder(tmp_path / "clip")
    assert "embed and classify take CLIP models, segment a CLIPSeg" in str(caught.value)
