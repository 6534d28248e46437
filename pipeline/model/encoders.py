"""One half of CLIP alone, from whatever checkpoint holds it: for texts, images, or classes.

What embeds only images need not hold the text tower: it is never built, and of its tensors no
copy is made (they are read once, one by one, for the hash, which is that of the whole checkpoint).
The checkpoint may be a full CLIP or CLIPSeg, or a tower saved alone by transformers, with its
projection or without.

Shapes: B batch, L tokens, D width of the tower, E projection, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.model.check import read_clip_config, read_config
from pipeline.model.clip import TextTower, VisionTower, clip_prefix, resolve_interpolate
from pipeline.model.config import CLIPConfig, VisionConfig
from pipeline.model.weights import load_weights, read_scalar, read_shapes


class TextEncoder(nn.Module):
    """CLIP's text tower and, unless `project` is off, its projection."""

    def __init__(self, config: CLIPConfig, *, project: bool = True):
        super().__init__()
        self.text_model = TextTower(config.text_config)
        self.text_projection = _projection(
            config.text_config.hidden_size, config.projection_dim, project
        )

    @classmethod
    def from_folder(cls, folder: Path, *, project: bool = True) -> tuple[TextEncoder, str]:
        """The text half of a checkpoint, on the CPU in float32, and its weights hash.

        CheckpointError names the wrong file, field or tensor, or the missing part.
        """
        config, kind = read_clip_config(folder)
        if kind.endswith("vision_model"):
            raise CheckpointError(f"{folder}: is a {kind}; it has no text tower")
        with torch.device("meta"):
            model = cls(config, project=project)
        names = ("text_model", "text_projection")
        return model.eval(), _load_half(model, folder, *names, project=project)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text embeddings of int64 ids (B, L), not normalised: (B, E), unprojected (B, D)."""
        states = self.text_model(input_ids, attention_mask)
        return self.text_projection(self.text_model.pool(states, input_ids, attention_mask))


class ImageEncoder(nn.Module):
    """CLIP's vision tower and, unless `project` is off, its projection."""

    def __init__(self, config: CLIPConfig, *, project: bool = True, interpolate: bool = False):
        super().__init__()
        self.vision_model = VisionTower(config.vision_config, interpolate=interpolate)
        self.visual_projection = _projection(
            config.vision_config.hidden_size, config.projection_dim, project
        )

    @classmethod
    def from_folder(
        cls, folder: Path, *, project: bool = True, interpolate: bool | None = None
    ) -> tuple[ImageEncoder, str]:
        """The image half of a checkpoint, on the CPU in float32, and its weights hash.

        `interpolate` as in CLIP.from_folder. CheckpointError as in TextEncoder.from_folder.
        """
        config, kind = read_clip_config(folder)
        if kind.endswith("text_model"):
            raise CheckpointError(f"{folder}: is a {kind}; it has no vision tower")
        with torch.device("meta"):
            interpolated = resolve_interpolate(interpolate, kind)
            model = cls(config, project=project, interpolate=interpolated)
        names = ("vision_model", "visual_projection")
        return model.eval(), _load_half(model, folder, *names, project=project)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image embeddings of pixels (B, 3, H, W), not normalised: (B, E), unprojected (B, D)."""
        tower = self.vision_model
        return self.visual_projection(tower.pool(tower.activations(pixels)[0]))


class ImageClassifier(nn.Module):
    """The vision tower and a linear head; `labels` are the names of the C classes, in order."""

    def __init__(self, config: VisionConfig, labels: Sequence[str], *, interpolate: bool = False):
        super().__init__()
        self.labels = tuple(labels)
        self.vision_model = VisionTower(config, interpolate=interpolate)
        self.classifier = nn.Linear(config.hidden_size, len(self.labels))

    @classmethod
    def from_folder(cls, folder: Path, *, interpolate: bool = False) -> tuple[ImageClassifier, str]:
        """A checkpoint of CLIPForImageClassification, on the CPU in float32, and its weights hash.

        CheckpointError names the wrong file, field or tensor.
        """
        config, _ = read_clip_config(folder)
        labels = read_head_labels(folder)
        if labels is None:
            raise CheckpointError(f"{folder}: has no classifier.weight, so it classifies no images")
        with torch.device("meta"):
            model = cls(config.vision_config, labels, interpolate=interpolate)
        return model.eval(), load_weights(model, folder)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) of pixels (B, 3, H, W), from the mean of the patches' last states."""
        return self.classifier(self.vision_model.activations(pixels)[0][:, 1:].mean(dim=1))


def read_head_labels(folder: Path) -> list[str] | None:
    """The names of the classes of a checkpoint's head, in order; None without a head."""
    shape = read_shapes(folder).get("classifier.weight", ())
    if len(shape) != 2:
        return None
    return _read_labels(folder, read_config(folder).get("id2label"), shape[0])


def read_logit_scale(folder: Path) -> float:
    """CLIP's factor of a cosine, exp(logit_scale). Raises CheckpointError."""
    try:
        return math.exp(read_scalar(folder, f"{clip_prefix(folder)}logit_scale"))
    except OverflowError as error:
        raise CheckpointError(f"{folder}: exp(logit_scale) is not finite") from error


def _projection(width: int, dim: int, project: bool) -> nn.Module:
    return nn.Linear(width, dim, bias=False) if project else nn.Identity()


def _load_half(
    model: nn.Module, folder: Path, tower: str, projection: str, *, project: bool
) -> str:
    """Fill `model` with its own part of a checkpoint; returns the hash of the whole."""
    shapes, root = read_shapes(folder), clip_prefix(folder)
    if project:
        if f"{root}{projection}.weight" not in shapes:
            raise CheckpointError(
                f"{folder}: has no {projection}.weight, so its embeddings cannot be projected"
            )
        parts = (f"{tower}.", f"{projection}.")
        return load_weights(model, folder, prefix=root, only=lambda name: name.startswith(parts))
    # transformers 5 saves a tower alone without any prefix, 4 did with that of the tower.
    bare = any(name.startswith("embeddings.") for name in shapes)
    prefix = "" if bare else f"{root}{tower}."
    return load_weights(model.get_submodule(tower), folder, prefix=prefix)


def _read_labels(folder: Path, names: Any, count: int) -> list[str]:
    """The values of id2label in the order of the classes; LABEL_0, ... if it is not given."""
    if names is None:  # transformers leaves out what it would call them itself
        return [f"LABEL_{i}" for i in range(count)]
    keys = [str(i) for i in range(count)]
    if not isinstance(names, dict) or sorted(names) != sorted(keys):
        raise CheckpointError(
            f"{folder / 'config.json'}: id2label must name the classes 0 to {count - 1}, the rows "
            "of classifier.weight"
        )
    if not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / 'config.json'}: id2label must hold strings")
    return [names[key] for key in keys]
