"""Token ids equal transformers' CLIPTokenizer, whatever form of tokenizer a folder holds."""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_with, small_merges, vocabulary, write_tokenizer_json, write_vocabulary
from hard_strings import STRINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTokenizer, CLIPTokenizerFast

from pipeline.errors import CheckpointError
from pipeline.model.tokenizer import Tokenizer

# OpenAI's own merges (MIT licence); too large to ship, so these tests run where someone has them.
DATA = Path(os.environ.get("CLIPSEG_RAY_DATA") or Path(__file__).parents[2] / "shared" / "data")
REAL_MERGES = DATA / "bpe_simple_vocab_16e6.txt.gz"


def token(content: str, *, normalized: bool = True, **more: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": content, "normalized": normalized, **flags, **more}


START, END = token("<|startoftext|>"), token("<|endoftext|>")
# As openai/clip-vit-base-patch32 has them: the pad token is a plain string.
OLD_MAP = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "<|endoftext|>"}
OLD_CONFIG = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
} | {key: value | {"__type": "AddedToken"} for key, value in list(OLD_MAP.items())[:3]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for every form of the small tokenizer; `real` and `real-json` where possible."""
    root = tmp_path_factory.mktemp("tokenizers")
    files = write_vocabulary(root / "files")
    end = len(vocabulary(small_merges())) - 1
    decoder = {f"{end - 1}": START | {"special": True}, f"{end}": END | {"special": True}}
    plain = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    old = OLD_CONFIG | {"pad_token": "<|endoftext|>"}
    copy_with(files, root / "old", tokenizer_config=old, special_tokens_map=OLD_MAP)
    copy_with(files, root / "map", special_tokens_map=OLD_MAP)
    copy_with(
        files,
        root / "decoder",
        tokenizer_config=old | plain | {"added_tokens_decoder": decoder},
        special_tokens_map=OLD_MAP,
    )
    copy_with(
        files,
        root / "pad",
        tokenizer_config=OLD_CONFIG | {"pad_token": "!"},
        special_tokens_map=OLD_MAP | {"pad_token": "!"},
    )
    copy_with(
        files,
        root / "extra",
        tokenizer_config=OLD_CONFIG | {"additional_special_tokens": ["[NEW]", "cat"]},
    )
    named = {"extra_special_tokens": {"new_token": "[NEW]", "cat_token": "cat"}}
    copy_with(files, root / "named", tokenizer_config=OLD_CONFIG | named)
    # As transformers before 4.34 saved tokens that were added to a vocabulary.
    new = {"<my-cat>": end + 1, "New Word": end + 2, "Star": end + 3}
    copy_with(files, root / "added", added_tokens=new)
    copy_with(
        files,
        root / "added-special",
        added_tokens={**dict(reversed(new.items())), "<|endoftext|>": end},
        tokenizer_config=OLD_CONFIG | {"mask_token": "New Word"},
        special_tokens_map=OLD_MAP | {"cls_token": token("Star", rstrip=True)},
    )
    write_tokenizer_json(files, root / "json")
    odd = json.loads((root / "json" / "tokenizer.json").read_text())
    odd["truncation"] = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst"}
    odd["truncation"]["stride"] = 0
    odd["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": 8}
    odd["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    odd["model"]["merges"] = [" ".join(merge) for merge in odd["model"]["merges"]]
    odd["added_tokens"] += [
        {"id": 300, "special": False} | token("cat", single_word=True, normalized=False)
    ]
    copy_with(root / "json", root / "odd-json", tokenizer=odd)
    (root / "odd-json" / "tokenizer_config.json").unlink()
    if REAL_MERGES.is_file():
        lines = gzip.decompress(REAL_MERGES.read_bytes()).decode().split("\n")[1:48895]
        write_vocabulary(root / "real", [(a, b) for a, b in map(str.split, lines)])
        write_tokenizer_json(root / "real", root / "real-json")
    for folder in root.iterdir():
        (folder / "config.json").write_text('{"model_type": "clipseg"}')
    return root


SMALL = ["files", "old", "map", "decoder", "pad", "extra", "named", "json", "odd-json"]
SMALL += ["added", "added-special"]


@pytest.fixture(scope="session", params=[*SMALL, "real", "real-json"])
def folder(request: pytest.FixtureRequest, folders: Path) -> Path:
    if not (path := folders / request.param).is_dir():
        pytest.skip(f"no {REAL_MERGES.name} in CLIPSEG_RAY_DATA")
    return path


@functools.cache
def load(folder: Path) -> tuple[Tokenizer, CLIPTokenizer]:
    return Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def test_ids_equal_transformers(folder: Path) -> None:
    ours, oracle = load(folder)
    # One file asks for the left, which is never the model's.
    oracle.padding_side = oracle.truncation_side = "right"
    assert len(STRINGS) > 250
    for text in STRINGS:
        assert ours.encode(text) == oracle(text)["input_ids"], text
    for length in (77, 16, 2):
        wanted = oracle(
            STRINGS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids, mask = ours(STRINGS, max_length=length)
        assert torch.equal(ids, wanted["input_ids"])
        assert torch.equal(mask, wanted["attention_mask"])
        assert ids.dtype == mask.dtype == torch.int64


def test_auto_tokenizer_agrees(folder: Path) -> None:
    assert CLIPTokenizerFast is CLIPTokenizer
    (ours, _), oracle = load(folder), AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(text) for text in STRINGS] == oracle(STRINGS)["input_ids"]
    wanted = (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == wanted
    assert ours.vocab_size == len(oracle)


def test_decode_and_special_tokens_mask_equal_transformers(folder: Path) -> None:
    ours, oracle = load(folder)
    for text in STRINGS:
        ids = ours.encode(text, max_length=77)
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), text
        mask = oracle.get_special_tokens_mask(ids, already_has_special_tokens=True)
        assert ours.special_tokens_mask(torch.tensor(ids)).tolist() == mask
    assert ours.decode(torch.tensor([0, 1])) == oracle.decode([0, 1])


def test_padded_batches_and_their_masks_equal_transformers(folder: Path) -> None:
    ours, oracle = load(folder)
    oracle.padding_side = oracle.truncation_side = "right"
    # Without tokens that a folder declares special: on these transformers' two masks differ.
    texts = ["", "a dog", "the red circle of a dog, don't ...", "12 blue stars " * 9]
    for length in (77, 9):
        wanted = oracle(
            texts,
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        ids, mask = ours(texts, length, pad_to_longest=True)
        assert torch.equal(ids, wanted["input_ids"])
        assert torch.equal(mask, wanted["attention_mask"])
        assert torch.equal(ours.special_tokens_mask(ids), wanted["special_tokens_mask"])
        for skip in (True, False):
            decoded = [ours.decode(row, skip) for row in ids]
            assert decoded == oracle.batch_decode(wanted["input_ids"], skip_special_tokens=skip)


FRAGMENTS = [
    "<|endoftext|>",
    "<|startoftext|>",
    "</w>",
    "'s",
    "'LL",
    " ",
    "cat",
    "猫",
    "😀",
    "\u0301",
]


# No two that are one in lower case: which of them matches is chance in the reference.
NAMES = ["<my-cat>", "Cat", "<b>", "dog", "[PAD]", "New Word", " sp ", "é", "!", "<|endoftext|>"]
ADDED_TEXTS = ["a <my-cat> on", "A CAT cats Cat", "red<b>dog the[PAD]x", "New Word newword [pad]"]
ADDED_TEXTS += [
    "é cat !",
    "x  sp  y",
    "a<|endoftext|>b !",
    "<MY-CAT> red dog cat<my-cat>dog <b> <b>é",
]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Draw:
    """Tokenizer files with added and special tokens wherever transformers looks for them."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def token(self, name: str | None = None, **more: Any) -> Any:
        name = name or self.random.choice(NAMES)
        flags = {f: self.random.random() < 0.4 for f in FLAGS if self.random.random() < 0.8}
        return {"content": name} | flags | more

    def value(self) -> Any:
        if self.random.random() < 0.5:
            return self.random.choice(NAMES)
        return self.token(__type="AddedToken")

    def by_id(self) -> dict[str, int]:
        """Some names with an id, their own or a new one, in any order."""
        vocab = vocabulary(small_merges())
        names = self.random.sample(NAMES, 3)
        new = iter(self.random.sample(range(len(vocab), len(vocab) + 3), 3))
        return {name: vocab[name] if name in vocab else next(new) for name in names}

    def files(self) -> dict[str, Any]:
        maybe, drawn = self.random.random, {}
        config = {"bos_token": "<|startoftext|>"}
        for key in ("pad_token", "mask_token", "image_token"):
            config |= {key: self.value()} if maybe() < 0.4 else {}
        extra = self.random.choice(["additional_special_tokens", "extra_special_tokens", "none"])
        config |= {extra: [self.value(), self.value()]} if extra != "none" else {}
        if maybe() < 0.2:
            config |= {"extra_special_tokens": {"x_token": self.random.choice(NAMES)}}
        if maybe() < 0.3:
            places = {str(i): self.token(name) for name, i in self.by_id().items()}
            config |= {"added_tokens_decoder": places}
        if maybe() < 0.7:
            drawn["tokenizer_config"] = config
        if maybe() < 0.7:
            drawn["added_tokens"] = self.by_id()
        if maybe() < 0.5:
            mapped = {"pad_token": self.token(), "additional_special_tokens": ["[PAD]"]}
            drawn["special_tokens_map"] = mapped
        return drawn


@pytest.mark.parametrize("source", ["files", "json"])
def test_added_tokens_wherever_they_stand(folders: Path, tmp_path: Path, source: str) -> None:
    for seed in range(25):
        draw = Draw(seed)
        folder = copy_with(folders / source, tmp_path / str(seed), **draw.files())
        if source == "json":
            data = json.loads((folder / "tokenizer.json").read_text())
            flags = dict.fromkeys(FLAGS, False)
            data["added_tokens"] += [
                flags | draw.token(name) | {"id": i}
                for name, i in draw.by_id().items()
                if name != "<|endoftext|>"
            ]
            (folder / "tokenizer.json").write_text(json.dumps(data))
        ours, oracle = Tokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)
        for text in ADDED_TEXTS:
            assert ours.encode(text) == oracle(text)["input_ids"], (seed, text)
        assert (ours.pad_id, ours.vocab_size) == (oracle.pad_token_id, len(oracle))


@given(text=st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS) | st.text()).map("".join)))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("form", ["json", "decoder"])
def test_generated_strings(folders: Path, form: str, text: str) -> None:
    ours, oracle = load(folders / form)
    assert ours.encode(text) == oracle(text)["input_ids"]


def test_end_stays_when_truncated(folders: Path) -> None:
    tokenizer = Tokenizer.from_folder(folders / "files")
    ids, mask = tokenizer(["the cat " * 100, "a cat"])
    assert ids.shape == mask.shape == (2, 77)
    assert ids[0, 0] == ids[1, 0] == tokenizer.bos_id
    assert ids[0, -1] == ids[1, 3] == tokenizer.eos_id
    assert mask.sum(1).tolist() == [77, 4]
    assert tokenizer.vocab_size == tokenizer.eos_id + 1


def test_pad_token_of_its_own(folders: Path) -> None:
    tokenizer = Tokenizer.from_folder(folders / "pad")
    ids, mask = tokenizer(["a cat"], max_length=6)
    assert ids[0, 4:].tolist() == [0, 0]
    assert mask[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_the_hash_tells_tokenizers_apart(folders: Path, tmp_path: Path) -> None:
    """By what they do: merges in another order, another pad token, one more special token."""
    first, *others = small_merges()
    write_vocabulary(tmp_path, [*others, first])
    some = [tmp_path, *(folders / name for name in ("files", "pad", "extra"))]
    hashes = [Tokenizer.from_folder(folder).content_hash for folder in some]
    assert len(set(hashes)) == len(some)
    assert Tokenizer.from_folder(folders / "files").content_hash == hashes[1]


def test_pad_to_longest(folders: Path) -> None:
    tokenizer = Tokenizer.from_folder(folders / "files")
    assert tokenizer(["a cat", "a"], pad_to_longest=True)[0].shape == (2, 4)
    assert tokenizer(["cat " * 99, "a"], 9, pad_to_longest=True)[0].shape == (2, 9)
    assert tokenizer([])[0].shape == (0, 77)


def test_lone_surrogates_are_replaced(folders: Path) -> None:
    tokenizer = Tokenizer.from_folder(folders / "files")
    assert tokenizer.encode("a \udc80 cat") == tokenizer.encode("a \ufffd cat")


def test_wrong_calls(folders: Path) -> None:
    tokenizer = Tokenizer.from_folder(folders / "files")
    with pytest.raises(ValueError, match="at least 2"):
        tokenizer(["a"], max_length=1)
    with pytest.raises(ValueError, match="list of strings"):
        tokenizer("a cat")


VOCAB = vocabulary(small_merges())
BPE = {"type": "BPE", "vocab": VOCAB, "merges": []}
HOSTILE_FILES = {
    "vocab-list": ("vocab.json", "[]"),
    "vocab-empty": ("vocab.json", "{}"),
    "vocab-no-json": ("vocab.json", "{"),
    "vocab-binary": ("vocab.json", b"\xff\xfe\x00\x80"),
    "vocab-nested": ("vocab.json", '{"a":' * 100_000),
    "vocab-negative": ("vocab.json", json.dumps(VOCAB | {"a": -1})),
    "vocab-huge": ("vocab.json", json.dumps(VOCAB | {"a": 10**30})),
    "vocab-float": ("vocab.json", json.dumps(VOCAB | {"a": 1.5})),
    "vocab-same-id": ("vocab.json", json.dumps(VOCAB | {"a": 1})),
    "vocab-same-key": ("vocab.json", '{"a": 0, "a": 1}'),
    "vocab-digits": ("vocab.json", '{"a": ' + "9" * 5000 + "}"),
    "vocab-no-end": ("vocab.json", json.dumps({t: i for t, i in VOCAB.items() if "end" not in t})),
    "merges-three": ("merges.txt", "a b c\n"),
    "merges-unknown": ("merges.txt", "qq zz\n"),
    "merges-product": ("merges.txt", "q z\n"),
    "merges-binary": ("merges.txt", b"\xff\xfe\x00"),
    "json-list": ("tokenizer.json", "[1]"),
    "json-no-model": ("tokenizer.json", "{}"),
    "json-unigram": ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}'),
    "json-no-vocab": ("tokenizer.json", '{"model": {"type": "BPE", "merges": []}}'),
    "json-merges": ("tokenizer.json", json.dumps({"model": BPE | {"merges": [["a", 1]]}})),
    "json-merges-dict": ("tokenizer.json", json.dumps({"model": BPE | {"merges": {}}})),
    "json-merge-dict": ("tokenizer.json", json.dumps({"model": BPE | {"merges": [{"a": "b"}]}})),
    "json-nested-merge": (
        "tokenizer.json",
        json.dumps({"model": BPE | {"merges": [[["a"], "b"]]}}),
    ),
    "json-added": ("tokenizer.json", json.dumps({"model": BPE, "added_tokens": ["x"]})),
    "json-added-id": ("tokenizer.json", json.dumps({"model": BPE, "added_tokens": [{"id": "x"}]})),
    "json-added-flag": (
        "tokenizer.json",
        json.dumps({"model": BPE, "added_tokens": [token("a", lstrip=3, id=1)]}),
    ),
    "config-list": ("tokenizer_config.json", "[]"),
    "config-bos": ("tokenizer_config.json", '{"bos_token": 3}'),
    "config-bos-unknown": ("tokenizer_config.json", '{"bos_token": "[CLS]"}'),
    "config-eos-list": ("tokenizer_config.json", '{"eos_token": ["a"]}'),
    "config-decoder": ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
    "config-decoder-list": ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
    "added-list": ("added_tokens.json", "[]"),
    "added-text": ("added_tokens.json", '{"<a>": "5"}'),
    "added-empty": ("added_tokens.json", '{"": 5}'),
    "map-pad": ("special_tokens_map.json", '{"pad_token": {"content": 1}}'),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_hostile_files_are_named(folders: Path, tmp_path: Path, case: str) -> None:
    name, content = HOSTILE_FILES[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(folders / "files", folder)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        Tokenizer.from_folder(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_files_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"merges\.txt"):
        Tokenizer.from_folder(tmp_path)
