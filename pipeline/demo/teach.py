"""Batches for training the bundled model: scenes, and phrases to ask for.

Shapes: B images, O objects of a scene, K concepts, P phrases asked of each image, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.demo.scenes import SEEN_PAIRS, UNNAMED_PAIRS, Pair, draw_scene
from pipeline.demo.vocabulary import CONCEPTS, build_tokenizer, phrases
from pipeline.model.added_tokens import END

MAX_OBJECTS = 5
# What an object in training can be; MATCHES says which concepts it answers to.
OBJECTS: tuple[Pair, ...] = (*SEEN_PAIRS, *UNNAMED_PAIRS)
MATCHES = torch.tensor(
    [[c in ("", p[0]) and s in ("", p[1]) for c, s in CONCEPTS] for p in OBJECTS]
).float()  # (objects, concepts)


@dataclass
class Pool:
    """Scenes held in memory: images NHWC uint8, labels NHW uint8, pairs (N, MAX_OBJECTS) int64.

    `pairs` indexes OBJECTS; -1 beyond a scene's own.
    """

    images: np.ndarray
    labels: np.ndarray
    pairs: np.ndarray

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, H, W) float 0..1, one-hot labels (B, MAX_OBJECTS, H, W), pairs (B, 5).

        Half of the scenes are mirrored; all are made a little brighter or darker.
        """
        which = rng.integers(len(self.images), size=size)
        images, labels = self.images[which], self.labels[which]
        for i in range(size):
            mirror = 1 - 2 * rng.integers(2)
            images[i], labels[i] = images[i, :, ::mirror], labels[i, :, ::mirror]
        gain = rng.uniform(0.92, 1.08, (size, 1, 1, 1)).astype(np.float32)
        pixels = (torch.from_numpy(images * (gain / 255)).clamp(0, 1)).permute(0, 3, 1, 2)
        numbers = torch.arange(1, MAX_OBJECTS + 1)[:, None, None]
        objects = (torch.from_numpy(labels)[:, None] == numbers).float()
        return pixels.contiguous(), objects, torch.from_numpy(self.pairs[which])


def draw_pool(seed: int, count: int, objects: Sequence[Pair] = SEEN_PAIRS) -> Pool:
    """Draw `count` scenes of these objects, none of an unseen pair."""
    scenes = [draw_scene(np.random.default_rng((seed, i)), objects) for i in range(count)]
    pairs = np.full((len(scenes), MAX_OBJECTS), -1)
    for row, scene in zip(pairs, scenes, strict=True):
        row[: len(scene.objects)] = [OBJECTS.index(pair) for pair in scene.objects]
    return Pool(np.stack([s.image for s in scenes]), np.stack([s.labels for s in scenes]), pairs)


def object_concepts(pairs: Tensor) -> Tensor:
    """(B, O, K) float: which concepts each object answers to; all 0 for missing objects."""
    return MATCHES[pairs.clamp(min=0)] * (pairs >= 0).float()[..., None]


def choose_concepts(present: Tensor, count: int) -> Tensor:
    """(B, count) int64 indices into CONCEPTS: half present in the image, half absent.

    `present` (B, K) 0 or 1. Kinds are drawn evenly; an absent pair mostly shares its colour or its
    shape with something that is there.
    """
    kind = torch.tensor([0 if not s else 1 if not c else 2 for c, s in CONCEPTS])
    base = torch.tensor([1.0, 1.5, 0.35])[kind]
    colour_there = present @ torch.tensor(
        [[float(a == c and not t) for c, _ in CONCEPTS] for a, t in CONCEPTS]
    )
    shape_there = present @ torch.tensor(
        [[float(t == s and not a) for _, s in CONCEPTS] for a, t in CONCEPTS]
    )
    near = torch.where(kind == 2, 0.1 + colour_there + shape_there, 1.0)
    positive = (count + int(torch.randint(2, ()))) // 2
    there = torch.multinomial(present * base + 1e-9, positive)
    absent = torch.multinomial((1 - present) * base * near + 1e-9, count - positive)
    return torch.cat([there, absent], 1)


class Texts:
    """Tokens of every concept's phrases."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer()
        end = tokenizer.get_vocab()[END]
        rows = [[tokenizer.encode(p).ids for p in phrases(c)] for c in CONCEPTS]
        longest = max(len(ids) for row in rows for ids in row)
        padded = [[ids + [end] * (longest - len(ids)) for ids in row] for row in rows]
        mask = [[[1] * len(ids) + [0] * (longest - len(ids)) for ids in row] for row in rows]
        self.ids, self.mask = torch.tensor(padded), torch.tensor(mask)  # (K, T, L)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Ids and mask (K, L): one phrase for each concept."""
        rows = torch.arange(len(CONCEPTS))
        which = torch.randint(self.ids.shape[1], (len(CONCEPTS),))
        return self.ids[rows, which], self.mask[rows, which]
