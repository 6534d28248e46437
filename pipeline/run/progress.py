"""Progress of a job on the terminal: images, images/s, errors, time left.

On a terminal one line, redrawn; elsewhere one line every 30 s, to keep a log short.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LOG_INTERVAL_S = 30.0
SHORT_PHASE_S = 1.0  # below which a phase is not worth a line


class ProgressDisplay:
    """Count and show progress; a context manager. `quiet` shows nothing.

    The number of images is not known before the shards are read, so the time left comes from the
    bytes of finished and unfinished shards.
    """

    def __init__(self, total_bytes: int, total_shards: int, *, quiet: bool):
        self.total_bytes, self.total_shards, self.quiet = total_bytes, total_shards, quiet
        self.images = self.errors = self.shards = self.bytes = 0
        self.started = self.logged = time.monotonic()
        console = Console(stderr=True)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rates]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=max(total_bytes, 1), rates="")

    def __enter__(self) -> ProgressDisplay:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def rows(self, images: int, errors: int) -> None:
        """Count rows written to a fragment."""
        self.images += images
        self.errors += errors
        self._show()

    def shard(self, size_bytes: int) -> None:
        """Count a finished shard."""
        self.shards += 1
        self.bytes += size_bytes
        self._show()

    def line(self) -> str:
        """The progress in words."""
        seconds = time.monotonic() - self.started
        left = (
            f", {_duration(seconds * (self.total_bytes / self.bytes - 1))} left"
            if 0 < self.bytes < self.total_bytes
            else ""
        )
        rate = (self.images + self.errors) / max(seconds, 1e-9)
        return (
            f"{self.images:,} images, {rate:.1f} images/s, {self.errors:,} errors, "
            f"{self.shards:,} of {self.total_shards:,} shards{left}"
        )

    def _show(self) -> None:
        if self.quiet:
            return
        if not self.bar.disable:
            self.bar.update(self.task, completed=self.bytes, description="", rates=self.line())
        elif time.monotonic() - self.logged >= LOG_INTERVAL_S:
            self.logged = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)


@contextmanager
def phase(what: str, quiet: bool = False) -> Iterator[None]:
    """Say on stderr what is being waited for, and how long it took, unless that is no time."""
    started = time.monotonic()
    console = Console(stderr=True)
    shown = console.is_terminal and not quiet
    with console.status(what) if shown else nullcontext():
        yield
    seconds = time.monotonic() - started
    if seconds > SHORT_PHASE_S and not quiet:
        print(f"{what}: {seconds:.1f} s", file=sys.stderr, flush=True)


def tell(notes: list[str]) -> None:
    """Print lines for the user to stderr, and empty the list."""
    for note in notes:
        print(note, file=sys.stderr)
    notes.clear()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
