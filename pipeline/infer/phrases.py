"""Phrases of single images -> embeddings, on an actor: equal ones are encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.infer.checkpoint import OpenModel
from pipeline.model.clipseg import CLIPSeg

KEPT_PHRASES = 16_384  # of 512 numbers each: 32 MB


class PhraseVectors:
    """Embeddings of phrases; the `kept` most recently used are remembered."""

    def __init__(self, opened: OpenModel[CLIPSeg], kept: int = KEPT_PHRASES):
        self.opened, self.kept = opened, kept
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self.encoded = 0
        """How many phrases the model was given so far."""

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """(P, E) float32 on the CPU, not normalised, of at least one phrase."""
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._known]
        if new:
            vectors = self.opened.encode_texts(new)
            # Copies: a view would keep all of them.
            self._known.update((new[i], vectors[i].clone()) for i in range(len(new)))
            self.encoded += len(new)
        for phrase in phrases:
            self._known.move_to_end(phrase)
        found = torch.stack([self._known[phrase] for phrase in phrases])
        while len(self._known) > self.kept:
            self._known.popitem(last=False)
        return found
