"""Options shared by several jobs, and checks of values; a job's own options are in its own file.

A job's configuration is one frozen dataclass, checked when it is made. The command line is derived
from it (see command), so a default, its help and its check stand in one place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.errors import UsageError
from pipeline.storage.uri import check_uri

Input = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INPUT")]
Output = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]
Precision = Literal["float32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are found and decoded."""

    image_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Parquet column with the images; by default found by its name and type."""

    member_suffix: Annotated[str | None, tyro.conf.arg(metavar="SUFFIX")] = None
    """Suffix of the image members of a tar, from the first dot of the name: left.png. By default
    every image of a sample is a row."""

    max_pixels: int = 50_000_000
    """Largest image to decode, in pixels; larger ones are rows of the errors table."""

    decode: Literal["exact", "fast"] = "exact"
    """fast decodes large JPEGs at a half, a quarter or an eighth of their size, as far as the model
    needs no more: at 1920 x 1080 twice as many a second, of slightly other pixels."""

    def __post_init__(self) -> None:
        check_positive(self, "max_pixels")
        if self.member_suffix is not None and not self.member_suffix.strip("."):
            raise UsageError('--member-suffix: an empty suffix; name one such as "left.png"')

    def fingerprint(self) -> dict[str, Any]:
        """Options deciding results; later ones only if not at their default, so that earlier runs
        are known again."""
        later = {"decode": "exact"}
        return {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where and how the work is done; no option here changes a result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto takes the GPUs of the cluster if it has any."""

    actors: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Workers with the model: by default one per GPU, or one per eight CPUs."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images in a batch of the model: by default 256 on a GPU, 16 on a CPU; fewer with --size, 4
    with --tile."""

    local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run in this process, without Ray: for a few hundred images. The rows are the same."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display, only warnings and the summary."""

    log_format: Literal["text", "json"] = "text"
    """Lines of phases, progress, warnings and errors on stderr: text, or a JSON object each."""

    def __post_init__(self) -> None:
        check_positive(self, "actors", "batch_size")
        if self.local and self.device == "cuda":
            raise UsageError("--local: runs on the CPU; leave out --device cuda")
        if self.local and self.actors:
            raise UsageError("--local: has no workers; leave out --actors")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run deals with failures; no option here changes a result."""

    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete the run in OUTPUT and start over."""

    max_error_rate: float = 0.05
    """Maximum share of failed rows, after the first 1,000, before the job stops; 0 to 1."""

    storage_timeout: float = 300.0
    """Seconds to retry one read or write while the storage fails."""

    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Refuse an INPUT with files that are no images or shards, instead of listing them."""

    retry: tyro.conf.Suppress[Literal["none", "retryable", "all"]] = "none"
    """Finished shards to reprocess: those with retryable failures, or with any (retry-failed)."""

    only: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Names of the shards to process; all when empty (verify --recompute)."""

    sample_s: tyro.conf.Suppress[float] = 0.0
    """Seconds for the first images of a few shards, instead of the whole input (plan)."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_error_rate <= 1:
            raise UsageError(f"--max-error-rate {self.max_error_rate}: must be between 0 and 1")
        if not 0 < self.storage_timeout < float("inf"):
            raise UsageError(f"--storage-timeout {self.storage_timeout}: must be above 0")


def check_precision(precision: Precision, workers: WorkerOptions) -> None:
    """Raise UsageError for TF32 if no GPU is wanted."""
    if workers.local or workers.device == "cpu":
        check_cpu_precision(precision)


def check_cpu_precision(precision: Precision) -> None:
    """Raise UsageError for TF32: no CPU has it."""
    if precision == "tf32":
        raise UsageError("--precision tf32: only GPUs compute in it; on a CPU float32 or bf16")


def check_positive(options: object, *names: str) -> None:
    """Raise UsageError for a given number below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def check_file(option: str, file: str | None) -> None:
    """Raise UsageError, naming the option, for a value other than a path or URI."""
    try:
        check_uri(file or ".")
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from error


def read_lines(file: str, option: str, what: str) -> list[str]:
    """Read the non-blank lines of a UTF-8 text file, stripped.

    Raises UsageError, naming the option, for an unreadable file or one without such a line.
    """
    check_file(option, file)
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        hint = f"; {option} names a text file with one of the {what} a line"
        raise UsageError(f"{option} {file}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {file}: not a UTF-8 text file") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"{option} {file}: no {what} in it; write one a line")
    return found


def refuse_repeated(values: list[str], what: str) -> None:
    """Raise UsageError naming the first repeated value of a list."""
    repeated = next((value for value, n in Counter(values).items() if n > 1), None)
    if repeated is not None:
        raise UsageError(f"the {what} {repeated!r} is given twice")
