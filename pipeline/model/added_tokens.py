"""The tokens beside a tokenizer's vocabulary, and the special ones among them.

Four files of a checkpoint folder name them, and their order decides the ids of those outside the
vocabulary. The precedence, quirks included, is that of transformers' tokenization_utils_base.py
(`_from_pretrained`) and tokenization_utils_tokenizers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pipeline.errors import CheckpointError
from pipeline.storage.documents import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
# The special tokens a configuration can name, in the order in which they are registered.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

Value = str | AddedToken  # two of the same content are the same only if both are strings


def read_special_tokens(
    folder: Path, listed: dict[int, AddedToken]
) -> tuple[dict[str, str], list[AddedToken]]:
    """(contents of the named special tokens, every token to register in this order).

    `listed`: tokenizer.json's added tokens by id. They, special_tokens_map.json and
    added_tokens.json count only if tokenizer_config.json has no `added_tokens_decoder`.
    CheckpointError names the malformed file.
    """
    path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json(path) if path.is_file() else {}
    named, extra = _read_named(path, config), _read_extra(path, config)
    mapped: dict[str, Value] = {}
    late: list[Value] | None = None
    if isinstance(config.get("extra_special_tokens"), dict):
        extra, late = None, extra
    if (decoder := config.get("added_tokens_decoder")) is not None:
        if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
            raise CheckpointError(f"{path}: added_tokens_decoder must map ids to tokens")
        entries = [{**_as_dict(path, token), "id": int(i)} for i, token in decoder.items()]
        added = read_added(path, entries)
    else:
        if map_path.is_file():
            table = read_json(map_path)
            mapped = _read_named(map_path, table, special=True)
            if isinstance(table.get("extra_special_tokens"), list):
                more = _read_extra(map_path, table) or []
                extra = [*(extra or []), *(token for token in more if token not in (extra or []))]
            elif extra is None and "additional_special_tokens" in table:
                late = _read_extra(map_path, table)
        # An object in tokenizer_config.json does not make its content special there.
        spelled = {v for k, v in (named | mapped).items() if k in NAMES and isinstance(v, str)}
        spelled |= {v.content for k, v in mapped.items() if k in NAMES and not isinstance(v, str)}
        spelled |= {v for v in extra or [] if isinstance(v, str)}
        added = _read_legacy(folder / "added_tokens.json", spelled) | listed
    values = DEFAULTS | named | mapped
    names = [key for key in NAMES if key in values]
    names += [key for key in (*mapped, *named) if key not in names]
    special = {key: values[key] for key in names}
    contents = {key: v if isinstance(v, str) else v.content for key, v in special.items()}
    tokens = _register(
        [added[i] for i in sorted(added)],
        [*special.values(), *(late or [] if extra is None else extra)],
    )
    for token in tokens:
        token.special = token.special or token.content in contents.values()
    return {key: value for key, value in contents.items() if key in NAMES}, tokens


def read_added(path: Path, entries: Any) -> dict[int, AddedToken]:
    """Tokens by id, of a list of objects as tokenizer.json holds it. Raises CheckpointError."""
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: added_tokens must be a list")
    dicts = [_as_dict(path, entry) for entry in entries]
    for entry in dicts:
        if type(entry.get("id")) is not int:
            raise CheckpointError(f"{path}: an added token without an id: {str(entry)[:80]}")
    return {entry["id"]: _read_token(path, entry) for entry in dicts}


def _read_legacy(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """Tokens by id, of an added_tokens.json as transformers before 4.34 saved it."""
    table = read_json(path) if path.is_file() else {}
    for content, token_id in table.items():
        if not content or type(token_id) is not int:
            raise CheckpointError(f"{path}: must map tokens to ids, not {str(content)[:40]!r}")
    return {
        token_id: AddedToken(content, normalized=content not in special, special=content in special)
        for content, token_id in table.items()
    }


def _register(tokens: list[AddedToken], values: list[Value]) -> list[AddedToken]:
    """The tokens, and behind them the values naming none of them."""
    known, more = {token.content for token in tokens}, list[Value]()
    for value in values:
        if (value if isinstance(value, str) else value.content) not in known and value not in more:
            more.append(value)
    strings = {v: AddedToken(v, special=True, normalized=False) for v in more if isinstance(v, str)}
    return tokens + [strings[v] if isinstance(v, str) else v for v in more]


def _read_named(path: Path, table: dict[str, Any], *, special: bool = False) -> dict[str, Value]:
    """Tokens named by a file, as `pad_token` or in `extra_special_tokens` by name.

    `special`: whether all are, whatever their objects say.
    """
    found = {key: value for key, value in table.items() if key.endswith("_token") and value}
    found = {k: v for k, v in found.items() if k in NAMES or isinstance(v, str | dict)}
    by_name = table.get("extra_special_tokens")
    if isinstance(by_name, dict):
        found |= by_name
    return {key: _read_value(path, value, special=special) for key, value in found.items()}


def _read_extra(path: Path, table: dict[str, Any]) -> list[Value] | None:
    """The special tokens without a name, None if the file does not mention them."""
    extra, older = table.get("extra_special_tokens"), table.get("additional_special_tokens")
    if not isinstance(extra, list) or not extra:
        extra = older if "additional_special_tokens" in table else extra
    if isinstance(extra, list):
        return [_read_value(path, value, special=False) for value in extra]
    return None


def _read_value(path: Path, value: Any, *, special: bool) -> Value:
    """A token as the files write it: its text, or an object with flags."""
    if isinstance(value, str) and value:
        return value
    entry = _as_dict(path, value)
    return _read_token(path, {**entry, "special": True} if special else entry)


def _read_token(path: Path, entry: dict[str, Any]) -> AddedToken:
    content, special = entry.get("content"), entry.get("special", False)
    flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
    wrong = {*map(type, [*flags.values(), special])} - {bool}
    if not isinstance(content, str) or not content or wrong:
        raise CheckpointError(f"{path}: not an added token: {str(entry)[:80]}")
    return AddedToken(content, special=special, **flags)


def _as_dict(path: Path, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: not an added token: {json.dumps(entry)[:80]}")
    return entry
