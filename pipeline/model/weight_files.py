"""The weight files of a checkpoint folder, opened as tensors by name.

Stands below weights.py, the loader of modules. Nothing is read here but headers, and the pickle of
a .bin, by PyTorch's restricted loader.
"""

from __future__ import annotations

import fnmatch
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.storage.documents import read_json

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
# Variants, as transformers names them: model.fp16.safetensors, model.safetensors.index.fp16.json.
SAFETENSORS_VARIANTS = ("model.*.safetensors", "model.safetensors.index.*.json")
PICKLES_VARIANTS = ("pytorch_model.*.bin", "pytorch_model.bin.index.*.json")
HEADER_LIMIT_BYTES = 16 << 20  # 150,000 tensors; CLIPSeg's header has 56 KB for 462
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Older transformers saved this buffer of the embeddings, 0, 1, 2, ..., with the weights.
_LEGACY = re.compile(r"(.*\.)?embeddings\.position_ids")
_SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin)")
# Put before all names by torch.compile and DistributedDataParallel, in either order.
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
_LEGACY_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6
LISTED = 10  # of the tensors that do not fit, before the rest is only counted


class Entry(NamedTuple):
    """One tensor in a file: what its header says, and how to get at its bytes (memory-mapped)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def find_weights(names: Iterable[str], folder: str) -> str | None:
    """The weight file, or index of them, to read among `names`, if any.

    CheckpointError, naming the folder, for several variants and no plain file.
    """
    names = set(names)
    for name in (*SAFETENSORS[:2], *PICKLES[:2]):
        if name in names:
            return name
    shards = set(fnmatch.filter(names, "*-*-of-*"))
    for pattern in (*SAFETENSORS_VARIANTS, *PICKLES_VARIANTS):
        found = sorted(set(fnmatch.filter(names, pattern)) - shards)
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: has {', '.join(found[:LISTED])}, and no model.safetensors; name a "
                "folder with one of them"
            )
        if found:
            return found[0]
    return None


def open_folder(folder: Path, stack: ExitStack) -> dict[str, Entry]:
    """Every tensor of the folder but the legacy buffers; open until the stack is closed."""
    names = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    found = find_weights(names, str(folder))
    if found is None:
        raise CheckpointError(f"{folder}: has no weights (model.safetensors or pytorch_model.bin)")
    path = folder / found
    entries = _open_sharded(path, stack) if path.suffix == ".json" else _open_file(path, stack)
    kept = {name: entry for name, entry in entries.items() if not _LEGACY.fullmatch(name)}
    for name, entry in kept.items():
        if entry.dtype not in FLOATS.values():
            raise CheckpointError(f"{path}: {name} is {entry.dtype}, not a floating-point tensor")
    return _unwrap(kept)


def _unwrap(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries without what a wrapper of the model put before every name."""
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in entries):
            entries = {name.removeprefix(wrapper): entry for name, entry in entries.items()}
    return entries


def _open_sharded(index: Path, stack: ExitStack) -> dict[str, Entry]:
    """The shards named in an index; the two must agree on the place of every tensor."""
    places = read_json(index, HEADER_LIMIT_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map")
    suffix = ".bin" if index.name.startswith("pytorch_model") else ".safetensors"
    entries: dict[str, Entry] = {}
    shards = sorted({str(place) for place in places.values()})
    for shard in shards:  # a plain name in this folder, never a path out of it
        if not _SHARD.fullmatch(shard) or Path(shard).suffix != suffix:
            raise CheckpointError(f"{index}: names the file {shard[:80]!r}")
    for shard in shards:
        opened = _open_file(index.parent / shard, stack)
        odd = {name for name in opened if places.get(name) != shard}
        odd |= {name for name, place in places.items() if place == shard} - opened.keys()
        if odd:
            raise CheckpointError(
                f"{index}: wrong about {shard}: {', '.join(sorted(odd)[:LISTED])}"
            )
        entries |= opened
    return entries


def _open_file(path: Path, stack: ExitStack) -> dict[str, Entry]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though the index names it")
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull`")
    if start.startswith(_LEGACY_PICKLE):
        raise CheckpointError(
            f"{path}: in the format of torch before 1.6, which cannot be read in place; convert it "
            "once, where its source is trusted: "
            f"""python -c "import torch; f = '{path.name}'; """
            """torch.save(torch.load(f, map_location='cpu', weights_only=True), f)\""""
        )
    if path.suffix == ".bin":
        return _open_bin(path)
    return _open_safetensors(path, stack)


def _open_safetensors(path: Path, stack: ExitStack) -> dict[str, Entry]:
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > HEADER_LIMIT_BYTES:
            raise CheckpointError(f"{path}: not safetensors: a header of {header_bytes:,} bytes")
        handle = stack.enter_context(safe_open(str(path), framework="pt"))
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: Entry(
                FLOATS.get(part.get_dtype(), torch.int64),
                tuple(part.get_shape()),
                partial(handle.get_tensor, name),
            )
            for name, part in slices.items()
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not safetensors: {error}") from error


def _open_bin(path: Path) -> dict[str, Entry]:
    """A pickled state dict, by the restricted loader, memory-mapped.

    Needs PyTorch 2.10: the loader of earlier ones could be made to run code.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise CheckpointError(
            f"{path}: reading .bin safely needs torch 2.10, not {torch.__version__}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(info.compress_type for info in archive.infolist())
        if compressed:  # torch.save never does; what it unpacks to has no bound
            raise CheckpointError(f"{path}: a compressed archive, which torch.save does not write")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile pickle can make the loader raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise CheckpointError(f"{path}: not weights that can be loaded safely: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: must hold tensors by name")
    if isinstance(state.get("state_dict"), Mapping):  # a trainer's checkpoint
        raise CheckpointError(
            f"{path}: holds a training checkpoint; save its `state_dict` alone under this name"
        )
    _check_tensors(path, state)
    return {
        name: Entry(tensor.dtype, tuple(tensor.shape), partial(state.__getitem__, name))
        for name, tensor in state.items()
    }


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Only plain tensors, and together no more bytes than the file has.

    A pickle can hold views repeating a few bytes without end; what copies them would allocate it.
    """
    total = 0
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{path}: {name[:80]} is not a plain tensor")
        total += 0 if _LEGACY.fullmatch(name) else tensor.numel() * tensor.element_size()
    if total > path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors ask for {total:,} bytes, more than it has")
