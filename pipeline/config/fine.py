"""Options of the jobs making masks: how closely an image is looked at."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from pipeline.errors import UsageError

MAX_LOOK_PX = 4096**2
"""Pixels of the finest look at an image: one prompt's logits of it are one block, of 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class FineOptions:
    """How closely images are looked at; without any of these, once at the checkpoint's own size."""

    size: Annotated[str | None, tyro.conf.arg(metavar="PX|HxW")] = None
    """Size at which the model sees an image: its longer side, aspect kept, or HEIGHTxWIDTH, aspect
    not kept. By default the checkpoint's."""

    tile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """See an image as a whole and, at its own size or at --size, through overlapping windows: for
    objects too small for one look."""

    refine: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Snap masks to the edges in the image, by a guided filter."""

    def __post_init__(self) -> None:
        if self.size is not None:
            height, width = self.sides()
            if height < 1 or width < 1 or height * width > MAX_LOOK_PX:
                raise UsageError(
                    f"--size {self.size}: must be of 1 to {MAX_LOOK_PX:,} pixels, 4096 squared"
                )

    @property
    def given(self) -> bool:
        """Whether any is."""
        return self != FineOptions()

    def sides(self) -> tuple[int, int]:
        """(height, width) of a given --size; of one number twice the number."""
        match = re.fullmatch(r"([0-9]{1,6})(?:[xX]([0-9]{1,6}))?", self.size or "")
        if match is None:
            raise UsageError(f"--size {self.size}: must be a number such as 704, or 704x1056")
        return int(match[1]), int(match[2] or match[1])

    @property
    def keeps_aspect(self) -> bool:
        """Whether --size is the longer side alone."""
        return (self.size or "").isdigit()

    def fingerprint(self) -> dict[str, Any]:
        """Those given: nothing without any, as in runs from before these options."""
        size = "x".join(map(str, self.sides())) if self.size else None
        size = self.size if self.keeps_aspect else size
        known = {"size": size, "tile": self.tile, "refine": self.refine}
        return {name: value for name, value in known.items() if value}


FINE = tuple(each.name for each in fields(FineOptions))
"""Their names in a fingerprint, where they are given."""
