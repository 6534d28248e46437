"""The config.json of a CLIP or CLIPSeg checkpoint as plain dataclasses.

Field names and defaults are those of transformers' CLIPConfig and CLIPSegConfig, so that any hub
config reads as it is; fields without influence on the network's outputs are ignored.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

# As transformers' activations.py names them; clip.ACTIVATIONS holds what they are.
HIDDEN_ACTS = (
    *("quick_gelu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate"),
    *("gelu_pytorch_tanh", "gelu_python_tanh", "relu", "silu", "swish"),
)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower: a causal transformer over at most `max_position_embeddings` tokens."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407  # 2 in many older checkpoints: see TextTower.pool


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower: a transformer over square patches of `patch_size` pixels."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels a side that the position table was made for
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both towers and the dimension of their shared space.

    transformers' `from_text_vision_configs` is the constructor:
    `CLIPConfig(text_config=TextConfig(...), vision_config=VisionConfig(...))`.
    """

    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CLIPConfig:
        """Read a config.json's content. Raises ValueError or TypeError for values no model has.

        That of a tower saved alone is read as the CLIP it belongs to; the other tower then has
        the default sizes.
        """
        tower = re.fullmatch(r"clip(?:seg)?_(text|vision)_model", str(values.get("model_type")))
        if tower:
            values = {**values, f"{tower[1]}_config": values}
        return cls(**_towers(values), **_fields(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json."""
        return {"model_type": "clip", "architectures": ["CLIPModel"], **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class CLIPSegConfig:
    """CLIP, and the decoder from its activations and a prompt to a mask."""

    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    extract_layers: tuple[int, ...] = (3, 6, 9)  # 0-based outputs of vision blocks
    reduce_dim: int = 64
    decoder_num_attention_heads: int = 4
    decoder_intermediate_size: int = 2048
    conditional_layer: int = 0  # decoder step, counted from the deepest activation
    use_complex_transposed_convolution: bool = False

    def __post_init__(self) -> None:
        depth, layers = self.vision_config.num_hidden_layers, self.extract_layers
        if not layers or not all(0 <= i < depth for i in layers):
            raise ValueError(f"extract_layers {list(layers)}: each must be in 0..{depth - 1}")
        if any(a >= b for a, b in itertools.pairwise(layers)):
            raise ValueError(f"extract_layers {list(layers)}: must increase")
        _check_heads(self.reduce_dim, self.decoder_num_attention_heads)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CLIPSegConfig:
        """Read a config.json's content. Raises ValueError or TypeError for values no model has."""
        return cls(**_towers(values), **_fields(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json."""
        name = "CLIPSegForImageSegmentation"
        return {"model_type": "clipseg", "architectures": [name], **dataclasses.asdict(self)}


def _towers(values: dict[str, Any]) -> dict[str, Any]:
    """Both towers of a config.json."""
    out = {}
    for name, tower in (("text_config", TextConfig), ("vision_config", VisionConfig)):
        nested = values.get(name) or {}
        if not isinstance(nested, dict):
            raise TypeError(f"{name} is {type(nested).__name__}, not an object")
        out[name] = tower(**_fields(tower, nested))
        _check_heads(out[name].hidden_size, out[name].num_attention_heads)
        if out[name].hidden_act not in HIDDEN_ACTS:
            known = ", ".join(HIDDEN_ACTS)
            raise ValueError(f"{name}.hidden_act is {out[name].hidden_act!r}, not one of {known}")
    return out


def _fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of the fields of `cls`, each of its default's type, sizes positive."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        value: Any = values.get(f.name)
        if value is None or f.default is dataclasses.MISSING:
            continue
        kind: Any = type(f.default)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not kind:
            raise TypeError(f"{f.name} is {value!r}, not of type {kind.__name__}")
        sized = kind is int and not f.name.endswith(("_token_id", "conditional_layer"))
        if sized and value <= 0:
            raise ValueError(f"{f.name} is {value}; it must be positive")
        if kind is tuple and not all(type(v) is int for v in value):
            raise TypeError(f"{f.name} is {list(value)}; it must hold integers")
        out[f.name] = value
    return out


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"a width of {width} is not a multiple of {heads} attention heads")
