"""CLIP's two towers, as CLIPSeg and the CLIP models share them (Radford et al. 2021).

Parameter names are those of the hub's checkpoints. Where outputs could differ, this follows
transformers' modeling_clip.py and modeling_clipseg.py, which the tests compare with.

Attention and MLPs compute in the type of their weights, perhaps bfloat16 or float16 in a model of
float32: what they are added to keeps its own.

Shapes: B batch, L tokens, D width of the tower, E projection, N heads, (r, c) the grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.model.check import read_clip_config
from pipeline.model.config import HIDDEN_ACTS, CLIPConfig, CLIPSegConfig, TextConfig, VisionConfig
from pipeline.model.weights import load_weights, read_shapes


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU in CLIP's training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_RELU, _TANH = partial(nn.ReLU, inplace=True), partial(nn.GELU, approximate="tanh")
# Five names of the reference are the tanh approximation, written in different ways.
_KINDS: tuple[Callable[[], nn.Module], ...] = (
    QuickGELU,
    nn.GELU,
    nn.GELU,
    *[_TANH] * 5,
    _RELU,
    nn.SiLU,
    nn.SiLU,
)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = dict(zip(HIDDEN_ACTS, _KINDS, strict=True))


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.to(self.q_proj.weight.dtype)
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, L, D/N)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between, (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x.to(self.fc1.weight.dtype))))


class Block(nn.Module):
    """One pre-norm transformer block, (B, L, D) -> (B, L, D)."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The blocks of a tower; it exists for the checkpoint's parameter names."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding of zeros, for a checkpoint or a trainer to fill.

    nn.Embedding draws its values at once, and on the meta device that imports torch's compiler:
    5 s of CPU in every process building a model to load a checkpoint into.
    """
    return nn.Embedding.from_pretrained(torch.zeros(rows, width), freeze=False)


class TextEmbeddings(nn.Module):
    """Token plus position embeddings, (B, L) ids -> (B, L, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = _table(config.vocab_size, config.hidden_size)
        self.position_embedding = _table(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        length, longest = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > longest:
            raise ValueError(f"{length} tokens; this text tower takes at most {longest}")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:length]


class TextTower(nn.Module):
    """Causal transformer over tokens."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token states (B, L, D) of int64 ids (B, L); the mask (B, L) is 0 on padding."""
        x = self.embeddings(input_ids)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()  # (B, 1, L, L)
            # Left padding leaves rows that see nothing, and their softmax would be NaN.
            mask = mask | ~mask.any(-1, keepdim=True)
        for block in self.encoder.layers:
            x = block(x, mask)
        return self.final_layer_norm(x)

    def pool(
        self, states: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The state of the end-of-text token, (B, D).

        Checkpoints with the legacy eos_token_id 2 take the largest id beside padding: end-of-text
        in CLIP's vocabulary, but a pad token may stand above it. The others take the first token
        with the configured id.
        """
        ids = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).int()
        if attention_mask is not None:
            ids = ids.masked_fill(attention_mask == 0, -1)
        return states[torch.arange(len(states), device=states.device), ids.argmax(-1)]


class VisionEmbeddings(nn.Module):
    """Class token and patches plus positions, (B, 3, H, W) -> (B, 1 + r c, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size, self.image_size = config.patch_size, config.image_size
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, self.patch_size, self.patch_size, bias=False
        )
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = _table(positions, config.hidden_size)

    def forward(self, pixels: Tensor, interpolate: bool) -> Tensor:
        height, width = pixels.shape[2:]
        self.check_size(height, width, interpolate)
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        rows, cols = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)  # (B, r c, D)
        cls = self.class_embedding.expand(len(patches), 1, -1)
        table = self.position_embedding.weight
        if rows * cols != len(table) - 1 or height != width:
            table = interpolate_positions(table, rows, cols)
        return torch.cat([cls, patches], dim=1) + table

    def check_size(self, height: int, width: int, interpolate: bool) -> None:
        """Raise ValueError for images of an impossible size."""
        if not interpolate and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"image is {height} x {width} pixels; without interpolated positions this model "
                f"takes {self.image_size} x {self.image_size}"
            )
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"image is {height} x {width} pixels, less than a patch of {self.patch_size}"
            )


def interpolate_positions(table: Tensor, rows: int, cols: int) -> Tensor:
    """Resize a square position table (1 + s s, D) to another grid, (1 + rows cols, D).

    Bicubic without antialias, as in transformers' `interpolate_pos_encoding`.
    """
    side = int((len(table) - 1) ** 0.5)
    grid = table[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, s, s)
    grid = F.interpolate(grid, size=(rows, cols), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])


class VisionTower(nn.Module):
    """Vision transformer over patches.

    `interpolate` lets it take images of any size, as CLIPSeg does; without it an image of another
    size than the checkpoint's is a ValueError, as in CLIP.
    """

    def __init__(self, config: VisionConfig, *, interpolate: bool = False):
        super().__init__()
        self.interpolate = interpolate
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for images of another size than this tower's."""
        self.embeddings.check_size(height, width, self.interpolate)

    def count_tokens(self, height: int, width: int) -> int:
        """States of an image of this size: one a patch, and one of the class token."""
        patch = self.embeddings.patch_size
        return 1 + (height // patch) * (width // patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch states (B, 1 + r c, D) of normalised pixels (B, 3, H, W), class token first."""
        return self.activations(pixels)[0]

    def activations(self, pixels: Tensor, layers: tuple[int, ...] | None = None) -> list[Tensor]:
        """Outputs (B, 1 + r c, D) of the given blocks, 0-based and increasing; by default the last.

        Blocks behind the last one asked for are not run.
        """
        layers = (len(self.encoder.layers) - 1,) if layers is None else layers
        x = self.pre_layrnorm(self.embeddings(pixels, self.interpolate))
        out = []
        for i, block in enumerate(self.encoder.layers[: layers[-1] + 1]):
            x = block(x)
            if i in layers:
                out.append(x)
        return out

    def pool(self, states: Tensor) -> Tensor:
        """The normalised class token, (B, D)."""
        return self.post_layernorm(states[:, 0])


class CLIP(nn.Module):
    """Both towers, projected into one space."""

    def __init__(self, config: CLIPConfig | CLIPSegConfig, *, interpolate: bool = False):
        super().__init__()
        self.text_model = TextTower(config.text_config)
        self.vision_model = VisionTower(config.vision_config, interpolate=interpolate)
        dim = config.projection_dim
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    @classmethod
    def from_folder(cls, folder: Path, *, interpolate: bool | None = None) -> tuple[CLIP, str]:
        """The CLIP of a CLIP or CLIPSeg checkpoint, on the CPU in float32, and its weights hash.

        `interpolate` says whether images of any size are taken; by default (None) as transformers
        does, with CLIPSeg yes and with CLIP no. A decoder is passed over. CheckpointError names the
        wrong file, field or tensor.
        """
        config, kind = read_clip_config(folder)
        if kind not in ("clip", "clipseg"):
            raise CheckpointError(f"{folder}: is a {kind}, one tower alone; CLIP has two")
        with torch.device("meta"):
            model = cls(config, interpolate=resolve_interpolate(interpolate, kind))
        return model.eval(), load_weights(model, folder, prefix=clip_prefix(folder))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text embeddings (B, E), not normalised, of int64 ids (B, L)."""
        states = self.text_model(input_ids, attention_mask)
        return self.text_projection(self.text_model.pool(states, input_ids, attention_mask))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Projected image embeddings (B, E), not normalised, of pixels (B, 3, H, W)."""
        tower = self.vision_model
        return self.visual_projection(tower.pool(tower.activations(pixels)[0]))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits (images, texts) of embeddings (images, E) and (texts, E), normalised or not.

        The cosine times exp(logit_scale): transformers' `logits_per_image`, and transposed its
        `logits_per_text`.
        """
        cosine = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        return cosine * self.logit_scale.exp()

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (images, texts) of every image with every text."""
        texts = self.encode_text(input_ids, attention_mask)
        return self.similarity(self.encode_image(pixels), texts)


def contrastive_loss(logits: Tensor) -> Tensor:
    """Training loss of N matching pairs: logits (N, N), the i-th image and text belong together.

    The mean of the cross-entropies along both sides (Radford et al. 2021, figure 3).
    """
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"the loss needs as many images as texts, not {tuple(logits.shape)}")
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def clip_prefix(folder: Path) -> str:
    """Prefix of the names of CLIP's tensors: "clip." beside a decoder, else nothing."""
    return "clip." if any(name.startswith("clip.") for name in read_shapes(folder)) else ""


def resolve_interpolate(interpolate: bool | None, kind: str) -> bool:
    """Whether positions are interpolated; None is what transformers does for the model_type."""
    return kind.startswith("clipseg") if interpolate is None else interpolate
