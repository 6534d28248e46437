"""Options of `clipseg-ray classify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from pipeline.config.options import (
    ImageOptions,
    Input,
    Output,
    Precision,
    RunOptions,
    WorkerOptions,
    check_positive,
    check_precision,
    read_lines,
)
from pipeline.errors import UsageError
from pipeline.schema import IMAGES, Table, labels

TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Label every image of INPUT with its most probable labels, as Parquet tables."""

    input: Input
    """WebDataset tars, Parquet with image bytes, or a folder of images; local or s3://. Or the
    OUTPUT of an embed run, or embeddings/ in it: then its vectors are classified, not images."""

    output: Output
    """Folder for the tables, local or s3://. The same command again completes it."""

    labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with one label a line; required unless the model has labels of its own."""

    label: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Labels before those of --labels; for calls from Python."""

    template: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Sentence with {} in the place of the label; with several, a label's embedding is their mean.
    By default "a photo of a {}."."""

    top: Annotated[int, tyro.conf.arg(metavar="K")] = 5
    """Labels to keep for each image, at most all."""

    model: str | None = None
    """CLIP, CLIPSeg or image-classification checkpoint: a local folder, an s3:// folder, or a hub
    id with @revision. By default that of the embeddings, or openai/clip-vit-base-patch16."""

    precision: Precision = "float32"
    """Arithmetic of the model on images. bf16 is the fast one on a GPU and on CPUs with AVX512-BF16
    or AMX; tf32 is for GPUs alone. Texts are always encoded in float32."""

    images: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_positive(self, "top")
        check_precision(self.precision, self.workers)
        for template in self.template:
            if template.count("{}") != 1:
                raise UsageError(
                    f"--template {template!r}: must contain {{}} exactly once, for the label"
                )

    def all_labels(self) -> list[str]:
        """The labels in the order of their label_id, none if none are given. Raises UsageError.

        A repeated one has two of them: CLIP's own list of ImageNet's classes has such names.
        """
        found = list(self.label)
        if self.labels is not None:
            found += read_lines(self.labels, "--labels", "labels")
        return found

    def templates(self) -> list[str]:
        """The templates, or the default one."""
        return list(self.template) or [TEMPLATE]

    def fingerprint(self) -> dict[str, Any]:
        """Options deciding results, beside the model and its labels."""
        return {
            "job": "classify",
            "input": self.input,
            "top": self.top,
            **self.images.fingerprint(),
        }

    def tables(self, facts: dict[str, str], top: int, *, images: bool) -> dict[str, Table]:
        """The tables of the job beside `errors`.

        `facts` as in schema.labels; `top`: how many labels there are of each image, --top or all;
        `images`: whether images are read.
        """
        tables = {"images": Table(IMAGES, 1)} if images else {}
        return tables | {"labels": Table(labels(facts), top)}
