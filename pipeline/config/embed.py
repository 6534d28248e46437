"""Options of `clipseg-ray embed`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from pipeline.config.options import (
    ImageOptions,
    Input,
    Output,
    Precision,
    RunOptions,
    WorkerOptions,
    check_precision,
)
from pipeline.schema import IMAGES, Table, embeddings


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embed every image of INPUT with CLIP, and write the vectors as Parquet tables."""

    input: Input
    """WebDataset tars, Parquet with image bytes, or a folder of images; local or s3://.
    Globs (*.tar) and braces ({0000..0099}.tar) name several."""

    output: Output
    """Folder for the tables, local or s3://. The same command again completes it."""

    model: str = "openai/clip-vit-base-patch16"
    """CLIP or CLIPSeg checkpoint: a local folder, an s3:// folder, a hub id, with @revision if
    wanted, or demo."""

    precision: Precision = "float32"
    """Arithmetic of the model on images. bf16 is the fast one on a GPU and on CPUs with AVX512-BF16
    or AMX; tf32 is for GPUs alone. Texts are always encoded in float32."""

    text_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Also embed the text beside each image: a Parquet column, a field of the .json member, or
    else the .txt member."""

    normalize: bool = True
    """Scale every vector to length 1: a dot product is then the cosine."""

    dtype: Literal["float32", "float16"] = "float32"
    """Type of the vectors in the table; not every reader takes float16."""

    images: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_precision(self.precision, self.workers)

    def fingerprint(self) -> dict[str, Any]:
        """Options deciding results: with another value of any, the output is another run's."""
        return {
            "job": "embed",
            "input": self.input,
            "text_column": self.text_column,
            "normalize": self.normalize,
            "vectors": self.dtype,
            **self.images.fingerprint(),
        }

    def tables(self, dimension: int, weights_hash: str) -> dict[str, Table]:
        """Tables of the job beside `errors`."""
        normalized = "true" if self.normalize else "false"
        facts = {"model": self.model, "weights_hash": weights_hash, "normalized": normalized}
        schema = embeddings(dimension, self.dtype, facts, text=self.text_column is not None)
        return {
            "images": Table(IMAGES, 1),
            "embeddings": Table(schema, 1),
        }
