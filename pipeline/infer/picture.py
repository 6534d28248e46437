"""CLIPSeg on the side of a single picture, without Ray: for a notebook.

The same steps as the segment job's, in this process: upright RGB, the checkpoint's own processor
and tokenizer, masks at the picture's size.

Shapes: P prompts, (H, W) the size of the upright picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.config.fine import FineOptions
from pipeline.config.options import refuse_repeated
from pipeline.errors import UsageError
from pipeline.infer.blend import BlendLooks, open_looks
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.device import Device
from pipeline.infer.masks import mask_from_logits
from pipeline.model.clipseg import CLIPSeg as Model
from pipeline.prepare.convert import to_rgb
from pipeline.prepare.windows import Looks


class Masks(NamedTuple):
    """The masks of one picture, in the order of its prompts."""

    masks: np.ndarray
    """(P, H, W) bool: where the probability is above the threshold."""
    probabilities: np.ndarray
    """(P, H, W) float32, 0..1."""


class CLIPSeg:
    """A checkpoint for segmenting pictures: `from_pretrained`, then a call."""

    def __init__(self, opened: OpenModel[Model]):
        self.opened = opened

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "cpu") -> CLIPSeg:
        """Open a checkpoint: a folder, an s3:// folder, or a hub id, with @revision if wanted.

        `device` is "cpu" or "cuda". Raises CheckpointError naming what is wrong.
        """
        return cls(OpenModel(str(name), Model.from_folder, Device(device)))

    @overload
    def __call__(
        self,
        images: Image.Image,
        prompts: str | Sequence[str],
        *,
        threshold: float = 0.5,
        size: int | str | None = None,
        tile: bool = False,
        refine: bool = False,
    ) -> Masks: ...
    @overload
    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: str | Sequence[str],
        *,
        threshold: float = 0.5,
        size: int | str | None = None,
        tile: bool = False,
        refine: bool = False,
    ) -> list[Masks]: ...
    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompts: str | Sequence[str],
        *,
        threshold: float = 0.5,
        size: int | str | None = None,
        tile: bool = False,
        refine: bool = False,
    ) -> Masks | list[Masks]:
        """Segment a picture, or each of several, with every prompt.

        A picture is turned upright by its EXIF orientation; its mode may be any. `size`, `tile` and
        `refine` as in FineOptions. Raises UsageError for no prompt, an empty or repeated one, a
        threshold outside 0..1, and an unsupported size.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        if not asked or not all(prompt.strip() for prompt in asked):
            raise UsageError("nothing to segment: give at least one prompt, none of them empty")
        refuse_repeated(asked, "prompt")
        if not 0 <= threshold <= 1:
            raise UsageError(f"threshold={threshold}: must be between 0 and 1")
        fine = FineOptions(size=None if size is None else str(size), tile=tile, refine=refine)
        looks = open_looks(self.opened, fine, embed=False)
        for note in self.opened.describe_texts(asked, "prompt"):
            warnings.warn(note, stacklevel=2)
        conditional = self.opened.encode_texts(asked).to(self.opened.device.torch)
        if isinstance(images, Image.Image):
            return self._segment(images, conditional, threshold, looks)
        return [self._segment(image, conditional, threshold, looks) for image in images]

    def _segment(
        self, image: Image.Image, conditional: Tensor, threshold: float, looks: Looks
    ) -> Masks:
        """The masks of one picture for prompts (P, E)."""
        upright = to_rgb(ImageOps.exif_transpose(image))
        size = (upright.height, upright.width)
        # As in the job, which runs every row alone, too.
        blend = BlendLooks(looks, self.opened.model, self.opened.device)
        (looked,) = blend.look([(looks.fit(upright), *size)])
        logits = blend.logits(looked, conditional)
        probabilities = F.interpolate(logits[None], size=size, mode="bilinear")[0].sigmoid()
        # Decided on the logits, as in the job.
        masks = [mask_from_logits(grid, size, threshold) for grid in logits.numpy()]
        return Masks(np.stack(masks).astype(bool), probabilities.numpy())
