"""What a job is asked to do: one frozen dataclass per job, checked when it is made.

The command line is derived from these classes: a default, its help and its check stand here and
nowhere else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.errors import UsageError
from pipeline.schema import IMAGES, MASKS, PROBABILITIES, Table, embeddings
from pipeline.uri import check_uri

Input = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INPUT")]
Output = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are found and decoded."""

    image_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Parquet column that holds the images; found by itself where it has a usual name."""

    max_pixels: int = 50_000_000
    """Images with more pixels are not decoded but become rows of the errors table."""

    def __post_init__(self) -> None:
        check_positive(self, "max_pixels")


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where the work is done; none of these changes a result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPUs of the cluster if it has any."""

    actors: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Workers that hold the model: by default one per GPU, or one per eight CPUs."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images the model takes at once: by default 64 on a GPU, 16 on a CPU."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display, only the last line."""

    def __post_init__(self) -> None:
        check_positive(self, "actors", "batch_size")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run deals with trouble; none of these changes a result."""

    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete what an earlier run left in OUTPUT, and start over."""

    max_error_rate: float = 0.05
    """Stop when a larger share of the rows failed, after the first 1,000; 0 to 1."""

    storage_timeout: float = 300.0
    """Seconds for which one read or write is tried again while the storage fails."""

    retry: tyro.conf.Suppress[Literal["none", "retryable", "all"]] = "none"
    """Which finished shards with failures are made anew; what retry-failed asks for."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_error_rate <= 1:
            raise UsageError(f"--max-error-rate {self.max_error_rate}: must be between 0 and 1")
        if not 0 < self.storage_timeout < float("inf"):
            raise UsageError(f"--storage-timeout {self.storage_timeout}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Segment every image of INPUT with every prompt, and write the masks as Parquet tables."""

    input: Input
    """WebDataset tars, Parquet with image bytes, or a folder of images; local or s3://.
    Globs (*.tar) and braces ({0000..0099}.tar) name several."""

    output: Output
    """Folder for the tables, local or s3://. The same command again completes it."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to segment, in words; give it once for each prompt."""

    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file with one prompt a line, after those of --prompt."""

    model: str = "CIDAS/clipseg-rd64-refined"
    """Checkpoint: a local folder, an s3:// folder, or a hub id, with @revision if wanted."""

    threshold: float = 0.5
    """A pixel belongs to the mask when its probability is above this; 0 to 1."""

    mask_size: Literal["image", "model"] = "image"
    """Masks at the image's own size, or on the model's grid."""

    keep_probabilities: Literal["none", "88", "176", "352"] = "none"
    """Also keep 8-bit probability maps of this size, so that thresholds can be changed later."""

    embed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write CLIP embeddings of the images, as `embed` does, from the same pass."""

    contact_sheet: Annotated[str | None, tyro.conf.arg(metavar="PNG")] = None
    """Afterwards draw a few images with their masks into this PNG file."""

    images: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold}: must be between 0 and 1")
        if not self.prompt and self.prompts is None:
            raise UsageError(
                'nothing to segment: give at least one --prompt "..." or --prompts FILE'
            )
        if any(not p.strip() for p in self.prompt):
            raise UsageError("--prompt: an empty prompt; say what to segment")
        check_file("--contact-sheet", self.contact_sheet)

    def all_prompts(self) -> list[str]:
        """Every prompt in the order of its prompt_id. Raises UsageError for a file without any."""
        prompts = list(self.prompt)
        if self.prompts is not None:
            prompts += read_lines(self.prompts, "--prompts", "prompts")
        refuse_repeated(prompts, "prompt")
        return prompts

    def fingerprint(self) -> dict[str, Any]:
        """What decides the results of a run: another value of any of these is another run."""
        return {
            "job": "segment",
            "input": self.input,
            "prompts": self.all_prompts(),
            "threshold": self.threshold,
            "mask_size": self.mask_size,
            "keep_probabilities": self.keep_probabilities,
            "embed": self.embed,
            **asdict(self.images),
        }

    def tables(self, dimension: int, weights_hash: str) -> dict[str, Table]:
        """The tables that the job writes beside `errors`."""
        prompts = len(self.all_prompts())
        tables = {"images": Table(IMAGES, 1), "masks": Table(MASKS, prompts, per_prompt=True)}
        if self.keep_probabilities != "none":
            tables["probabilities"] = Table(PROBABILITIES, prompts, per_prompt=True)
        if self.embed:
            facts = {"model": self.model, "weights_hash": weights_hash, "normalized": "true"}
            tables["embeddings"] = Table(embeddings(dimension, "float32", facts, text=False), 1)
        return tables


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embed every image of INPUT with CLIP, and write the vectors as Parquet tables."""

    input: Input
    """WebDataset tars, Parquet with image bytes, or a folder of images; local or s3://.
    Globs (*.tar) and braces ({0000..0099}.tar) name several."""

    output: Output
    """Folder for the tables, local or s3://. The same command again completes it."""

    model: str = "openai/clip-vit-base-patch16"
    """CLIP or CLIPSeg checkpoint: a local folder, an s3:// folder, or a hub id with @revision."""

    text_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Also embed the text beside each image: a Parquet column, a field of the .json member, or
    else the .txt member."""

    normalize: bool = True
    """Scale every vector to length 1, so that a dot product is the cosine."""

    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors in the table; not every reader takes float16."""

    images: tyro.conf.OmitArgPrefixes[ImageOptions] = field(default_factory=ImageOptions)
    workers: tyro.conf.OmitArgPrefixes[WorkerOptions] = field(default_factory=WorkerOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the results of a run: another value of any of these is another run."""
        return {
            "job": "embed",
            "input": self.input,
            "text_column": self.text_column,
            "normalize": self.normalize,
            "vectors": self.dtype,
            **asdict(self.images),
        }

    def tables(self, dimension: int, weights_hash: str) -> dict[str, Table]:
        """The tables that the job writes beside `errors`."""
        normalized = "true" if self.normalize else "false"
        facts = {"model": self.model, "weights_hash": weights_hash, "normalized": normalized}
        schema = embeddings(dimension, self.dtype, facts, text=self.text_column is not None)
        return {
            "images": Table(IMAGES, 1),
            "embeddings": Table(schema, 1),
        }


def check_positive(options: object, *names: str) -> None:
    """Raise UsageError for a number that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def check_file(option: str, file: str | None) -> None:
    """Raise UsageError, naming the option, for what is no path or URI, which may hold a secret."""
    try:
        check_uri(file or ".")
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from error


def read_lines(file: str, option: str, what: str) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, without the blanks around them.

    Raises UsageError, naming the option, for a file that cannot be read or has no such line.
    """
    check_file(option, file)
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {file}: not a UTF-8 text file") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"{option} {file}: no {what} in it; write one a line")
    return found


def refuse_repeated(values: list[str], what: str) -> None:
    """Raise UsageError naming the first value that stands in a list twice."""
    repeated = next((value for value, n in Counter(values).items() if n > 1), None)
    if repeated is not None:
        raise UsageError(f"the {what} {repeated!r} is given twice")
