"""Kept maps of a run, and an ontology -> rows of `images` and `annotations`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema, storage
from pipeline.annotations.cut import Asked, ask, cut_image
from pipeline.config.ontology import Ontology, OntologyClass
from pipeline.config.prompt import Prompt
from pipeline.errors import UsageError
from pipeline.storage import FileInfo
from pipeline.write.parts import open_part

_AT_ONCE = 32  # parts that are read


class CutAnnotations:
    """schema.KEPT_MAPS of one shard -> rows of `images` and of `annotations`.

    `prompt_ids`: of every prompt in the run, by name. The maps of a record are those of `wanted`,
    in its order. `vectors`: the embedding of each prompt, (P, E), if a class has a clip_score.
    """

    def __init__(
        self,
        ontology: Ontology,
        prompt_ids: Mapping[str, int],
        vectors: np.ndarray | None = None,
    ):
        self.ontology, self.asked = ontology, ask(ontology, prompt_ids)
        self.text_vectors = {
            each.class_id: _text_vector(each, vectors)
            for each in self.asked
            if vectors is not None and each.of.clip_score is not None
        }
        self.wanted = sorted(prompt_ids[prompt.name] for prompt in ontology.prompts)

    def __call__(self, records: pa.Table) -> dict[str, pa.Table]:
        good = records.filter(pc.greater(pc.binary_length(records["maps"]), 0))
        rows = [row for record in _records(good) for row in self._cut(*record)]
        return {
            "images": good.select(schema.IMAGES.names).cast(schema.IMAGES),
            "annotations": pa.Table.from_pylist(rows, schema=schema.ANNOTATIONS),
        }

    def _cut(self, record: dict[str, Any], maps: np.ndarray) -> list[dict[str, Any]]:
        """The annotations of one image, of its maps (P, h, w)."""
        by_id = dict(zip(self.wanted, maps, strict=True))
        size = (record["height"], record["width"])
        vector = np.frombuffer(record.pop("vector"), np.float32)
        there = [each for each in self.asked if not self._is_absent(each, vector)]
        found = cut_image(by_id, size, there, self.ontology)
        return [record | row for row in found]

    def _is_absent(self, each: Asked, vector: np.ndarray) -> bool:
        """Whether a class is absent from an image, by the image's embedding of length 1."""
        text = self.text_vectors.get(each.class_id)
        return text is not None and float(vector @ text) < (each.of.clip_score or 0)


def _text_vector(each: Asked, vectors: np.ndarray) -> np.ndarray:
    """(E,) of length 1: the mean direction of the class's texts; of its examples without any."""
    prompts = list(zip(each.of.prompts, each.prompt_ids, strict=True))
    ids = [i for prompt, i in prompts if prompt.texts] or [i for _, i in prompts]
    unit = vectors[ids] / np.linalg.norm(vectors[ids], axis=1, keepdims=True)
    mean: np.ndarray = unit.mean(axis=0)
    return mean / np.linalg.norm(mean)


def _records(good: pa.Table) -> Iterable[tuple[dict[str, Any], np.ndarray]]:
    """Each record with its maps (P, h, w) uint8."""
    names = ["shard", "row", "key", "height", "width", "vector"]
    sizes = zip(good["map_height"], good["map_width"], good["maps"], strict=True)
    for record, (height, width, data) in zip(good.select(names).to_pylist(), sizes, strict=True):
        maps = np.frombuffer(data.as_buffer(), np.uint8)
        yield record, maps.reshape(-1, height.as_py(), width.as_py())


def refuse_missing_prompts(
    ontology: Ontology, run: str, names: Iterable[str], recipes: Mapping[str, Any]
) -> None:
    """Raise UsageError, naming class and field, for what the maps of a run cannot give.

    names: of the run's prompts; recipes: of those beyond a phrase alone, as config.prompt.recipes
    has them.
    """
    there = set(names)
    for each in ontology.classes:
        negatives = [Prompt(name=text, texts=(text,)) for text in each.negatives]
        for prompt in [*each.prompts, *negatives]:
            expected = None if prompt.is_plain else prompt.recipe()
            if prompt.name not in there:
                why = f"{run} has no map of {prompt.name!r}"
            elif recipes.get(prompt.name) != expected:
                why = f"the map of {prompt.name!r} in {run} is of other phrases or examples"
            else:
                continue
            raise UsageError(
                f"{ontology.file}:{each.line}: class {each.name!r}: "
                f"{_field(each, prompt)} needs the model, and {why}: "
                f"run `segment` with --ontology {ontology.file}"
            )


def refuse_missing_vectors(ontology: Ontology, run: str, *, embedded: bool) -> bool:
    """Whether a class has a clip_score. Raises UsageError if the run then has no embeddings."""
    asked = [each for each in ontology.classes if each.clip_score is not None]
    if asked and not embedded:
        raise UsageError(
            f"{ontology.file}:{asked[0].line}: class {asked[0].name!r}: clip_score needs the "
            f"images' embeddings, and {run} has none: run `segment` with --embed into another "
            "output"
        )
    return bool(asked)


def _field(each: OntologyClass, prompt: Prompt) -> str:
    """The field of a class giving one of its prompts."""
    if prompt not in each.prompts:
        return "negatives"
    if prompt.examples and each.combine == "max":
        return "image_prompts"
    if not prompt.is_plain:
        return "combine: mean"
    return "phrases" if prompt.name in each.phrases else "templates"


def count_annotations(output: str) -> Counter[int]:
    """The number of annotations of each class_id, over all parts."""
    counts: Counter[int] = Counter()
    files = storage.list_files(storage.join(output, "annotations"), recursive=False)
    parts = [file for file in files if file.uri.endswith(".parquet")]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(_count_part, parts):
            counts.update(found)
    return counts


def _count_part(file: FileInfo) -> dict[int, int]:
    with open_part(file.uri) as parquet:
        ids = parquet.read(columns=["class_id"], use_threads=False)["class_id"]
    return {row["values"]: row["counts"] for row in pc.value_counts(ids).to_pylist()}


def describe_classes(counts: Mapping[int, int], ontology: Ontology) -> list[str]:
    """A line for each class with its number of annotations; a warning for one without any."""
    lines = []
    for class_id, each in enumerate(ontology.classes):
        count = counts.get(class_id, 0)
        lines.append(f"  {each.name}: {count:,} annotations")
        if not count:
            gates: dict[str, Any] = {"threshold": each.threshold, "presence": each.presence}
            gates |= {
                "clip_score": each.clip_score,
                "min_area": each.min_area - 1 and each.min_area,
            }
            gates |= {"negatives": ", ".join(each.negatives)}
            asked = ", ".join(f"{name} {value}" for name, value in gates.items() if value)
            lines[-1] += f" (warning: nothing passes {asked})"
    return lines
