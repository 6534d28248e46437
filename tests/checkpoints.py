"""Small checkpoints for tests, made and saved by transformers, which has the last word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTokenizer,
    PreTrainedModel,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Widths that differ from each other, so that a mix-up has the wrong shape.
TEXT = {
    "vocab_size": 557,  # of small_merges
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "bos_token_id": 555,
    "eos_token_id": 556,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
DECODER = {
    "extract_layers": [0, 1, 3],
    "reduce_dim": 12,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 20,
}
PROJECTION = 28

WORDS = ["a", "an", "the", "cat", "cats", "dog", "red", "blue", "circle", "star", "don", "can't"]
WORDS += ["photo", "of", "12", "é", "ß", "猫", "😀", "--", "...", "!!"]


def clipseg_config(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **changes: Any
) -> CLIPSegConfig:
    """A small CLIPSeg configuration; the arguments are what shall differ."""
    return CLIPSegConfig(
        text_config={**TEXT, **(text or {})},
        vision_config={**VISION, **(vision or {})},
        **{"projection_dim": PROJECTION, **DECODER, **changes},
    )


def small_clipseg(config: CLIPSegConfig | None = None, seed: int = 0) -> PreTrainedModel:
    """A random CLIPSeg whose logits are of order 1 and depend on the prompt.

    transformers draws the decoder with a standard deviation of 1, which gives logits up to 15,000.
    """
    torch.manual_seed(seed)
    model = CLIPSegForImageSegmentation(config or clipseg_config()).eval()
    for module in model.decoder.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def small_clip(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random CLIP with the towers of small_clipseg's sizes."""
    torch.manual_seed(seed)
    config = CLIPConfig(
        **{"text_config": TEXT, "vision_config": VISION, "projection_dim": PROJECTION, **changes}
    )
    return CLIPModel(config).eval()


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """The folder, filled by save_pretrained (max_shard_size="30KB" makes shards)."""
    model.save_pretrained(folder, **options)
    return folder


def save_bin(model: PreTrainedModel, folder: Path) -> Path:
    """The folder with config.json and a pytorch_model.bin alone, as old ones have it."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def on_meta(model: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return model(config)


def empty_clipseg(config: Any = None) -> nn.Module:
    """transformers' own module without weights, for what is loaded to go to."""
    module = on_meta(transformers.CLIPSegForImageSegmentation, config or clipseg_config())
    return without_buffers(module)


def without_buffers(module: nn.Module) -> nn.Module:
    """Without the buffers that are in no checkpoint, which would stay on the meta device."""
    for part in module.modules():
        for name in [n for n in part._buffers if n == "position_ids"]:
            del part._buffers[name]
    return module


def write_bin(folder: Path, value: Any, **options: Any) -> Path:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(value, folder / "pytorch_model.bin", **options)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites model.safetensors with what `change` does to its tensors in place."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes (openai/CLIP simple_tokenizer.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(rest))]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's vocabulary of these merges: bytes, bytes that end a word, merges, the two specials."""
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(m) for m in merges]
    return {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def small_merges() -> list[tuple[str, str]]:
    """Merges that build every one of WORDS from its first byte on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    order = kept + [byte for byte in range(256) if byte not in kept]
    of_byte = dict(zip(order, byte_symbols(), strict=True))
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        symbols = [of_byte[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        for end in range(1, len(symbols)):
            merges["".join(symbols[:end]), symbols[end]] = None
    return list(merges)


def write_vocabulary(folder: Path, merges: list[tuple[str, str]] | None = None) -> Path:
    """vocab.json and merges.txt of these merges (default: small_merges), and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = small_merges() if merges is None else merges
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges)), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_tokenizer_json(source: Path, folder: Path) -> Path:
    """tokenizer.json and tokenizer_config.json, as transformers saves `source`'s vocabulary."""
    CLIPTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def copy_with(source: Path, folder: Path, **files: Any) -> Path:
    """A copy of a folder in which the JSON files named (without .json) hold these values."""
    shutil.copytree(source, folder)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder
