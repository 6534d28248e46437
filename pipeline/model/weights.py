"""Weights from a checkpoint folder into a module: every tensor has its place, or none is read.

Names and shapes come from the files' headers and are compared before anything is allocated. The
files are, in this order of preference: model.safetensors, its sharded form with an index, the
same two of pytorch_model.bin, which is a pickle and is only ever read by PyTorch's restricted
loader, and the only variant of these present (model.fp16.safetensors).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.model.weight_files import LISTED, open_folder


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint folder, without reading their data.

    CheckpointError, naming the file, for one damaged, unsafe or at odds with its index.
    """
    with ExitStack() as stack:
        return {name: entry.shape for name, entry in open_folder(Path(folder), stack).items()}


def read_scalar(folder: str | Path, name: str) -> float:
    """The single number in a tensor of a checkpoint folder.

    CheckpointError if the tensor is missing, has more of them, or is not finite.
    """
    with ExitStack() as stack:
        entry = open_folder(Path(folder), stack).get(name)
        scalar = entry is not None and entry.shape in ((), (1,))
        value = float(entry.read()) if entry and scalar else math.nan
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
    another part's and passed over; so is a name (without the prefix) refused by `only`. All that is
    left must fit: CheckpointError lists every missing, unexpected or misshapen tensor. The module's
    tensors become new ones of `dtype` on the CPU.

    The hash is the SHA-256 over name, dtype, shape and bytes of all the checkpoint's tensors, as
    stored and sorted by name: the same for one file, shards or .bin, and for any part of the model.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        stored = open_folder(folder, stack)
        parts = {n[len(prefix) :]: n for n in stored if n.startswith(prefix)}
        chosen = {full: name for name, full in parts.items() if only is None or only(name)}
        found = {name: stored[full].shape for full, name in chosen.items()}
        wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        for name, shape in found.items():
            if shape == (1,) and wanted.get(name) == ():  # a number that torch 0.3 saved
                found[name] = ()
        _compare(folder, wanted, found, prefix)
        digest = hashlib.sha256()
        state = {}
        for full in sorted(stored):
            tensor = stored[full].read().detach().contiguous()
            _hash_tensor(digest, full, tensor)
            if full in chosen:
                # A copy: a memory map would follow, or die with, later changes of the file.
                name = chosen[full]
                state[name] = tensor.to(dtype, copy=True).reshape(found[name])
    module.load_state_dict(state, strict=True, assign=True)
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if value.is_meta:
            raise RuntimeError(f"{name} is in no state dict, so a checkpoint cannot fill it")
    return digest.hexdigest()


def hash_weights(folder: str | Path) -> str:
    """The hash returned by load_weights, without a module."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        for name, entry in sorted(open_folder(Path(folder), stack).items()):
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
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise CheckpointError(
            f"{folder}: the weights do not fit the model: {'; '.join(wrong[:LISTED])}{more}"
        )
