"""Options that several jobs share, and the checks of values; a job's own stand in its own file.

A job's configuration is one frozen dataclass, checked when it is made. The command line is derived
from it (see command), so a default, its help and its check stand in one place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.errors import UsageError
from pipeline.storage.uri import check_uri

Input = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INPUT")]
Output = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are found and decoded."""

    image_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Parquet column that holds the images; found by itself where it has a usual name."""

    member_suffix: Annotated[str | None, tyro.conf.arg(metavar="SUFFIX")] = None
    """Of each sample of a tar only the member of this suffix is an image ("left.png": what follows
    the first dot of its name); by default each of its images is a row."""

    max_pixels: int = 50_000_000
    """Images with more pixels are not decoded but become rows of the errors table."""

    def __post_init__(self) -> None:
        check_positive(self, "max_pixels")
        if self.member_suffix is not None and not self.member_suffix.strip("."):
            raise UsageError('--member-suffix: an empty suffix; name one such as "left.png"')


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where the work is done; none of these changes a result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPUs of the cluster if it has any."""

    actors: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Workers that hold the model: by default one per GPU, or one per eight CPUs."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Images the model takes at once: by default 64 on a GPU, 16 on a CPU."""

    local: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run in this process, without Ray: for a few hundred images. The rows are the same."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress display, only the last line."""

    def __post_init__(self) -> None:
        check_positive(self, "actors", "batch_size")
        if self.local and self.device == "cuda":
            raise UsageError("--local: runs on the CPU; leave out --device cuda")
        if self.local and self.actors:
            raise UsageError("--local: has no workers; leave out --actors")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run deals with trouble; none of these changes a result."""

    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete what an earlier run left in OUTPUT, and start over."""

    max_error_rate: float = 0.05
    """Stop when a larger share of the rows failed, after the first 1,000; 0 to 1."""

    storage_timeout: float = 300.0
    """Seconds for which one read or write is tried again while the storage fails."""

    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stop where any file of INPUT is left out, instead of saying which."""

    retry: tyro.conf.Suppress[Literal["none", "retryable", "all"]] = "none"
    """Which finished shards with failures are made anew; what retry-failed asks for."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_error_rate <= 1:
            raise UsageError(f"--max-error-rate {self.max_error_rate}: must be between 0 and 1")
        if not 0 < self.storage_timeout < float("inf"):
            raise UsageError(f"--storage-timeout {self.storage_timeout}: must be above 0")


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
