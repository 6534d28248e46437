"""Checkpoints and prompts, and the actors that run a model over pixels.

Names are loaded on first use: torch takes seconds, needless for `--help` and a mistyped option.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.infer.classify import (
        Classifier,
        ClassifyImages,
        ClassifyVectors,
        open_classifier,
    )
    from pipeline.infer.embed import EmbedImages, open_embedder
    from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter

__all__ = [
    "Classifier",
    "ClassifyImages",
    "ClassifyVectors",
    "EmbedImages",
    "SegmentImages",
    "SegmentSpec",
    "open_classifier",
    "open_embedder",
    "open_segmenter",
]

_HOMES = {
    "classify": ("Classifier", "ClassifyImages", "ClassifyVectors", "open_classifier"),
    "embed": ("EmbedImages", "open_embedder"),
    "segment": ("SegmentImages", "SegmentSpec", "open_segmenter"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"pipeline.infer.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
