"""Configuration of the commands holding a run against ground truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.config.ontology import Ontology, read_ontology
from pipeline.config.options import check_file
from pipeline.errors import UsageError

GroundTruth = Annotated[str, tyro.conf.arg(name="ground-truth", metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Hold the kept maps of a run, or labels, against ground truth."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|LABELS")]
    """The OUTPUT of `segment` with kept maps, or of `label`; local or s3://."""

    truth: GroundTruth
    """COCO .json, Label Studio .json, masks .parquet, or a folder of PNGs; docs/evaluate.md."""

    ontology: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """For a RUN: classes with their phrases, thresholds and gates; by default each prompt is a
    class, at probability 0.5."""

    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write evaluation.parquet and evaluation.html, over what is there."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display."""

    def __post_init__(self) -> None:
        check_file("RUN|LABELS", self.source)
        check_file("--ground-truth", self.truth)
        check_file("--ontology", self.ontology)
        check_file("--output", self.output)

    def read_ontology(self) -> Ontology | None:
        """The classes, if given. Raises UsageError."""
        return read_ontology(self.ontology) if self.ontology else None


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Choose the threshold and the presence gate of each class by ground truth."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The OUTPUT of `segment` with kept maps; local or s3://."""

    truth: GroundTruth
    """COCO .json, Label Studio .json, masks .parquet, or a folder of PNGs; docs/evaluate.md."""

    ontology: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The classes, with the prompts of the run."""

    output: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Where to write the ontology with what was chosen, a new file."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display."""

    def __post_init__(self) -> None:
        check_file("RUN", self.source)
        check_file("--ground-truth", self.truth)
        check_file("--ontology", self.ontology)
        check_file("--output", self.output)
        if self.output == self.ontology:
            raise UsageError(f"--output {self.output}: is the --ontology itself; name a new file")
