"""A prompt of a run: a phrase, or a mean of texts and of example images."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pipeline import storage
from pipeline.config.options import check_file
from pipeline.errors import StorageError, UsageError
from pipeline.storage import is_s3

VISUAL_MODES = ("crop_blur_highlight", "crop", "blur_highlight", "blur", "highlight", "image")
# A mask follows its image after a colon; the one of s3:// is none.
_IMAGE_PROMPT = re.compile(r"([^=]+)=(.+?)(?::(?!//)((?:s3://)?[^:]+\.png))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image of a class, or its embedding from a file."""

    file: str = ""
    """Image with the example; a path beside the ontology, or an s3:// URI."""
    mask: str = ""
    """PNG of the image's size, not 0 on the example; by default the box, or the whole image."""
    box: tuple[float, float, float, float] | None = None
    """x, y, width, height in pixels of the upright image."""
    mode: str = "crop_blur_highlight"
    """One of VISUAL_MODES."""
    embedding: str = ""
    """.npy or .safetensors file with embeddings, (E,) or (N, E), instead of `file`."""
    weight: float = 1.0
    """Its share in the mean, where the class's text counts 1."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One probability map of a run: a phrase, or a mean of texts and examples."""

    name: str
    texts: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the prompt is its name."""
        return not self.examples and self.texts == (self.name,)

    def recipe(self) -> dict[str, Any]:
        """Facts deciding its embedding beside the model: texts, and hashes of the files."""
        return {"texts": list(self.texts), "examples": [_facts(each) for each in self.examples]}


def recipes(prompts: Iterable[Prompt]) -> dict[str, Any]:
    """By name, the recipes of prompts with examples or means.

    Raises UsageError for an unreadable example.
    """
    return {prompt.name: prompt.recipe() for prompt in prompts if not prompt.is_plain}


def parse_image_prompts(values: Iterable[str]) -> list[Prompt]:
    """One prompt for each name in NAME=IMAGE[:MASK.png]; examples of one name are averaged."""
    found: dict[str, Prompt] = {}
    for value in values:
        match = _IMAGE_PROMPT.fullmatch(value)
        if match is None or not match[1].strip():
            raise UsageError(f"--image-prompt {value!r}: must be NAME=IMAGE or NAME=IMAGE:MASK.png")
        name, example = match[1].strip(), Example(file=match[2], mask=match[3] or "")
        for file in (example.file, example.mask):
            check_file("--image-prompt", file)
        known = found.setdefault(name, Prompt(name=name))
        found[name] = replace(known, examples=(*known.examples, example))
    return list(found.values())


def locate_image_prompts(values: Iterable[str]) -> list[str]:
    """The same values with absolute paths, for a command in another folder."""
    located = []
    for value in values:
        name, image, mask = _IMAGE_PROMPT.fullmatch(value).groups()  # type: ignore[union-attr]
        paths = [p if is_s3(p) else os.path.abspath(p) for p in (image, mask) if p]
        located.append(f"{name}={':'.join(paths)}")
    return located


def _facts(example: Example) -> dict[str, Any]:
    hashes = {n: _hash(getattr(example, n)) for n in ("file", "mask", "embedding")}
    box = list(example.box) if example.box else None
    return {**hashes, "box": box, "mode": example.mode, "weight": example.weight}


def _hash(file: str) -> str:
    if not file:
        return ""
    try:
        return hashlib.sha256(storage.read_bytes(storage.check_uri(file))).hexdigest()
    except StorageError as error:
        raise UsageError(f"{file}: cannot be read ({error})") from error
