"""Finished tables as predictions, image by image: kept maps of `segment`, or labels.

Arrays of an image are transposed, (W, H), as in annotations.cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pycocotools import mask as coco

from pipeline import storage
from pipeline.annotations.cut import Asked, ask, logit, presence_of, to_logits
from pipeline.annotations.kept_maps import KeptMaps, open_kept_maps, read_kept_maps
from pipeline.annotations.label import refuse_missing_prompts
from pipeline.annotations.labelled import LabelledImage, open_labels, read_classes, read_labels
from pipeline.annotations.splits import name_image, name_row
from pipeline.annotations.truth import decode
from pipeline.config.ontology import Ontology, OntologyClass
from pipeline.errors import UsageError
from pipeline.infer.bilinear import Axis
from pipeline.run.finished import list_finished
from pipeline.run.manifest import read_run


@dataclass(frozen=True, kw_only=True)
class Found:
    """One class in one image, at the size of the truth."""

    inside: np.ndarray
    """(W, H) bool: above the class's threshold."""
    probability: np.ndarray | None = None
    """(W, H) float32; None where masks are all that is known."""
    presence: float
    """Largest probability of the class in the map, before its gate."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One image of a run."""

    shard: str
    row: int
    names: tuple[str, ...]
    """Key, member, and the name of its files in an export."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    find: Callable[[int, tuple[int, int]], Found]
    """Of a class, by its index, at a size; of labels, at the size of the image."""
    instances: tuple[dict[str, Any], ...] = ()
    """class_id, rle, score, area of each object, where they are told apart."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """An opened run."""

    source: str
    classes: list[str]
    thresholds: list[float | None]
    """Of each class; None where masks were cut already."""
    images: Callable[[], Iterator[Predicted]]
    """Each call is a pass over the run."""
    instances: bool
    """Whether objects are told apart."""
    notes: tuple[str, ...] = ()

    @property
    def masks_alone(self) -> bool:
        """Whether no probability is known, and masks have the size of the image alone."""
        return self.thresholds[0] is None


def open_predictions(source: str, ontology: Ontology | None) -> Predictions:
    """A run of `segment` with kept maps, or of `label`. Raises UsageError."""
    output = storage.check_uri(source)
    job = (read_run(output) or {}).get("fingerprint", {}).get("job")
    if job not in (None, "segment", "label"):
        raise UsageError(f"{output}: of the job {job!r}; segment's maps or labels can be evaluated")
    if job != "segment":
        if ontology is not None:
            raise UsageError("--ontology: labels were cut by theirs already; leave it out")
        return _open_labels(output)
    kept = open_kept_maps(output)
    return open_maps(kept, ontology or _each_prompt(kept))


def _each_prompt(kept: KeptMaps) -> Ontology:
    """A class of each prompt, at probability 0.5."""
    classes = tuple(OntologyClass(name=name, phrases=(name,)) for name in kept.prompts)
    return Ontology(classes=classes, file=kept.output)


def open_maps(kept: KeptMaps, ontology: Ontology) -> Predictions:
    """The kept maps, by the classes of an ontology with all its prompts in the run."""
    if ontology.file != kept.output:
        refuse_missing_prompts(ontology, kept.output, kept.prompts, kept.recipes)
    asked = ask(ontology, kept.prompt_ids)
    wanted = sorted({i for each in asked for i in (*each.prompt_ids, *each.negative_ids)})

    def images() -> Iterator[Predicted]:
        for shard in list_finished(kept.output, "probabilities"):
            for table in read_kept_maps(shard, wanted):
                good = table.filter(pc.greater(pc.binary_length(table["maps"]), 0))
                for i in range(len(good)):
                    yield _predicted_of_maps(
                        {n: good[n][i] for n in good.schema.names}, wanted, asked
                    )

    notes = ("its run is not finished: shards that it lacks are not evaluated",)
    return Predictions(
        source=kept.output,
        classes=[each.name for each in ontology.classes],
        thresholds=[each.threshold for each in ontology.classes],
        images=images,
        instances=False,
        notes=notes if kept.unfinished else (),
    )


def _predicted_of_maps(record: dict[str, Any], wanted: list[int], asked: list[Asked]) -> Predicted:
    height, width = record["map_height"].as_py(), record["map_width"].as_py()
    flat = np.frombuffer(record["maps"].as_buffer(), np.uint8)
    maps = dict(zip(wanted, flat.reshape(-1, height, width), strict=True))
    shard, row, key = (record[name].as_py() for name in ("shard", "row", "key"))
    return Predicted(
        shard=shard,
        row=row,
        names=(key, record["member"].as_py(), name_row(shard, row, key)),
        size=(record["height"].as_py(), record["width"].as_py()),
        find=lambda class_id, size: find_class(maps, asked[class_id], size),
    )


def find_class(maps: dict[int, np.ndarray], each: Asked, size: tuple[int, int]) -> Found:
    """A class in the maps of an image, by prompt_id: (h, w) uint8, round(255 * probability).

    As annotations.cut has it, before classes share the image: the largest of its prompts, logits
    interpolated, 0 if a negative is as probable or the class's gate is not reached.
    """

    def resize(i: int) -> np.ndarray:
        grid = to_logits(maps[i])
        rows, columns = (Axis.between(*pair) for pair in zip(grid.shape, size, strict=True))
        return columns.lerp(np.ascontiguousarray(rows.lerp(grid).T))

    logits = resize(each.prompt_ids[0])
    for i in each.prompt_ids[1:]:
        np.maximum(logits, resize(i), out=logits)
    for i in each.negative_ids:
        logits[logits <= resize(i)] = -np.inf
    presence = presence_of(each, maps)
    if presence < each.of.presence:
        logits[:] = -np.inf
    inside = logits > logit(each.of.threshold)
    with np.errstate(over="ignore"):
        probability = 1 / (1 + np.exp(-logits))
    return Found(inside=inside, probability=probability, presence=presence)


def without_gates(ontology: Ontology) -> Ontology:
    """The ontology with every presence gate open."""
    return replace(ontology, classes=tuple(replace(c, presence=0.0) for c in ontology.classes))


def _open_labels(labels: str) -> Predictions:
    record, parts = open_labels(labels)
    classes = read_classes(labels)

    def images() -> Iterator[Predicted]:
        for part in parts:
            for image in read_labels(labels, part, len(classes)):
                yield _predicted_of_labels(image)

    apart = record.get("fingerprint", {}).get("ontology", {}).get("instances", True)
    return Predictions(
        source=labels,
        classes=[each.name for each in classes],
        thresholds=[None] * len(classes),
        images=images,
        instances=bool(apart),
    )


def _predicted_of_labels(image: LabelledImage) -> Predicted:
    def find(class_id: int, size: tuple[int, int]) -> Found:
        found = [each for each in image.instances if each.class_id == class_id]
        if not found:
            return Found(inside=np.zeros(size[::-1], np.bool_), presence=0.0)
        inside = decode(coco.merge([each.rle for each in found]))
        return Found(inside=inside, presence=max(each.presence for each in found))

    return Predicted(
        shard=image.shard,
        row=image.row,
        names=(image.key, image.member, name_image(image)),
        size=(image.height, image.width),
        find=find,
        instances=tuple(
            {"class_id": i.class_id, "rle": i.rle, "score": i.score, "area": i.area}
            for i in image.instances
        ),
    )
