"""CLIPSeg: CLIP's activations and a prompt's embedding become a mask (Lüddecke & Ecker 2021).

An image is encoded once, whatever the number of prompts: `activations` runs the vision blocks up to
the last extract layer, `decode` runs every (image, prompt) pair from the prompt's entry on.

Shapes: B images, P prompts, S pairs of a slice, L tokens (class token first), D vision width,
R reduce_dim, E projection, (r, c) the grid of patches, (H, W) = (r, c) x patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.model.check import read_config
from pipeline.model.clip import CLIP, MLP, Attention, TextTower, VisionTower
from pipeline.model.config import CLIPSegConfig
from pipeline.model.weights import load_weights


class DecoderBlock(nn.Module):
    """One post-norm transformer block, always with ReLU, (S, L, R) -> (S, L, R)."""

    def __init__(self, config: CLIPSegConfig):
        super().__init__()
        width, eps = config.reduce_dim, config.vision_config.layer_norm_eps
        self.self_attn = Attention(width, config.decoder_num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config.decoder_intermediate_size, "relu")
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm1(x + self.self_attn(x))
        return self.layer_norm2(x + self.mlp(x))


class Decoder(nn.Module):
    """Activations and prompt embeddings -> mask logits.

    The prompt enters by FiLM (a scale and a shift per channel) at step `conditional_layer`, counted
    from the deepest activation. What comes before it is computed once per image.
    """

    def __init__(self, config: CLIPSegConfig):
        super().__init__()
        self.conditional_layer = config.conditional_layer
        depth, width, patch = (
            len(config.extract_layers),
            config.reduce_dim,
            config.vision_config.patch_size,
        )
        self.film_mul = nn.Linear(config.projection_dim, width)
        self.film_add = nn.Linear(config.projection_dim, width)
        self.reduces = nn.ModuleList(
            nn.Linear(config.vision_config.hidden_size, width) for _ in range(depth)
        )
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(depth))
        self.transposed_convolution: nn.Module
        if config.use_complex_transposed_convolution:
            quarter = patch // 4
            self.transposed_convolution = nn.Sequential(
                nn.Conv2d(width, width, kernel_size=3, padding=1),
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(width, width // 2, quarter, stride=quarter),
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(width // 2, 1, quarter, stride=quarter),
            )
        else:
            self.transposed_convolution = nn.ConvTranspose2d(width, 1, patch, stride=patch)

    def reduce(self, activations: Sequence[Tensor]) -> list[Tensor]:
        """The part independent of the prompt, once per image.

        Returns one (B, L, R) for each step from `conditional_layer` on: the first is the state FiLM
        acts on, the others are what later steps add.
        """
        first = min(self.conditional_layer, len(self.layers) - 1)
        # strict: one activation a step, deepest first
        steps = [
            reduce(act) for reduce, act in zip(self.reduces, reversed(activations), strict=True)
        ]
        x = steps[0]
        for i in range(first):
            x = self.layers[i](x) + steps[i + 1]
        return [x, *steps[first + 1 :]]

    def forward(
        self, steps: Sequence[Tensor], conditional: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Logits (S, H, W) of S pairs: steps from `reduce`, each (S, L, R), conditional (S, E).

        Or (B, P, H, W) of every image with every prompt: steps (B, 1, L, R), conditional (1, P, E).
        """
        first = len(self.layers) - len(steps)
        x = steps[0]
        pairs = torch.broadcast_shapes(x.shape[:-2], conditional.shape[:-1])
        if self.conditional_layer < len(self.layers):
            c = conditional[..., None, :]  # (S, 1, E)
            x = self.film_mul(c) * x + self.film_add(c)
        x = x.expand(*pairs, -1, -1)
        for i, layer in enumerate(self.layers[first:]):
            x = x if i == 0 else x + steps[i]
            x = layer(x.flatten(0, -3)).unflatten(0, pairs)
        x = x.flatten(0, -3)[:, 1:].transpose(1, 2).unflatten(2, grid)  # no class token
        return self.transposed_convolution(x)[:, 0].unflatten(0, pairs)  # of (S, R, r, c)


class CLIPSeg(nn.Module):
    """The segmentation model; parameter names are CLIPSegForImageSegmentation's."""

    def __init__(self, config: CLIPSegConfig):
        super().__init__()
        self.config = config
        self.clip = CLIP(config, interpolate=True)
        self.decoder = Decoder(config)

    @classmethod
    def from_folder(cls, folder: Path) -> tuple[CLIPSeg, str]:
        """The model of a checkpoint folder, on the CPU in float32, and its weights hash.

        Raises CheckpointError naming the wrong file, field or tensor.
        """
        values = read_config(folder)
        if values["model_type"] != "clipseg":
            raise CheckpointError(
                f"{folder}: is a {values['model_type']} model, without a decoder of masks; embed "
                "and classify take CLIP models, segment a CLIPSeg (CIDAS/clipseg-rd64-refined)"
            )
        try:
            config = CLIPSegConfig.from_dict(values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/config.json: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        return model.eval(), load_weights(model, folder)

    @property
    def text_model(self) -> TextTower:
        """CLIP's text tower."""
        return self.clip.text_model

    @property
    def vision_model(self) -> VisionTower:
        """CLIP's vision tower."""
        return self.clip.vision_model

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Conditional embeddings (P, E) of text prompts: projected, not normalised."""
        return self.clip.encode_text(input_ids, attention_mask)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Conditional embeddings (P, E) of image prompts (P, 3, h, w) of any size."""
        return self.clip.encode_image(pixels)

    def activations(self, pixels: Tensor) -> list[Tensor]:
        """Activations for the decoder of images (B, 3, h, w): one (B, L, D) per extract layer."""
        return self.clip.vision_model.activations(pixels, self.config.extract_layers)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches of images (B, 3, h, w)."""
        patch = self.config.vision_config.patch_size
        return pixels.shape[2] // patch, pixels.shape[3] // patch

    def decode(
        self,
        activations: Sequence[Tensor],
        conditional: Tensor,
        grid: tuple[int, int],
        *,
        pairs_at_once: int = 16,
    ) -> Tensor:
        """Mask logits (B, P, H, W) of every image with every prompt.

        `conditional` is (P, E), the same prompts for all images, or (B, P, E). Memory beyond the
        result grows with `pairs_at_once`, by about 9 MB a pair at 352 x 352 pixels.
        """
        steps = self.decoder.reduce(activations)
        images, prompts = len(steps[0]), conditional.shape[-2]
        conditional = conditional.expand(images, -1, -1).flatten(0, 1)  # (B P, E)
        image_of_pair = torch.arange(images, device=conditional.device).repeat_interleave(prompts)
        logits = [
            self.decoder([step[i] for step in steps], c, grid)
            for i, c in zip(
                image_of_pair.split(pairs_at_once),
                conditional.split(pairs_at_once),
                strict=True,
            )
        ]
        return torch.cat(logits).unflatten(0, (images, prompts))

    def forward(self, pixels: Tensor, conditional: Tensor) -> Tensor:
        """Mask logits (B, P, H, W) of normalised pixels (B, 3, h, w) for prompts (P, E)."""
        return self.decode(self.activations(pixels), conditional, self.grid(pixels))


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Training loss: mean binary cross-entropy of logits and labels 0..1, both (..., H, W)."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
