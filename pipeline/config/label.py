"""Options of `clipseg-ray label`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import tyro

from pipeline.config.ontology import Ontology, read_ontology
from pipeline.config.options import Input, Output, RunOptions, WorkerOptions, check_file
from pipeline.config.prompt import recipes
from pipeline.schema import ANNOTATIONS, IMAGES, Table


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Cut annotations from the kept probability maps of a `segment` run, without the model."""

    input: Annotated[Input, tyro.conf.arg(metavar="RUN")]
    """The OUTPUT of `segment` with --ontology, or with --keep-probabilities; local or s3://."""

    output: Output
    """Folder for the tables, local or s3://. The same command again completes it."""

    ontology: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """YAML file with the classes; docs/labels.md describes its fields."""

    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_file("--ontology", self.ontology)

    def read_ontology(self) -> Ontology:
        """The classes. Raises UsageError as config.ontology.read_ontology."""
        return read_ontology(self.ontology)

    def fingerprint(self) -> dict[str, Any]:
        """Options that decide results: with another value of any, the output is another run's."""
        return {
            "job": "label",
            "input": self.input,
            "ontology": describe_ontology(self.read_ontology()),
        }

    def tables(self) -> dict[str, Table]:
        """Tables of the job beside `errors`."""
        return {"images": Table(IMAGES, 1), "annotations": Table(ANNOTATIONS, 0)}


def describe_ontology(ontology: Ontology) -> dict[str, Any]:
    """Facts of an ontology that decide the annotations: hashes of its files, not their places."""
    classes = []
    for each in ontology.classes:
        facts = asdict(each)
        del facts["line"], facts["image_prompts"]
        classes.append(facts | {"examples": recipes(each.prompts)})
    return {"overlap": ontology.overlap, "instances": ontology.instances, "classes": classes}
