"""The phrases taught to the bundled model, and a tokenizer small enough to ship with it.

A concept is a colour, a shape or a pair of both, and has several phrases. The tokenizer is CLIP's
in every respect but its vocabulary: 512 byte symbols, for any text, and the merges for one token a
word of the phrases.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, processors

from pipeline.demo.scenes import COLOURS, SEEN_PAIRS, SHAPES, Pair
from pipeline.model.added_tokens import END, START
from pipeline.model.tokenizer import SUFFIX, build_backend

MAX_TOKENS = 16

# What a model may be taught: (colour, shape), either of them empty.
CONCEPTS: tuple[Pair, ...] = (
    *((c, "") for c in COLOURS),
    *(("", s) for s in SHAPES),
    *SEEN_PAIRS,
)
_NAMED = ("{}", "a {}", "the {}", "a photo of a {}")  # for names that are nouns
_COLOUR = ("{}", "{}", "something {}", "a {} shape")


def phrases(concept: Pair) -> list[str]:
    """Every phrase for a concept, the plain one ("red circle", "star", "blue") first."""
    colour, shape = concept
    templates = _NAMED if shape else _COLOUR
    article = "an" if (colour or shape)[0] in "aeiou" else "a"
    name = f"{colour} {shape}".strip()
    return [t.replace("a {}", f"{article} {{}}").format(name) for t in templates]


def byte_symbols() -> list[str]:
    """The 256 printable characters for bytes 0..255, in the order of CLIP's vocabulary.

    Source: `bytes_to_unicode` of openai/CLIP, clip/simple_tokenizer.py.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    plain += range(ord("®"), ord("ÿ") + 1)
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until each word is a single symbol."""
    merges = []
    splits = [[*word[:-1], word[-1] + SUFFIX] for word in words]
    while any(len(split) > 1 for split in splits):
        counts = Counter(pair for split in splits for pair in pairwise(split))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        splits = [_merged(split, best) for split in splits]
    return merges


def _merged(split: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in split:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_tokenizer() -> Tokenizer:
    """CLIP's tokenizer over this module's words; ids of START and END are the last two."""
    every = [*CONCEPTS, *((c, s) for c in COLOURS for s in SHAPES)]
    words = sorted({word for concept in every for p in phrases(concept) for word in p.split()})
    merges = learn_merges(words)
    symbols = byte_symbols()
    symbols += [s + SUFFIX for s in symbols]
    symbols += ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = build_backend(vocabulary, merges, END)
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]),
        (START, vocabulary[START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, **special}
    for name, content in (("special_tokens_map", special), ("tokenizer_config", config)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
