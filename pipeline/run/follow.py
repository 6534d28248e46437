"""Follow a run to its end: keep the account of each shard, commit the shard when it closes."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config.options import WorkerOptions
from pipeline.errors import JobError, PipelineError
from pipeline.read.shard import Shard
from pipeline.run.close import close_run, note_missing
from pipeline.run.engine import Dataset, Engine, stage_seconds
from pipeline.run.launch import open_engine
from pipeline.run.lifecycle import Pass, Run
from pipeline.run.progress import Amount, ProgressDisplay
from pipeline.write.commit import finish_shard, outputs_per_image

# Rows after which a job may be stopped for too many that failed.
ERROR_RATE_ROWS = 1_000
# Shards for which the storage did not answer, each for --storage-timeout, after which a job that
# got nothing at all is stopped.
SILENT_SHARDS = 10


def follow_run(
    run: Run,
    stream: Callable[[Pass, Engine], Dataset],
    options: WorkerOptions,
    *,
    engine: Callable[[Engine], Engine] = lambda engine: engine,
) -> dict[str, int]:
    """Run the stream of each of the run's passes to its end, and close the run.

    `stream` makes the stream of a pass over its shards to do; it is not called if there are none,
    and with none at all no engine started. `engine` may put another one in its place. Returns the
    counts over all shards. Raises JobError when a shard or a row is missing.
    """
    started = time.monotonic()
    lost: dict[str, str] = {}
    busy_s: Counter[str] = Counter()
    if run.is_done:
        run.notes.append("nothing was left to do")
        return close_run(run, time.monotonic() - started)
    with (
        open_engine(options, sample_s=run.sample_s) as opened,
        _open_display(run, options) as progress,
    ):
        given = engine(opened)
        for of_pass in run.passes:
            # An addition needs what the first pass has of the shard.
            left = [shard for shard in of_pass.todo if shard.name not in lost]
            if not left:
                continue
            each = replace(of_pass, todo=left)
            follower = _Follower(run, each, given, progress)
            try:
                running = stream(each, given)
                lost |= follower.follow(running)
            except PipelineError:
                note_missing(run, lost | follower.lost)
                raise
            busy_s.update(stage_seconds(running))
        busy_s.update({name: spent.get("wall_s", 0.0) for name, spent in given.spent.items()})
        if run.sample_s:
            run.record.update(device=given.device, stages=given.spent)
    return close_run(run, time.monotonic() - started, lost, busy_s)


def _open_display(run: Run, options: WorkerOptions) -> ProgressDisplay:
    """The display of the passes with something left to do."""
    passes = [each for each in run.passes if each.todo]
    todo: dict[Hashable, Shard] = {
        (each.ledger.first_prompt, shard.name): shard for each in passes for shard in each.todo
    }
    amount = Amount(todo, before=sum(each.rows for each in passes))
    every = sum(len(each.shards) for each in passes)
    return ProgressDisplay(amount, (every - len(todo), every), quiet=options.quiet)


@dataclass
class _Account:
    """Counts of a shard so far."""

    records: int = 0
    images: int = 0
    outputs: int = 0
    total: int = -1
    skipped: int = 0
    fragments: list[str] = field(default_factory=list)

    def add(self, *, images: int, errors: int, outputs: int, fragment: str) -> None:
        self.records += images + errors
        self.images += images
        self.outputs += outputs
        if fragment:
            self.fragments.append(fragment)

    def closes(self, outputs_per_image: int) -> bool:
        """Whether all records are there, and all rows of each image."""
        return self.total == self.records and self.outputs == self.images * outputs_per_image


class _Follower:
    """The accounts of one pass."""

    def __init__(self, run: Run, of_pass: Pass, engine: Engine, progress: ProgressDisplay):
        self.run, self.of_pass, self.engine, self.progress = run, of_pass, engine, progress
        self.shards = {shard.name: shard for shard in of_pass.todo}
        self.outputs = outputs_per_image(of_pass.tables)
        self.complete: deque[tuple[Shard, _Account]] = deque()  # and waiting to be finished
        self.finishing: set[Future[dict[str, Any]]] = set()
        self.lost: dict[str, str] = {}
        self.rates = ErrorRate(run.max_error_rate, [s.size_bytes for s in of_pass.shards])
        self.accounts = {name: self._resumed(name) for name in of_pass.kept}

    def _resumed(self, name: str) -> _Account:
        """The account of a shard with fragments of an earlier command."""
        account = _Account()
        for f in self.of_pass.kept[name]:
            account.add(images=f.images, errors=f.errors, outputs=f.outputs, fragment=f.name)
            self.rates.images += f.images
        self.progress.amount.add(account.records, 0)
        return account

    def follow(self, stream: Dataset) -> dict[str, str]:
        """Run the stream to its end. Returns shards with storage faults, and the faults."""
        for row in stream.iter_rows():
            self._add(row)
            self._finish()
        while self.finishing:
            wait(self.finishing, return_when=FIRST_COMPLETED)
            self._finish()
        return self.lost

    def _add(self, row: dict[str, Any]) -> None:
        name = row["shard"]
        shard = self.shards[name]
        account = self.accounts.setdefault(name, _Account())
        account.add(**{k: row[k] for k in ("images", "errors", "outputs", "fragment")})
        account.total = max(account.total, row["total"])
        account.skipped = max(account.skipped, row["skipped"])
        if account.total >= 0 or row["fault"]:
            records = account.records if row["fault"] else account.total
            self.progress.known((self.of_pass.ledger.first_prompt, name), records)
        self.progress.rows(row["images"], row["errors"], row["size_bytes"])
        self.rates.add(row["images"], row["errors"], row["reason"])
        if row["fault"] and name not in self.lost:
            self.lost[name] = row["fault"]
            self.rates.lose(shard.size_bytes, row["fault"])
        elif row["reason"] and row["total"] >= 0:  # damage ended the shard early
            self.rates.cut(shard.size_bytes, account.records)
        if account.closes(self.outputs):
            del self.accounts[name]
            self.rates.close(shard.size_bytes, account.records)
            self.complete.append((shard, account))

    def _finish(self) -> None:
        """Take in finished shards, and begin to finish others; waits for none of them.

        A stream stops if its accounts are not read.
        """
        for future in [future for future in self.finishing if future.done()]:
            self.finishing.remove(future)
            future.result()
            self.progress.shard()
        while self.complete and len(self.finishing) < self.engine.finishers:
            shard, account = self.complete.popleft()
            self.finishing.add(
                self.engine.submit(
                    finish_shard,
                    self.of_pass.ledger,
                    shard,
                    account.fragments,
                    (account.total, account.skipped),
                    self.of_pass.tables,
                )
            )


class ErrorRate:
    """The failed share of an input; rows never read count by the bytes of their shard."""

    def __init__(self, limit: float, sizes: Sequence[int]):
        self.limit, self.whole_bytes = limit, sum(sizes)
        self.usual_bytes = self.whole_bytes / max(sum(map(bool, sizes)), 1)
        self.images = self.closed_rows = self.closed_bytes = self.cut_bytes = self.silent = 0
        self.lost_bytes = 0.0
        self.reasons: Counter[str] = Counter()

    def add(self, images: int, errors: int, reason: str) -> None:
        """Count rows. Raises JobError when too large a share failed."""
        self.images += images
        if errors:
            self.reasons[reason] += errors
            self._check()
        if self.lost_bytes:
            self._check_lost()

    def close(self, size_bytes: int, rows: int) -> None:
        """Count a complete shard."""
        self.closed_rows += rows
        self.closed_bytes += size_bytes

    def cut(self, size_bytes: int, rows: int) -> None:
        """Count the rows lost to damage in a shard, after the `rows` it gave."""
        self.cut_bytes += max(size_bytes - int(rows / max(self.rows_per_byte, 1e-12)), 0)
        self._check()

    def lose(self, size_bytes: int, fault: str) -> None:
        """Count a shard not given by the storage; one never there has no size."""
        self.lost_bytes += size_bytes or self.usual_bytes
        self.silent += fault.startswith("shard_unreadable")
        if self.silent >= SILENT_SHARDS and not self.images and not self.reasons:
            raise JobError(
                f"the storage gave nothing of the first {self.silent} shards ({fault}); "
                "the same command takes them up again"
            )
        self._check_lost()

    def _check_lost(self) -> None:
        """Hold what was lost against the whole input: it may have come first."""
        rows = self.images + self.reasons.total()
        if rows >= ERROR_RATE_ROWS and self.lost_bytes > self.limit * self.whole_bytes:
            raise JobError(
                f"the storage did not give {self.lost_bytes / (self.whole_bytes or 1):.0%} of the "
                f"input's bytes, which is more than --max-error-rate {self.limit:g} allows; "
                "the same command takes them up again"
            )

    @property
    def rows_per_byte(self) -> float:
        """Of the complete shards; 0 while there is none."""
        return self.closed_rows / self.closed_bytes if self.closed_bytes else 0.0

    def _check(self) -> None:
        never_read = round(self.cut_bytes * self.rows_per_byte)
        failed = self.reasons.total() + never_read
        rows = self.images + failed
        if rows < ERROR_RATE_ROWS or failed <= self.limit * rows:
            return
        often = max(
            [*self.reasons.items(), ("shards that cannot be read", never_read)],
            key=lambda pair: pair[1],
        )[0]
        raise JobError(
            f"{failed:,} of the first {rows:,} rows failed, most often with {often}, which is more "
            f"than --max-error-rate {self.limit:g} allows: look at the errors table, and raise it "
            "if the input is like that"
        )
