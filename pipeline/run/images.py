"""The source of a finished run's images, for any later look at them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from pipeline import storage
from pipeline.config.options import ImageOptions
from pipeline.errors import NotFoundError, UsageError
from pipeline.read.inputs import list_shards
from pipeline.read.shard import Shard, as_phrases
from pipeline.run.manifest import name_run
from pipeline.write.layout import RUN, Ledger
from pipeline.write.receipts import receipts_of

_DEEPEST = 8  # runs made from runs


@dataclass(frozen=True, kw_only=True)
class Images:
    """The source of a table's images."""

    output: str
    """The folder of the run that read them."""
    run: str
    """As manifest.name_run gives it."""
    source: str
    """Its input."""
    image_column: str | None
    text_column: str | None
    """Of a run that read texts, too: they belong to the versions of its shards."""
    member_suffix: str | None
    max_pixels: int


def find_images(output: str) -> Images:
    """The images of the run in the folder `output`, or of the run it was made from.

    Raises UsageError if a record does not tell, StorageError.
    """
    for _ in range(_DEEPEST):
        uri = storage.join(output, RUN)
        try:
            record = json.loads(storage.read_bytes(uri))
            config = record["config"]
            options = {**config, **config.get("images", {})}
            found = Images(
                output=output,
                run=name_run(record),
                source=options["input"],
                image_column=options.get("image_column"),
                text_column=_text_column(options),
                member_suffix=options.get("member_suffix"),
                max_pixels=options.get("max_pixels", ImageOptions.max_pixels),
            )
            from_run = storage.exists(storage.join(found.source, RUN))
        except NotFoundError as error:
            raise UsageError(f"{uri} is gone, which says where the images are") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{uri} does not say where the images are") from error
        if not from_run:
            return found
        output = found.source
    raise UsageError(f"{output}: a run that was made from itself")


def _text_column(options: dict[str, Any]) -> str | None:
    phrases: str | None = options.get("prompt_column")
    return as_phrases(phrases) if phrases else options.get("text_column")


def find_shards(images: Images, *, texts: bool = False) -> dict[str, Shard]:
    """The shards there now, by name; with `texts` such as read texts beside the images.

    Raises UsageError, StorageError as list_shards.
    """
    listed = list_shards(
        images.source,
        image_column=images.image_column,
        text_column=images.text_column,
        member_suffix=images.member_suffix,
    )
    return {shard.name: shard if texts else replace(shard, text="") for shard in listed.shards}


def is_unchanged(images: Images, shard: Shard) -> bool:
    """Whether the shard is what the run read: then its receipt has this name."""
    return bool(receipts_of(Ledger(output=images.output, run=images.run), shard))
