"""Options of `clipseg-ray segment`."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from pipeline.config.fine import FineOptions
from pipeline.config.ontology import read_ontology
from pipeline.config.options import (
    ImageOptions,
    Input,
    Output,
    Precision,
    RunOptions,
    WorkerOptions,
    check_file,
    check_precision,
    read_lines,
    refuse_repeated,
)
from pipeline.config.prompt import Prompt, parse_image_prompts, recipes
from pipeline.errors import UsageError
from pipeline.schema import IMAGES, MASKS, PROBABILITIES, Table, embeddings

# Of a contact sheet, and Pillow's names of their formats.
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# The smallest maps from which masks agree with the direct ones by .99, see docs/labels.md
LABEL_SIDE: Literal["352"] = "352"
# As many cells for each of four looks along a side: 2 MB a map.
FINE_LABEL_SIDE: Literal["1408"] = "1408"


class MaskRule(NamedTuple):
    """How masks come of logits."""

    threshold: float = 0.5
    mask_size: Literal["image", "model"] = "image"
    kept_side: int = 0
    """Longer side of the probability maps to keep; 0: none."""

    def target(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """Size of the mask of an image of `size`, with logits of the model's `grid`."""
        return size if self.mask_size == "image" else grid


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Segment every image of INPUT with every prompt: one semantic mask for each, as Parquet."""

    input: Input
    """WebDataset tars, Parquet with image bytes, or a folder of images; local or s3://.
    Globs (*.tar) and braces ({0000..0099}.tar) name several."""

    output: Output
    """Folder for the tables, local or s3://. The same command again completes it."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that names what to segment; may be given several times."""

    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with one prompt a line; they follow those of --prompt."""

    image_prompt: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=IMAGE[:MASK.png]")
    ] = ()
    """Example image of the object to segment, and its mask; images of one NAME are averaged."""

    ontology: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with classes; their phrases and examples are prompts, too. See `label`."""

    prompt_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Instead of prompts for all: each image's own phrase or list of phrases, from a Parquet
    column, a field of the .json member, or else the .txt member."""

    model: str = "CIDAS/clipseg-rd64-refined"
    """Checkpoint: a local folder, an s3:// folder, a hub id, with @revision if wanted, or demo."""

    precision: Precision = "float32"
    """Arithmetic of the model on images. bf16 is the fast one on a GPU and on CPUs with AVX512-BF16
    or AMX; tf32 is for GPUs alone. Texts are always encoded in float32."""

    threshold: float = 0.5
    """Probability above which a pixel is in the mask; 0 to 1."""

    mask_size: Literal["image", "model"] = "image"
    """Size of the masks: the image's own, or the model's grid."""

    keep_probabilities: Literal["none", "88", "176", "352", "704", "1408", "2816"] = "none"
    """Also keep 8-bit probability maps of this size, for other thresholds later. With --ontology
    they are always kept: labels are cut from them; 352 by default, 1408 with --size or --tile."""

    embed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write CLIP embeddings of the images from the same pass, as `embed` does."""

    contact_sheet: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Finally draw a few images with their masks into this file: .png, .jpg or .webp."""

    fine: tyro.conf.OmitArgPrefixes[FineOptions] = field(default_factory=FineOptions)
    images: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold}: must be between 0 and 1")
        for_all = self.prompt or self.prompts or self.image_prompt or self.ontology
        if not (for_all or self.prompt_column):
            raise UsageError(
                'nothing to segment: give at least one --prompt "..." or --prompts FILE, or an '
                "--ontology, --image-prompt or --prompt-column"
            )
        if for_all and self.prompt_column:
            raise UsageError(
                f"--prompt-column {self.prompt_column}: each image has its own prompts then; leave "
                "out --prompt, --prompts, --image-prompt and --ontology"
            )
        if any(not p.strip() for p in self.prompt):
            raise UsageError("--prompt: an empty prompt; say what to segment")
        check_file("--contact-sheet", self.contact_sheet)
        if self.contact_sheet and not self.contact_sheet.lower().endswith(tuple(SUFFIXES)):
            raise UsageError(
                f"--contact-sheet {self.contact_sheet}: end its name in {', '.join(SUFFIXES)}"
            )
        check_file("--ontology", self.ontology)
        check_precision(self.precision, self.workers)
        if self.fine.given and self.images.decode != "exact":
            raise UsageError(
                "--decode fast: makes photos smaller than --size, --tile and --refine look at them"
            )
        if self.ontology is not None and self.keep_probabilities == "none":
            finer = self.fine.size or self.fine.tile
            side = FINE_LABEL_SIDE if finer else LABEL_SIDE
            object.__setattr__(self, "keep_probabilities", side)

    def resolve(self) -> SegmentConfig:
        """The same with every phrase of --prompts in `prompt`.

        Reads --prompts once: it may be a pipe. Raises UsageError for a file without any.
        """
        prompts = list(self.prompt)
        if self.prompts is not None:
            if not os.path.exists(self.prompts) and " " in self.prompts:
                raise UsageError(
                    f"--prompts {self.prompts!r}: no such file; to segment these words themselves: "
                    f"--prompt {shlex.quote(self.prompts)}"
                )
            prompts += read_lines(self.prompts, "--prompts", "prompts")
        resolved = replace(self, prompt=tuple(prompts), prompts=None)
        refuse_repeated([prompt.name for prompt in resolved.asked()], "prompt")
        return resolved

    def asked(self) -> list[Prompt]:
        """Every prompt of a resolved config, in the order of its prompt_id.

        One repeated by the ontology is one. Raises UsageError for an unusable ontology.
        """
        prompts = [Prompt(name=text, texts=(text,)) for text in self.prompt]
        prompts += parse_image_prompts(self.image_prompt)
        if self.ontology is not None:
            prompts += [p for p in read_ontology(self.ontology).prompts if p not in prompts]
        return prompts

    @property
    def rule(self) -> MaskRule:
        """How masks come of logits."""
        kept = 0 if self.keep_probabilities == "none" else int(self.keep_probabilities)
        return MaskRule(self.threshold, self.mask_size, kept)

    def fingerprint(self) -> dict[str, Any]:
        """Options deciding results: with another value of any, the output is another run's."""
        asked = self.asked()
        made = recipes(asked)
        return {
            "job": "segment",
            "input": self.input,
            "prompts": [prompt.name for prompt in asked],
            **({"recipes": made} if made else {}),
            **({"prompt_column": self.prompt_column} if self.prompt_column else {}),
            "threshold": self.threshold,
            "mask_size": self.mask_size,
            "keep_probabilities": self.keep_probabilities,
            "embed": self.embed,
            **self.fine.fingerprint(),
            **self.images.fingerprint(),
        }

    def tables(self, dimension: int, weights_hash: str) -> dict[str, Table]:
        """Tables of the job beside `errors`."""
        prompts = len(self.asked())
        tables = {"images": Table(IMAGES, 1), "masks": Table(MASKS, prompts, per_prompt=True)}
        if self.keep_probabilities != "none":
            tables["probabilities"] = Table(PROBABILITIES, prompts, per_prompt=True)
        if self.embed:
            facts = {"model": self.model, "weights_hash": weights_hash, "normalized": "true"}
            tables["embeddings"] = Table(embeddings(dimension, "float32", facts, text=False), 1)
        return tables
