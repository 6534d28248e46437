"""Text to token ids: CLIP's byte-level BPE, on the `tokenizers` library alone.

Stands beside the text tower: what it returns is what `input_ids` and `attention_mask` of the
models take. The vocabulary and merges come from the folder's tokenizer.json if there is one, else
from vocab.json and merges.txt; everything else (normaliser, pre-tokenizer, special tokens) is
CLIP's own and is built here, as transformers' CLIPTokenizer does, whatever else a tokenizer.json
asks for.

Shape letters: P texts, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.added_tokens import END, START, read_added, read_special_tokens
from pipeline.storage.documents import read_json

SUFFIX = "</w>"  # ends the last symbol of every word

# transformers models/clip/tokenization_clip.py; openai/CLIP simple_tokenizer.py
PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# An id above this would ask for an embedding table that no checkpoint has (CLIP's ends at 49,407).
MAX_ID = 1 << 24


class Tokenizer:
    """Texts -> ids, as transformers' CLIPTokenizer gives them for the same folder.

    Attributes, all ids in the vocabulary: `bos_id` opens every text, `eos_id` closes it and is what
    the text tower pools at, `pad_id` fills up to the length; `special_ids` are all ids without a
    text of their own. `content_hash` changes with anything that may change ids; "" without a
    folder.
    """

    def __init__(
        self,
        backend: Backend,
        bos: str = START,
        eos: str = END,
        pad: str = END,
        content_hash: str = "",
    ):
        """Wrap `backend`, which neither truncates, pads nor adds special tokens.

        KeyError if one of the three special tokens is missing from the vocabulary.
        """
        self.backend, self.content_hash = backend, content_hash
        vocab = backend.get_vocab(with_added_tokens=True)
        ids = {token: vocab[token] for token in (bos, eos, pad)}
        self.bos_id, self.eos_id, self.pad_id = ids[bos], ids[eos], ids[pad]
        added = backend.get_added_tokens_decoder()
        specials = {token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(specials | set(ids.values()))
        # The rows that the embedding table must have: one more than the highest id.
        self.vocab_size = max(vocab.values()) + 1

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, else vocab.json and merges.txt, of a checkpoint folder.

        The names of the special tokens, and how they match in a text, come from
        tokenizer_config.json and special_tokens_map.json if these say so. CheckpointError, naming
        the file, if one is missing, too large or not what it should be.
        """
        folder = Path(folder)
        source, vocab, merges, listed = _read_vocabulary(folder)
        text, added = read_special_tokens(folder, listed)
        tokens = [
            (t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special) for t in added
        ]
        decides = json.dumps([sorted(vocab.items()), merges, text, tokens])
        content_hash = hashlib.sha256(decides.encode()).hexdigest()[:16]
        backend = build_backend(vocab, merges, text["unk_token"])
        backend.add_tokens(added)
        for key in ("bos_token", "eos_token"):
            if text[key] not in vocab:  # a new id, behind the end of the embedding table
                raise CheckpointError(
                    f"{source}: lacks {text[key]!r}, which is {key} (see tokenizer_config.json)"
                )
        bos, eos, pad = (text[key] for key in ("bos_token", "eos_token", "pad_token"))
        return cls(backend, bos, eos, pad, content_hash)

    def __call__(
        self, texts: Sequence[str], max_length: int = 77, *, pad_to_longest: bool = False
    ) -> tuple[Tensor, Tensor]:
        """P texts -> (input_ids, attention_mask), both int64 (P, L), L = max_length.

        Every row is bos, the text, eos, padding; a text too long loses its end, never its eos. The
        mask is 1 up to and including that eos. With `pad_to_longest`, L is the longest row's
        length (at most max_length). ValueError for a max_length under 2, and for a string instead
        of a list.
        """
        rows, _ = self.frame(texts, max_length)
        length = max(map(len, rows), default=2) if pad_to_longest else max_length
        return self.pad(rows, length)

    def frame(self, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """(each text's ids between bos and eos, whether it lost its end), none padded.

        ValueError as in a call.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of strings, not one string")
        bare = self._encode(texts)
        cut = [len(ids) + 2 > max_length for ids in bare]
        return [self._frame(ids, max_length) for ids in bare], cut

    def pad(self, rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
        """(input_ids, attention_mask), int64 (P, length), of rows as `frame` returns them."""
        input_ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """The ids of one text between bos and eos, not padded; truncated if a length is given."""
        return self._frame(self._encode([text])[0], max_length)

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Ids of one text -> lower-case text, one space after every word, none at the ends.

        Bytes that are not UTF-8 come back as U+FFFD; ids outside the vocabulary are left out.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text = self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        return text.replace(SUFFIX, " ").strip()

    def special_tokens_mask(self, input_ids: Tensor) -> Tensor:
        """1 for an id without text (bos, eos, padding), else 0; int64, same shape."""
        specials = torch.tensor(sorted(self.special_ids), device=input_ids.device)
        return torch.isin(input_ids, specials).to(torch.int64)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the texts alone; lone surrogates, impossible in UTF-8, become U+FFFD."""
        clean = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
        encodings = self.backend.encode_batch_fast(clean, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _frame(self, ids: list[int], max_length: int | None) -> list[int]:
        if max_length is not None:
            if max_length < 2:
                raise ValueError(f"max_length must be at least 2 (bos and eos), not {max_length}")
            ids = ids[: max_length - 2]
        return [self.bos_id, *ids, self.eos_id]


def build_backend(vocab: dict[str, int], merges: list[tuple[str, str]], unk: str) -> Backend:
    """CLIP's tokenizer on a checked vocabulary (transformers clip/tokenization_clip.py)."""
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=SUFFIX,
            fuse_unk=False,
            unk_token=unk,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_vocabulary(
    folder: Path,
) -> tuple[Path, dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]:
    """(the file, vocabulary, merges, added tokens by their ids), all checked."""
    path = folder / "tokenizer.json"
    if path.is_file():
        data = read_json(path)
        model = data.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{path}: not a BPE tokenizer, so not CLIP's")
        vocab = _check_vocab(path, model.get("vocab"))
        merges = _check_merges(path, model.get("merges"), vocab)
        return path, vocab, merges, read_added(path, data.get("added_tokens") or [])
    path, merges_path = folder / "vocab.json", folder / "merges.txt"
    for needed in (path, merges_path):
        if not needed.is_file():
            raise CheckpointError(f"{folder}: has neither tokenizer.json nor {needed.name}")
    vocab = _check_vocab(path, read_json(path))
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{merges_path}: cannot be read: {error}") from error
    pairs = [line.rstrip("\r") for line in lines if line and not line.startswith("#version")]
    return path, vocab, _check_merges(merges_path, pairs, vocab), {}


def _check_vocab(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path}: the vocabulary must map tokens to ids")
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_ID:
            raise CheckpointError(f"{path}: token {token[:40]!r} has the id {str(token_id)[:40]!r}")
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{path}: two tokens have the same id")
    return vocab


def _check_merges(path: Path, merges: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Merges as pairs; each half and the whole must be tokens, or the library would fail."""
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: the merges must be a list")
    pairs: list[tuple[str, str]] = []
    for number, merge in enumerate(merges, 1):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(half, str) for half in pair)
            or not {*pair, "".join(pair)} <= vocab.keys()
        ):
            raise CheckpointError(f"{path}: merge {number} is not two tokens: {str(merge)[:80]!r}")
        pairs.append((pair[0], pair[1]))
    return pairs
