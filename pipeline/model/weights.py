"""Weights from a checkpoint folder into a module: every tensor has its place, or none is read.

Names and shapes come from the files' headers and are compared before anything is allocated. The
files are, in this order of preference: model.safetensors, its sharded form with an index, and the
same two of pytorch_model.bin, which is a pickle and is only ever read by PyTorch's restricted
loader.
"""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.storage.documents import read_json

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
# One of these says that there are weights; in the order of preference.
WEIGHT_FILES = SAFETENSORS[:2] + PICKLES[:2]
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
_LISTED = 10  # of the tensors that do not fit, before the rest is only counted


class Entry(NamedTuple):
    """One tensor in a file: what its header says, and how to get at its bytes (memory-mapped)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint folder, without reading their data.

    CheckpointError, naming the file, where one is damaged, unsafe or at odds with its index.
    """
    with ExitStack() as stack:
        return {name: entry.shape for name, entry in _open_folder(Path(folder), stack).items()}


def read_scalar(folder: str | Path, name: str) -> float:
    """The one number that a tensor of a checkpoint folder holds.

    CheckpointError where the tensor is missing, has more of them, or is not finite.
    """
    with ExitStack() as stack:
        entry = _open_folder(Path(folder), stack).get(name)
        value = math.nan if entry is None or entry.shape else float(entry.read())
    if not math.isfinite(value):
        raise CheckpointError(f"{folder}: has no tensor {name} that is one finite number")
    return value


def load_weights(
    module: nn.Module,
    folder: str | Path,
    *,
    prefix: str = "",
    only: Callable[[str], bool] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Give `module`, built on the meta device, the weights of a folder; returns their hash.

    The module's `x` is the checkpoint's `prefix + x`. What does not start with the prefix is
    another part's and passed over; so is a name (without the prefix) that `only` says no to. All
    that is left must fit: CheckpointError lists every missing, unexpected or misshapen tensor. The
    module's tensors become new ones of `dtype` on the CPU.

    The hash is the SHA-256 over name, dtype, shape and bytes of all the checkpoint's tensors, as
    stored and sorted by name: the same for one file, shards or .bin, and for any part of the model.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        stored = _open_folder(folder, stack)
        parts = {n[len(prefix) :]: n for n in stored if n.startswith(prefix)}
        chosen = {full: name for name, full in parts.items() if only is None or only(name)}
        found = {name: stored[full].shape for full, name in chosen.items()}
        _compare(folder, {n: tuple(t.shape) for n, t in module.state_dict().items()}, found, prefix)
        digest = hashlib.sha256()
        state = {}
        for full in sorted(stored):
            tensor = stored[full].read().detach().contiguous()
            _hash_tensor(digest, full, tensor)
            if full in chosen:
                # A copy: a memory map would follow, or die with, later changes of the file.
                state[chosen[full]] = tensor.to(dtype, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if value.is_meta:
            raise RuntimeError(f"{name} is in no state dict, so a checkpoint cannot fill it")
    return digest.hexdigest()


def hash_weights(folder: str | Path) -> str:
    """The hash that load_weights returns, without a module."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        for name, entry in sorted(_open_folder(Path(folder), stack).items()):
            _hash_tensor(digest, name, entry.read())
    return digest.hexdigest()


def _hash_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest.update(f"{name}\0{dtype}\0{tuple(tensor.shape)}\0".encode())
    # As bytes, because numpy has no bfloat16; flat first, because a 0-d tensor has no such view.
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    digest.update(flat.numpy().data)


def _compare(
    folder: Path,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    prefix: str,
) -> None:
    wrong = [f"{prefix}{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{prefix}{name} is unexpected" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            wrong.append(f"{prefix}{name} has the shape {found[name]}, not {wanted[name]}")
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise CheckpointError(
            f"{folder}: the weights do not fit the model: {'; '.join(wrong[:_LISTED])}{more}"
        )


def _open_folder(folder: Path, stack: ExitStack) -> dict[str, Entry]:
    """Every tensor of the folder but the legacy buffers; open until the stack is closed."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: has no weights (model.safetensors or pytorch_model.bin)")
    entries = _open_sharded(path, stack) if path.suffix == ".json" else _open_file(path, stack)
    kept = {name: entry for name, entry in entries.items() if not _LEGACY.fullmatch(name)}
    for name, entry in kept.items():
        if entry.dtype not in FLOATS.values():
            raise CheckpointError(f"{path}: {name} is {entry.dtype}, not a floating-point tensor")
    return kept


def _open_sharded(index: Path, stack: ExitStack) -> dict[str, Entry]:
    """The shards that an index names; the two must agree on where every tensor is."""
    places = read_json(index, HEADER_LIMIT_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
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
                f"{index}: wrong about {shard}: {', '.join(sorted(odd)[:_LISTED])}"
            )
        entries |= opened
    return entries


def _open_file(path: Path, stack: ExitStack) -> dict[str, Entry]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though the index names it")
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
    _check_tensors(path, state)
    return {
        name: Entry(tensor.dtype, tuple(tensor.shape), partial(state.__getitem__, name))
        for name, tensor in state.items()
    }


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Only plain tensors, and together no more bytes than the file has.

    A pickle can hold views that repeat a few bytes without end; what copies them would allocate it.
    """
    total = 0
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{path}: {name[:80]} is not a plain tensor")
        total += 0 if _LEGACY.fullmatch(name) else tensor.numel() * tensor.element_size()
    if total > path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors ask for {total:,} bytes, more than it has")
