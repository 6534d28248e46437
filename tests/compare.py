"""What the tests of the models share: random weights in transformers' models, and what is equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = 1e-4  # relative to the largest value of the reference


def assert_close(ours: Tensor, reference: Tensor) -> None:
    """Equal within TOLERANCE of the reference's largest value, and not trivially."""
    assert ours.shape == reference.shape
    assert reference.std() > 1e-3
    assert (ours - reference).abs().max() <= TOLERANCE * reference.abs().max()


def token_ids(texts: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random ids with end-of-text at different places, padded with it, and the mask."""
    ids = torch.randint(3, vocabulary - 2, (texts, length))
    mask = torch.ones_like(ids)
    for i in range(texts):
        end = length - 1 - i % (length // 2)
        ids[i, end:], mask[i, end + 1 :] = vocabulary - 1, 0
    return ids, mask


def random_model(kind: type[PreTrainedModel], config: Any, seed: int = 0) -> PreTrainedModel:
    """A model of transformers in which every parameter is random: biases and norms too.

    Its own initialisation leaves these at 0 and 1, where a mix-up would not show, and takes a
    minute for a large model. Here parameters are pieces of one sequence of random numbers, whose
    prime length keeps any two from being alike.
    """
    with torch.device("meta"):
        model = kind(config)
    model = model.to_empty(device="cpu").eval()
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    start = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        turns = 1 + (start + count) // len(noise)
        piece = (noise.repeat(turns) if turns > 1 else noise)[start : start + count]
        value = piece.view(parameter.shape) * (0.1 if parameter.ndim < 2 else 1)
        if parameter.ndim > 1:
            value /= parameter[0].numel() ** 0.5  # keeps what a layer gives of order 1
        if name == "logit_scale" or name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            value += 3 if name == "logit_scale" else 1
        parameter.data.copy_(value)
        start = (start + count) % len(noise)
    return model
