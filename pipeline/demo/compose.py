"""The last step of training: pairs become, to the text tower, the sum of their colour and shape.

What training teaches about seen pairs does not reach the unseen ones by itself: the decoder has
learnt to refuse their embeddings. The decoder does follow the sum of a colour's and a shape's
embedding, though, for seen pairs as well as before. So the text tower alone is trained, on seen
pairs and without images, towards the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.demo.scenes import COLOURS, SEEN_PAIRS, SHAPES
from pipeline.demo.teach import Texts
from pipeline.model.clipseg import CLIPSeg

STEPS = 1_000


def compose(model: CLIPSeg, seed: int) -> None:
    """Train the text tower of `model` in place; about a minute on one core."""
    torch.manual_seed(seed)
    texts = Texts()
    goal = composed_embeddings(model, texts)
    parameters = [*model.clip.text_model.parameters(), *model.clip.text_projection.parameters()]
    adam = torch.optim.AdamW(parameters, weight_decay=0.02)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, (STEPS - step) / (STEPS - 200))
        error = (model.encode_text(*texts.sample()) - goal).square().sum(1)
        loss = (error / goal.square().sum(1)).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()


@torch.no_grad()
def composed_embeddings(model: CLIPSeg, texts: Texts) -> Tensor:
    """(K, E): colours and shapes as they are now, pairs as their sum plus one shift for all.

    The shift is the mean difference of pairs from that sum. Each concept counts with the mean over
    its phrases.
    """
    flat = model.encode_text(texts.ids.flatten(0, 1), texts.mask.flatten(0, 1))
    now = flat.unflatten(0, texts.ids.shape[:2]).mean(1)
    colours, shapes, pairs = now.split((len(COLOURS), len(SHAPES), len(SEEN_PAIRS)))
    colour_of = [list(COLOURS).index(colour) for colour, _ in SEEN_PAIRS]
    shape_of = [SHAPES.index(shape) for _, shape in SEEN_PAIRS]
    sums = colours[colour_of] + shapes[shape_of]
    return torch.cat([colours, shapes, sums + (pairs - sums).mean(0)])
