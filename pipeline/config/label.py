"""Options of `clipseg-ray label`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import tyro

from pipeline.config.fine import FineOptions
from pipeline.config.ontology import Ontology, read_ontology
from pipeline.config.options import (
    ImageOptions,
    Input,
    Output,
    Precision,
    RunOptions,
    WorkerOptions,
    check_file,
)
from pipeline.config.prompt import recipes
from pipeline.config.segment import SegmentConfig
from pipeline.errors import UsageError
from pipeline.schema import ANNOTATIONS, IMAGES, Table
from pipeline.storage import check_uri, join


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Cut annotations from the kept probability maps of a `segment` run, without the model."""

    input: Annotated[Input, tyro.conf.arg(metavar="RUN")]
    """The OUTPUT of `segment` with --ontology, or with --keep-probabilities; local or s3://. With
    --model: images, as `segment` takes them."""

    output: Output
    """Folder for the tables, local or s3://. The same command again completes it."""

    ontology: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """YAML file with the classes; docs/labels.md describes its fields."""

    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Segment images first, with this checkpoint, into OUTPUT/segment; as `segment` takes it."""

    precision: Precision = "float32"
    """Arithmetic of the --model, as `segment` takes it."""

    fine: tyro.conf.OmitArgPrefixes[FineOptions] = field(default_factory=FineOptions)
    images: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_file("--ontology", self.ontology)
        given = self.images != ImageOptions() or self.fine.given or self.precision != "float32"
        if self.model is None and given:
            raise UsageError(
                "--image-column, --member-suffix, --max-pixels, --decode, --precision, --size, "
                "--tile, --refine: are for "
                "images; name the --model that segments them first"
            )

    def of_images(self) -> SegmentConfig:
        """The run of `segment` with the maps to cut, inside the output; with --model."""
        embed = any(each.clip_score is not None for each in self.read_ontology().classes)
        return SegmentConfig(
            input=self.input,
            output=join(check_uri(self.output), "segment"),
            model=self.model or "",
            precision=self.precision,
            ontology=self.ontology,
            embed=embed,
            fine=self.fine,
            images=self.images,
            workers=self.workers,
            run=self.run,
        )

    def of_maps(self) -> LabelConfig:
        """The rest of the work, after the run of of_images."""
        maps = self.of_images().output
        return replace(
            self,
            input=maps,
            model=None,
            precision="float32",
            fine=FineOptions(),
            images=ImageOptions(),
        )

    def read_ontology(self) -> Ontology:
        """The classes. Raises UsageError as config.ontology.read_ontology."""
        return read_ontology(self.ontology)

    def fingerprint(self) -> dict[str, Any]:
        """Options deciding results: with another value of any, the output is another run's."""
        return {
            "job": "label",
            "input": self.input,
            "ontology": describe_ontology(self.read_ontology()),
        }

    def tables(self) -> dict[str, Table]:
        """Tables of the job beside `errors`."""
        return {"images": Table(IMAGES, 1), "annotations": Table(ANNOTATIONS, 0)}


def describe_ontology(ontology: Ontology) -> dict[str, Any]:
    """Facts of an ontology deciding the annotations: hashes of its files, not their places."""
    classes = []
    for each in ontology.classes:
        facts = asdict(each)
        del facts["line"], facts["image_prompts"]
        classes.append(facts | {"examples": recipes(each.prompts)})
    return {"overlap": ontology.overlap, "instances": ontology.instances, "classes": classes}
