"""Lines on the terminal while a job runs: the phase, images done of how many, rate, time left.

On a terminal one line, redrawn; elsewhere, and as JSON, a line every 30 s.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.config import log
from pipeline.read.shard import Shard

LOG_INTERVAL_S = 30.0
RATE_WINDOW_S = 60.0
SHORT_PHASE_S = 1.0  # below which a phase is not worth a line
WIDE = 120  # characters of a terminal that has room for a bar beside the words
WAITING = "reading, waiting for the first batch"

Clock = Callable[[], float]


class Amount:
    """Images of the shards left to do: how many are done, and of how many.

    If a shard's own listing or footer does not tell its images, they are estimated: by the bytes of
    whole shards, and before there is one, by the encoded bytes of good images.
    """

    def __init__(self, todo: Mapping[Hashable, Shard], before: int = 0):
        """`before`: images finished by earlier commands, counted as done and in the total."""
        self._open = dict(todo)
        self._known = before + sum(max(shard.rows, 0) for shard in todo.values())
        self._unknown_bytes = sum(s.size_bytes for s in todo.values() if s.rows < 0)
        self._unknown = sum(shard.rows < 0 for shard in todo.values())
        self._whole = [0, 0]  # images and bytes of shards that are whole
        self._came = [0, 0]  # images and bytes of images that came out
        self.done = before

    def add(self, images: int, size_bytes: int) -> None:
        """Count finished images, and the encoded bytes of the good ones."""
        self.done += images
        if size_bytes:
            self._came = [self._came[0] + images, self._came[1] + size_bytes]

    def close(self, key: Hashable, images: int) -> None:
        """Take the number of a shard's images as known."""
        shard = self._open.pop(key, None)
        if shard is None:
            return
        self._known += images - max(shard.rows, 0)
        if shard.rows < 0:
            self._unknown -= 1
            self._unknown_bytes -= shard.size_bytes
            self._whole = [self._whole[0] + images, self._whole[1] + shard.size_bytes]

    @property
    def is_exact(self) -> bool:
        """Whether the total is no estimate."""
        return not self._unknown

    @property
    def total(self) -> int | None:
        """Images in all; None before there is anything to estimate them by."""
        images, size_bytes = self._whole if self._whole[1] and self._whole[0] else self._came
        if self._unknown and not (images and size_bytes):
            return None
        unknown = self._unknown_bytes * images / size_bytes if self._unknown else 0
        return max(self.done, self._known + round(unknown))


class ProgressDisplay:
    """Progress of a run; a context manager. `quiet` shows nothing."""

    def __init__(
        self,
        amount: Amount,
        shards: tuple[int, int],
        *,
        quiet: bool,
        clock: Clock = time.monotonic,
    ):
        """`shards`: how many were done before, and how many there are in all."""
        self.amount, self.quiet, self.clock = amount, quiet, clock
        self.shards, self.total_shards = shards
        self.errors = 0
        self.started = self.logged = clock()
        self.seen: deque[tuple[float, int]] = deque()  # time and images done, of the last minute
        console = Console(stderr=True)
        columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
        if console.width >= WIDE:
            columns.insert(2, BarColumn(bar_width=20))
        self.bar = Progress(
            *columns,
            console=console,
            transient=True,
            disable=quiet or log.is_json() or not console.is_terminal,
        )
        self.task = self.bar.add_task(WAITING, total=None)
        self.ended = threading.Event()

    def __enter__(self) -> ProgressDisplay:
        self.bar.start()
        if self.bar.disable and not self.quiet:
            threading.Thread(target=self._keep_telling, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ended.set()
        self.bar.stop()

    def rows(self, images: int, errors: int, size_bytes: int) -> None:
        """Count images written to a fragment, and failed ones."""
        self.amount.add(images + errors, size_bytes)
        self.errors += errors
        now = self.clock()
        self.seen.append((now, self.amount.done))
        while now - self.seen[0][0] > RATE_WINDOW_S:
            self.seen.popleft()
        self._show()

    def known(self, key: Hashable, images: int) -> None:
        """Take in how many images a shard has."""
        self.amount.close(key, images)

    def shard(self) -> None:
        """Count a finished shard."""
        self.shards += 1
        self._show()

    @property
    def rate(self) -> float:
        """Images per second, over the last minute; 0 before there is a second batch."""
        seconds = self.seen[-1][0] - self.seen[0][0] if self.seen else 0.0
        return (self.seen[-1][1] - self.seen[0][1]) / seconds if seconds else 0.0

    def facts(self) -> dict[str, Any]:
        """The state of the job, as numbers."""
        total, rate = self.amount.total, self.rate
        left = (total - self.amount.done) / rate if total and rate else None
        return {
            "images": self.amount.done,
            "images_total": total,
            "total_is_exact": self.amount.is_exact,
            "errors": self.errors,
            "images_per_s": round(rate, 1),
            "shards": self.shards,
            "shards_total": self.total_shards,
            "left_s": left if left is None else round(left),
        }

    def line(self) -> str:
        """The state of the job, in words."""
        facts = self.facts()
        if not self.seen:
            return f"{WAITING}: {self.clock() - self.started:.0f} s"
        total, about = facts["images_total"], "" if self.amount.is_exact else "about "
        of = f" of {about}{total:,}" if total is not None else ""
        share = f" ({self.amount.done / total:.0%})" if total else ""
        rate = f", {self.rate:.1f} images/s" if self.rate else ""
        left = f", {duration(facts['left_s'])} left" if facts["left_s"] else ""
        return (
            f"{self.amount.done:,}{of} images{share}{rate}{left}, {self.errors:,} errors, "
            f"{self.shards:,} of {self.total_shards:,} shards"
        )

    def tell(self) -> None:
        """Write a line, not to be redrawn."""
        self.logged = self.clock()
        log.say("progress", self.line(), **self.facts())

    def _show(self) -> None:
        if self.quiet:
            return
        if not self.bar.disable:
            total = self.amount.total
            self.bar.update(
                self.task, completed=self.amount.done, total=total, description=self.line()
            )
        elif self.clock() - self.logged >= LOG_INTERVAL_S:
            self.tell()

    def _keep_telling(self) -> None:
        """Report from another thread the wait for a batch, and its length."""
        if self.ended.wait(SHORT_PHASE_S) or self.seen:
            return
        log.say("phase", f"{WAITING} ...", phase=WAITING)
        while not self.ended.wait(LOG_INTERVAL_S):
            if self.clock() - self.logged >= LOG_INTERVAL_S:
                self.tell()


@contextmanager
def phase(what: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Say what is waited for, at once on a terminal, else after a second; then how long it took.

    Yields a function to be told how far it is.
    """
    if quiet or log.is_quiet():
        yield lambda how_far: None
        return
    started = time.monotonic()
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    drawn = console.is_terminal and not log.is_json()
    status = Progress(*columns, console=console, transient=True) if drawn else None
    task = status.add_task(what, total=None) if status else None
    ended = threading.Event()
    seen = " ..."

    def show(how_far: str) -> None:
        nonlocal seen
        seen = f": {how_far}"
        if status and task is not None:
            status.update(task, description=f"{what}{seen}")

    def keep_telling() -> None:
        wait_s = SHORT_PHASE_S
        while not ended.wait(wait_s):
            log.say("phase", f"{what}{seen}", phase=what)
            wait_s = LOG_INTERVAL_S

    if not status:
        threading.Thread(target=keep_telling, daemon=True).start()
    log.how_far.append(show)
    try:
        with status or nullcontext():
            yield show
    finally:
        ended.set()
        log.how_far.remove(show)
    seconds = time.monotonic() - started
    if seconds > SHORT_PHASE_S:
        log.say("phase", f"{what}: {seconds:.1f} s", phase=what, seconds=round(seconds, 1))


def tell(notes: list[str]) -> None:
    """Print lines for the user to stderr, and empty the list."""
    for note in notes:
        log.say("note", note)
    notes.clear()


def duration(seconds: float) -> str:
    """As 0:03:42."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
