"""clipseg-ray: CLIPSeg and CLIP over image shards, as a streaming batch pipeline on Ray Data.

The rooms in the order of the flow. A room imports only from rooms above it; the jobs import all.

    errors        the tree of errors, and the reasons for which an image or a shard can fail
    schema        the columns of every table and hand-over
    storage/      local disk and object stores: list, read, write whole files
    config/       the options of every job, one file a job, and the command line made from them
    read/         input -> shards -> records of encoded bytes
    prepare/      encoded bytes -> upright RGB -> uint8 pixels at the model's size
    model/        CLIP and CLIPSeg in torch alone: towers, decoder, tokenizer, weights
    infer/        checkpoints, prompts and devices; the actors that segment, embed, classify
    write/        rows -> fragments -> parts and receipts; every name in OUTPUT
    run/          one run from open to close, on Ray
    annotations/  labels and pictures made from finished tables of masks and maps
    embeddings/   search, duplicates and indexes over a finished table of embeddings
    demo/         the bundled model and shards, and the scripts that made them

For code of one's own: `segment`, `embed` and `classify` for Ray Data, `CLIPSeg` for one picture.
They are imported when they are asked for: neither Ray nor torch is needed before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.infer.picture import CLIPSeg
    from pipeline.run.entry import classify, embed, segment

__all__ = ["CLIPSeg", "classify", "embed", "segment"]

__version__ = "0.1.0"

_FROM = {"CLIPSeg": "pipeline.infer.picture"} | dict.fromkeys(
    ("segment", "embed", "classify"), "pipeline.run.entry"
)


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
