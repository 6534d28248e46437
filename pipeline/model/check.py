"""config.json: read, and held against the weights before a model is built.

A configuration is a stranger's input: one integer in it can ask for 10^12 parameters or 10^9
layers. So every size it names must be the size of a tensor in the checkpoint. The other half, a
place in the model for every tensor, is in weights.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.model.config import CLIPConfig, CLIPSegConfig, TextConfig, VisionConfig
from pipeline.model.weights import read_shapes
from pipeline.storage.documents import read_json

SIZE_LIMIT = 1 << 24  # of one width or vocabulary, where no tensor says how large it is
LAYER_LIMIT = 1 << 10


def _defaults(kind: type) -> dict[str, Any]:
    """Defaults of missing fields: a tower saved alone has a projection_dim of its own."""
    found = {f.name: f.default for f in dataclasses.fields(kind)}
    own = {name: value for name, value in found.items() if value is not dataclasses.MISSING}
    return {"projection_dim": 512, **own}


TEXT_DEFAULTS = _defaults(TextConfig)
VISION_DEFAULTS = _defaults(VisionConfig)
MODEL_DEFAULTS = _defaults(CLIPSegConfig)
TEXT_MODELS = ("clip_text_model", "clipseg_text_model")
VISION_MODELS = ("clip_vision_model", "clipseg_vision_model")

Shapes = Mapping[str, tuple[int, ...]]


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, as transformers understands it, checked by check_config.

    Old files carry `text_config_dict` and `vision_config_dict`: these, and the defaults of whatever
    they leave out, win over `text_config` and `vision_config`, and are folded into them here.
    CheckpointError, naming the file and the field, for whatever is wrong with it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is no checkpoint folder")
    config = read_json(path)
    for key, defaults in (("text_config", TEXT_DEFAULTS), ("vision_config", VISION_DEFAULTS)):
        for name in (key, f"{key}_dict"):
            if not isinstance(config.get(name), dict | None):
                raise CheckpointError(f"{path}: {name} must be an object")
        legacy = config.pop(f"{key}_dict", None)
        if legacy is not None:
            config[key] = {**(config.get(key) or {}), **defaults, **legacy}
    shapes = read_shapes(folder)
    try:
        check_config(config, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config


def read_clip_config(folder: str | Path) -> tuple[CLIPConfig, str]:
    """The CLIP in a checkpoint's config.json, whatever model it is of, and its model_type.

    CheckpointError names the file and the wrong field.
    """
    values = read_config(folder)
    try:
        return CLIPConfig.from_dict(values), values["model_type"]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{Path(folder) / 'config.json'}: {error}") from error


def check_config(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse a configuration with other sizes than the tensors'; allocates nothing.

    `config` as read_config returns it, of a CLIP or CLIPSeg model or of one of their towers;
    `shapes` as read_shapes returns them, of the whole checkpoint. A tower or decoder without any
    tensors is only bounded. CheckpointError names the field, its value and what contradicts it.
    """
    kind = config.get("model_type")
    if kind in TEXT_MODELS:
        _check_text(_Section("", config, TEXT_DEFAULTS), None, shapes)
    elif kind in VISION_MODELS:
        _check_vision(_Section("", config, VISION_DEFAULTS), None, shapes)
    elif kind in ("clip", "clipseg"):
        model = _Section("", config, MODEL_DEFAULTS)
        _check_text(
            _Section("text_config.", config.get("text_config"), TEXT_DEFAULTS), model, shapes
        )
        vision = _Section("vision_config.", config.get("vision_config"), VISION_DEFAULTS)
        _check_vision(vision, model, shapes)
        if kind == "clipseg":
            _check_decoder(model, vision, shapes)
    else:
        raise CheckpointError(
            f"model_type is {str(kind)[:40]!r}, which is no CLIP or CLIPSeg model, and no command "
            "takes another; segment takes CIDAS/clipseg-rd64-refined and the like, embed and "
            "classify openai/clip-vit-base-patch16 and the like"
        )


class _Section:
    """One object of config.json with transformers' defaults; `label` is its path in the file."""

    def __init__(self, label: str, values: Any, defaults: Mapping[str, Any]):
        if values is not None and not isinstance(values, Mapping):
            raise CheckpointError(f"{label[:-1]} must be an object")
        self.label = label
        given = {k: v for k, v in (values or {}).items() if v is not None}
        self.values = {**defaults, **given}

    def integer(self, field: str, limit: int = SIZE_LIMIT, least: int = 1) -> int:
        value = self.values[field]
        if type(value) is not int or not least <= value <= limit:
            raise self.wrong(field, f"it must be an integer from {least} to {limit}")
        return value

    def wrong(self, field: str, rule: str) -> CheckpointError:
        value = str(self.values[field])[:80]
        return CheckpointError(f"{self.label}{field} is {value}, but {rule}")

    def match(self, field: str, shapes: Shapes, tensor: str, axis: int) -> None:
        """The field must be the size of the tensor on this axis."""
        shape = shapes.get(tensor)
        if shape is None:
            raise CheckpointError(f"the weights have no tensor {tensor}")
        if not -len(shape) <= axis < len(shape) or self.integer(field) != shape[axis]:
            raise self.wrong(field, f"{tensor} has the shape {shape}")

    def match_layers(self, shapes: Shapes, prefix: str, wanted: int, field: str) -> None:
        """The tensors must belong to the layers 0 to wanted - 1, none left out."""
        pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
        found = {int(match[1]) for name in shapes if (match := pattern.match(name))}
        if len(found) != wanted or max(found) != wanted - 1:
            raise self.wrong(field, f"the weights hold {len(found)} of them ({prefix}*)")

    def match_heads(self, field: str, width_field: str) -> None:
        if self.integer(width_field) % self.integer(field):
            raise self.wrong(field, f"it does not divide {width_field}, {self.values[width_field]}")


def _find(shapes: Shapes, prefixes: tuple[str, ...], probe: str) -> str | None:
    """The prefix of the stored names of a part's tensors; None without any.

    `clip.` in CLIPSeg, nothing in CLIP; towers saved alone by transformers 5 have no prefix at all.
    """
    return next((p for p in prefixes if any(name.startswith(p + probe) for name in shapes)), None)


def _check_tower(section: _Section, shapes: Shapes, base: str | None) -> None:
    layers = section.integer("num_hidden_layers", LAYER_LIMIT)
    for field in ("hidden_size", "intermediate_size"):
        section.integer(field)
    section.match_heads("num_attention_heads", "hidden_size")
    if base is None:
        return
    section.match_layers(shapes, f"{base}encoder.layers.", layers, "num_hidden_layers")
    first = f"{base}encoder.layers.0.mlp.fc1.weight"
    section.match("intermediate_size", shapes, first, 0)
    section.match("hidden_size", shapes, first, 1)


def _check_text(text: _Section, model: _Section | None, shapes: Shapes) -> None:
    """`model` holds the projection's width; None for a tower of its own, which holds it itself."""
    prefixes = ("clip.text_model.", "text_model.") + (("",) if model is None else ())
    base = _find(shapes, prefixes, "embeddings.")
    _check_tower(text, shapes, base)
    for field in ("vocab_size", "max_position_embeddings"):
        text.integer(field)
    if base is None:
        return
    text.match("vocab_size", shapes, f"{base}embeddings.token_embedding.weight", 0)
    text.match("hidden_size", shapes, f"{base}embeddings.token_embedding.weight", 1)
    text.match("max_position_embeddings", shapes, f"{base}embeddings.position_embedding.weight", 0)
    _check_projection(model or text, shapes, "text_projection.weight")


def _check_vision(vision: _Section, model: _Section | None, shapes: Shapes) -> None:
    """As _check_text; the image size is that of the position table, not of the images."""
    prefixes = ("clip.vision_model.", "vision_model.") + (("",) if model is None else ())
    base = _find(shapes, prefixes, "embeddings.")
    _check_tower(vision, shapes, base)
    image, patch = vision.integer("image_size"), vision.integer("patch_size")
    vision.integer("num_channels")
    if base is None:
        return
    kernel, table = (f"{base}embeddings.{part}_embedding.weight" for part in ("patch", "position"))
    for axis, field in enumerate(("hidden_size", "num_channels", "patch_size", "patch_size")):
        vision.match(field, shapes, kernel, axis)
    vision.match("hidden_size", shapes, table, -1)
    if shapes[table][0] != (image // patch) ** 2 + 1:
        raise vision.wrong("image_size", f"{table} has the shape {shapes[table]}")
    _check_projection(model or vision, shapes, "visual_projection.weight")


def _check_projection(section: _Section, shapes: Shapes, name: str) -> None:
    section.integer("projection_dim")
    base = _find(shapes, ("clip.", ""), name)
    if base is not None:
        section.match("projection_dim", shapes, base + name, 0)


def _check_decoder(model: _Section, vision: _Section, shapes: Shapes) -> None:
    layers = model.values["extract_layers"]
    depth = vision.integer("num_hidden_layers", LAYER_LIMIT)
    if not isinstance(layers, list | tuple) or not 1 <= len(layers) <= depth:
        raise model.wrong("extract_layers", f"it must list some of the {depth} vision layers")
    if not all(type(layer) is int and 0 <= layer < depth for layer in layers):
        raise model.wrong("extract_layers", f"the vision layers are 0 to {depth - 1}")
    model.integer("conditional_layer", LAYER_LIMIT, least=0)
    model.match_heads("decoder_num_attention_heads", "reduce_dim")
    model.integer("decoder_intermediate_size")
    if type(model.values["use_complex_transposed_convolution"]) is not bool:
        raise model.wrong("use_complex_transposed_convolution", "it must be true or false")
    if _find(shapes, ("",), "decoder.") is None:
        return
    model.match("reduce_dim", shapes, "decoder.film_mul.weight", 0)
    model.match("projection_dim", shapes, "decoder.film_mul.weight", 1)
    model.match("decoder_intermediate_size", shapes, "decoder.layers.0.mlp.fc1.weight", 0)
    for part in ("layers", "reduces"):
        model.match_layers(shapes, f"decoder.{part}.", len(layers), "extract_layers")
