"""Texts -> embeddings independent of the texts beside them.

Prompts, labels and queries are encoded here. The last bits of a row depend on the shape of its
matrix product. On a CPU every text runs alone (see device.Device); on a GPU a slice has SLICE_ROWS
rows, repeated if texts are missing, and a length set by the text's own tokens.

Shapes: P texts, U different ones, L tokens, E projection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from pipeline.errors import UsageError, one_line
from pipeline.infer.device import Device
from pipeline.model.clip import TextTower
from pipeline.model.tokenizer import Tokenizer

SLICE_ROWS = 32
CHUNK_TEXTS = 256  # encoded between two reports of progress
LENGTH_STEP, SHORTEST = 8, 16  # of the lengths that texts are padded to; below 16 bits may change
NAMED = 5  # texts in one line, before the others are only counted

Row = tuple[int, ...]
Progress = Callable[[int, int], None]  # told how many texts or labels are done, and of how many


def encode_texts(
    encode: Callable[[Tensor, Tensor], Tensor],
    tower: TextTower,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: Device,
    on_progress: Progress | None = None,
) -> Tensor:
    """Projected embeddings (P, E) of at least one text, float32 on the CPU, not normalised.

    `encode` is the encode_text of `tower`'s model, on `device`. A text has the same embedding bit
    for bit whatever texts stand beside it, and texts of the same tokens are encoded once. Progress
    counts different texts.
    """
    longest = longest_text(tower)
    rows = [tuple(ids) for ids in tokenizer.frame(texts, longest)[0]]
    different = sorted(set(rows), key=lambda ids: (len(ids), ids))
    vectors: list[Tensor] = []
    for start in range(0, len(different), CHUNK_TEXTS):
        slices = list(_slices(different[start : start + CHUNK_TEXTS], longest, device))
        padded = [tokenizer.pad(some, length) for some, length, _ in slices]
        columns = [
            [tensor.to(device.torch) for tensor in column] for column in zip(*padded, strict=True)
        ]
        found = device.run(encode, *columns)
        vectors += [v[:n].float().cpu() for v, (_, _, n) in zip(found, slices, strict=True)]
        if on_progress:
            on_progress(min(start + CHUNK_TEXTS, len(different)), len(different))
    places = {row: place for place, row in enumerate(different)}
    return torch.cat(vectors)[[places[row] for row in rows]]


def _slices(
    rows: Sequence[Row], longest: int, device: Device
) -> Iterator[tuple[list[Row], int, int]]:
    """(rows to run at once, the length to pad them to, how many of them count), in order.

    A row running alone is not padded.
    """
    if device.alone:
        yield from (([row], len(row), 1) for row in rows)
        return
    for length, alike in groupby(rows, lambda ids: _padded_length(len(ids), longest)):
        some = list(alike)
        for i in range(0, len(some), SLICE_ROWS):
            part = some[i : i + SLICE_ROWS]
            yield part + part[:1] * (SLICE_ROWS - len(part)), length, len(part)


def _padded_length(tokens: int, longest: int) -> int:
    return min(max(SHORTEST, -(-tokens // LENGTH_STEP) * LENGTH_STEP), longest)


def longest_text(tower: TextTower) -> int:
    """Maximum number of tokens in a text, bos and eos among them."""
    return tower.embeddings.position_embedding.num_embeddings


def find_cut(
    tower: TextTower,
    tokenizer: Tokenizer,
    names: Sequence[str],
    what: str,
    templates: Sequence[str] = ("{}",),
) -> list[str]:
    """The names too long for the model in some of the templates: only their beginning is read.

    Raises UsageError for two different names cut to the same tokens; `what` they are there:
    "prompt".
    """
    longest = longest_text(tower)
    found: dict[str, None] = {}
    seen: dict[bytes, str] = {}
    for name in names:
        texts = [template.replace("{}", name) for template in templates]
        if all(text.isascii() and len(text) + 2 < longest for text in texts):
            continue  # no token is shorter than a byte; saves a minute of 22,000 labels' time
        rows, cut = tokenizer.frame(texts, longest)
        if any(cut):
            found[name] = None
        if any(len(row) == longest for row in rows):  # what just fits may equal what was cut
            key = hashlib.sha256(repr(rows).encode()).digest()
            first = seen.setdefault(key, name)
            if first != name and (first in found or name in found):
                raise UsageError(
                    f"the {what}s {one_line(first, 60)!r} and {one_line(name, 60)!r} do not differ "
                    f"in the {longest - 2} tokens that the model reads; shorten them"
                )
    return list(found)


def describe_cut(texts: Sequence[str], what: str, longest: int) -> list[str]:
    """A line naming texts longer than the model reads; none without any."""
    return name_texts(texts, what, f"longer than the {longest - 2} tokens that the model reads")


def name_texts(texts: Sequence[str], what: str, says: str) -> list[str]:
    """A line with the number of texts, the first few, and what is true of them."""
    if not texts:
        return []
    named = ", ".join(repr(one_line(text, 60)) for text in texts[:NAMED])
    more = f" and {len(texts) - NAMED:,} more" if len(texts) > NAMED else ""
    return [f"{len(texts):,} {what}{'s are' if len(texts) > 1 else ' is'} {says}: {named}{more}"]


def describe_vocabulary(tower: TextTower, tokenizer: Tokenizer) -> list[str]:
    """A line if the tokenizer has fewer tokens than the model; else none.

    Harmless if the table was only rounded up; else a file with added tokens is missing.
    """
    has, rows = tokenizer.vocab_size, tower.embeddings.token_embedding.num_embeddings
    if has >= rows:
        return []
    return [
        f"the tokenizer has {has:,} tokens and the model {rows:,}: is a file of added tokens "
        "missing (added_tokens.json, tokenizer.json)?"
    ]
