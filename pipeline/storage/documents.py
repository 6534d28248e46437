"""JSON files from strangers, read within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError

JSON_LIMIT_BYTES = 64 << 20  # the largest such file, CLIP's tokenizer.json, has 3.6 MB


def read_json(path: Path, limit_bytes: int = JSON_LIMIT_BYTES) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError, naming the file, for anything else.

    A file over `limit_bytes`, an object with the same key twice and nesting without end are
    refused.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise CheckpointError(f"{path}: larger than {limit_bytes:,} bytes")
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold an object, not a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has the same key twice")
    return result
