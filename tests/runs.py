"""Finished runs over small shards, as far as pages that show their images read them."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from pipeline import storage
from pipeline.embeddings.gallery import open_gallery
from pipeline.run.images import Images
from pipeline.run.manifest import name_run
from pipeline.write.layout import Ledger
from pipeline.write.receipts import write_receipt
from tests.shards import make_tar, shards_of


def picture(colour: tuple[int, int, int], form: str = "PNG", size: Any = (90, 60)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


COLOURS = [(200, 30, 40), (30, 160, 60), (40, 60, 220), (220, 180, 20), (150, 40, 180)]


def write_run(output: str, source: str, **options: Any) -> Images:
    """What a finished run leaves behind that the gallery reads: its record and receipts."""
    images = {"image_column": None, "max_pixels": 10**6}
    config = {"input": source, "images": images, **options}
    record = {"config": config, "fingerprint": config, "started_at": "2026-01-01T00:00:00"}
    storage.write_bytes(f"{output}/_run.json", json.dumps(record).encode())
    content = {"rows_ok": 1, "rows_error": 0, "samples_without_image": 0}
    content |= {"shard_error": None, "parts": []}
    for shard in shards_of(source, text_column=options.get("text_column")):
        write_receipt(Ledger(output=output, run=name_run(record)), shard, content)
    return open_gallery(output, 10)


def write_tar(folder: str, name: str = "a.tar", extra: bytes = b"") -> str:
    members = [(f"{i}.png", picture(colour)) for i, colour in enumerate(COLOURS)]
    storage.write_bytes(f"{folder}/{name}", make_tar(members) + extra)
    return folder
