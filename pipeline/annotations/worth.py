"""How much an image is worth a person's time: criteria of its kept maps, without the image.

For each criterion the class with most of it counts. A class below its presence gate has neither
pixels near its threshold nor disagreeing phrases: its gate alone is in question.

Shapes: K prompts of a class, h and w the map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.annotations.cut import Asked, logit, presence_of, to_logits
from pipeline.config.ontology import OntologyClass
from pipeline.errors import UsageError

NEAR_ODDS = 2.0
"""A pixel is near its threshold where its odds are within this factor of the threshold's."""
CRITERIA = ("near_share", "disagreement", "gate")

_LOGITS = to_logits(np.arange(256))


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A class, and a map's values (0..255) near and above its threshold."""

    asked: Asked
    near: np.ndarray
    """(256,) bool: near the threshold."""
    above: np.ndarray
    """(256,) bool: above it."""
    gate: float
    """Logit of the probability that some pixel must have, lest the class be absent."""


def weigh(asked: Asked) -> Weighed:
    """A class as measure_image takes it."""
    level = logit(asked.of.threshold)
    return Weighed(
        asked=asked,
        near=np.abs(_LOGITS - level) <= np.log(NEAR_ODDS),
        above=level < _LOGITS,
        gate=logit(max(asked.of.presence, asked.of.threshold)),
    )


def measure_image(maps: Mapping[int, np.ndarray], classes: list[Weighed]) -> dict[str, Any]:
    """CRITERIA of an image, 0..1, and of each the class, under <name>_class ("" if it is 0).

    maps: by prompt_id, (h, w) uint8, round(255 * probability).

    near_share: share of the pixels near the threshold, by the largest of a class's prompts, unless
    a negative is as probable. disagreement: 1 - the mean IoU of the masks of two prompts, over
    all pairs with a mask. gate: the odds of the largest probability and of the gate, the smaller
    by the larger: 1 at the gate itself.
    """
    found: dict[str, Any] = dict.fromkeys(CRITERIA, 0.0)
    found |= {f"{name}_class": "" for name in CRITERIA}
    for each in classes:
        presence = presence_of(each.asked, maps)
        largest = float(_LOGITS[round(255 * presence)])
        values = {"gate": float(np.exp(-abs(largest - each.gate)))}
        if presence >= each.asked.of.presence:
            values["near_share"] = _near_share(maps, each)
            values["disagreement"] = _disagreement(maps, each)
        for name, value in values.items():
            if value > found[name]:
                found[name], found[f"{name}_class"] = value, each.asked.of.name
    return found


def _near_share(maps: Mapping[int, np.ndarray], each: Weighed) -> float:
    largest = np.maximum.reduce([maps[i] for i in each.asked.prompt_ids])
    near = each.near[largest]
    for i in each.asked.negative_ids:
        near &= largest > maps[i]
    return float(near.mean())


def _disagreement(maps: Mapping[int, np.ndarray], each: Weighed) -> float:
    if len(each.asked.prompt_ids) < 2:
        return 0.0
    masks = np.stack([each.above[maps[i]].ravel() for i in each.asked.prompt_ids])
    masks = masks[:, masks.any(axis=0)].astype(np.float32)
    both = masks @ masks.T  # (K, K) pixels, exact below 2^24
    areas = np.diagonal(both)
    either = areas[:, None] + areas[None, :] - both
    pairs = np.triu(either > 0, k=1)
    return float(1 - (both[pairs] / either[pairs]).mean()) if pairs.any() else 0.0


def asked_of(
    fingerprint: Mapping[str, Any], prompt_ids: Mapping[str, int], labels: str
) -> list[Asked]:
    """The classes used to cut labels, out of their fingerprint; `prompt_ids`: of the run.

    Raises UsageError if it tells no classes, or the run lacks their prompts.
    """
    try:
        classes = fingerprint["ontology"]["classes"]
        return [_asked(i, each, prompt_ids) for i, each in enumerate(classes)]
    except KeyError as error:
        raise UsageError(
            f"{labels}: cut from prompts that its run does not have (any more): {error}"
        ) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{labels}: _run.json does not tell the classes") from error


def _asked(class_id: int, facts: Mapping[str, Any], prompt_ids: Mapping[str, int]) -> Asked:
    names = ("phrases", "templates", "negatives")
    values: dict[str, Any] = {name: tuple(facts[name]) for name in names}
    values |= {n: facts[n] for n in ("name", "combine", "threshold", "presence", "color")}
    of = OntologyClass(**values)
    made = list(facts["examples"])  # of prompts that are no phrase alone
    prompts = [prompt.name for prompt in of.prompts]
    if of.combine == "mean" and made:
        prompts = made
    return Asked(
        class_id=class_id,
        of=of,
        prompt_ids=tuple(prompt_ids[name] for name in dict.fromkeys([*prompts, *made])),
        negative_ids=tuple(prompt_ids[text] for text in of.negatives),
    )
