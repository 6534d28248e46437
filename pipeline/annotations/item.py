"""One image of an export, as it is handed to the writer of a format; and what all writers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.annotations.labelled import LabelledImage


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image with its place in the export."""

    image: LabelledImage
    number: int
    """From 1, over all splits."""
    split: str
    name: str
    """Of its files, without ending."""
    file: str
    """The image's file name, also where it is not written."""
    data: bytes | None
    """The image's file; None with --images none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of the image, for formats with a place for them."""


class Writer(Protocol):
    """Interface of a format's module: made of a Destination, the classes and the splits."""

    def add(self, item: Item) -> None:
        """Write one image and its annotations."""
        ...

    def close(self) -> list[str]:
        """Write what comes last. Returns lines on what was left out, then on how to open it."""
        ...
