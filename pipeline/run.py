"""The one module here that knows Ray: connect to it, share its CPUs, keep the account of a job.

Ray Data streams the rows; the stages are in the job's file. What comes out at the end of the
stream are account rows, which the driver adds up here: when the account of a shard closes, a Ray
task puts the shard's fragments together.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.data

from pipeline import errors
from pipeline.account import Run, close_run
from pipeline.commit import finish_shard
from pipeline.config import WorkerOptions
from pipeline.errors import JobError, PipelineError, StorageError, UsageError
from pipeline.progress import ProgressDisplay
from pipeline.retry import DEFAULT_TIMEOUT_S, TIMEOUT_VARIABLE, storage_timeout
from pipeline.shard import Shard, shard_to_row

# Blocks of the plan. Ray keeps each as an object; beyond this several shards share a task.
READ_TASKS = 5_000
# Shards whose parts are being put together at the same time.
FINISHING_AT_ONCE = 8
# Deaths of a task's workers over one batch after which a job ends.
WORKER_DEATHS = 8
# Rows after which a job may be stopped for too many that failed.
ERROR_RATE_ROWS = 1_000


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How the CPUs and GPUs of the cluster are shared among the stages.

    Read, decode and write tasks take `task_cpus` each, so that one of every kind fits beside the
    actors even on one CPU; without that a streaming job waits for itself for ever.
    """

    device: str
    """"cpu" or "cuda"."""
    read: dict[str, Any]
    """Arguments of map_batches for reading: one shard after the other."""
    task: dict[str, Any]
    """Arguments of map_batches for the other tasks: a block as it comes."""
    actor: dict[str, Any]
    """Arguments of map_batches for the actors that hold the model."""
    threads: int | None
    """CPU threads of an actor's model; None leaves them to torch."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Attach to the cluster that RAY_ADDRESS names, or start Ray on this machine.

    What a stage raises comes out as the PipelineError it was, or as a JobError.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if storage_timeout() != DEFAULT_TIMEOUT_S:  # the workers' default, too
            told = {TIMEOUT_VARIABLE: str(storage_timeout())}
            options["runtime_env"] = {"env_vars": told}
        if not os.environ.get("RAY_ADDRESS"):
            _require_token()
            # Ray ends a task's process that was idle for 1 s: the next pays for its imports again.
            os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
            # Not any cluster that /tmp says is running on this machine: it may be another user's.
            options |= {"address": "local", "include_dashboard": False}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError) as error:
            raise JobError(f"Ray cannot be reached or started: {error}") from error
    # What Ray would log of an error comes out as one line of ours.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _as_pipeline_error(error) from error


def _require_token() -> None:
    """Let the Ray that starts here answer only to who knows its token: this process and its own.

    Without one, whoever reaches its ports can run code. The token lives in the environment of
    these processes and no longer than they do; no file is written or read. RAY_AUTH_MODE, where
    it is set, has the last word, and so has a token that is named.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    # Ray looked at the mode when it was imported; before 2.60 it turns nothing on by itself.
    ray._raylet.Config.initialize("")  # type: ignore[attr-defined]


def share_cluster(options: WorkerOptions) -> Shares:
    """Divide the cluster. Raises UsageError if GPUs are asked for that it does not have."""
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    device, actors = options.device, options.actors
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    task = min(1.0, cpus / 8)
    if device == "cuda":
        actors = actors or gpus
        if not 0 < actors <= gpus:
            raise UsageError(f"--device cuda: {actors or 1} GPUs wanted, the cluster has {gpus}")
        share = {"num_gpus": 1, "num_cpus": min(task, cpus / 2 / actors)}
        threads = None
    else:
        actors = actors or max(1, int(cpus // 8))
        if actors > 4 * cpus:
            raise UsageError(f"--actors {actors}: the cluster has {cpus:g} CPUs, 4 fit on each")
        share = {"num_cpus": cpus / 2 / actors}
        threads = max(1, round(cpus / actors))
    return Shares(
        device=device,
        # Another share than the other tasks have, or Ray would make one task of reading and
        # decoding, and a single large shard would be decoded on a single CPU.
        read={"num_cpus": task / 2, "batch_format": "pyarrow", "batch_size": 1},
        task={"num_cpus": task, "batch_format": "pyarrow", "batch_size": None},
        actor=share
        | {
            "batch_format": "pyarrow",
            "compute": ray.data.ActorPoolStrategy(size=actors),
            "batch_size": options.batch_size or (64 if device == "cuda" else 16),
        },
        threads=threads,
    )


def dataset_of(shards: list[Shard]) -> ray.data.Dataset:
    """One row per shard; every block is a read task of its own: one shard, or a few of many."""
    rows = [shard_to_row(shard) for shard in shards]
    blocks = min(max(len(rows), 1), READ_TASKS)
    return ray.data.from_items(rows, override_num_blocks=blocks)


def bounded(stage: Callable[..., Any], *, apart: bool = False) -> Callable[[Any], Any]:
    """A stage that runs as tasks, for map_batches, whose batches do not kill workers for ever.

    Ray Data starts what was lost with a worker again however often, which is right where machines
    come and go, and never ends where the batch itself is the cause. After WORKER_DEATHS deaths over
    one batch the stage raises JobError. `apart`: from the first death on it is called with
    apart=True, and so can tell which row it was.
    """
    name = getattr(stage, "__name__", type(stage).__name__)

    def checked(batch: Any) -> Any:
        worker: Any = ray._private.worker.global_worker
        deaths = worker.core_worker.get_current_task_attempt_number()  # Ray tells it nowhere else
        if deaths >= WORKER_DEATHS:
            column = "shard" if "shard" in batch.column_names else "name"
            shards = ", ".join(sorted(set(batch[column].to_pylist())))
            raise JobError(f"{name}: its worker died {deaths} times over the same rows of {shards}")
        return stage(batch, apart=True) if apart and deaths else stage(batch)

    checked.__name__ = name
    return checked


@dataclass
class _Open:
    """What has come out of a shard so far."""

    records: int = 0
    images: int = 0
    outputs: int = 0
    total: int = -1
    fragments: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        self.records += row["images"] + row["errors"]
        self.images += row["images"]
        self.outputs += row["outputs"]
        self.total = max(self.total, row["total"])
        self.fragments.append(row["fragment"])

    def closes(self, outputs_per_image: int) -> bool:
        """Whether all records are there, and all that belongs to each image."""
        return self.total == self.records and self.outputs == self.images * outputs_per_image


def finish(run: Run, streams: list[ray.data.Dataset], *, quiet: bool) -> dict[str, int]:
    """Run the stream of each of the run's passes to its end, and close the run.

    Returns the counts over all shards. Raises JobError when a shard or a row is missing.
    """
    started = time.monotonic()
    todo = [shard for each in run.passes for shard in each.todo]
    size_bytes = sum(shard.size_bytes for shard in todo)
    with ProgressDisplay(size_bytes, len(todo), quiet=quiet) as progress:
        for each, accounts in zip(run.passes, streams, strict=True):
            if each.todo:
                _follow(accounts, each, progress)
    return close_run(run, time.monotonic() - started)


def _follow(accounts: ray.data.Dataset, run: Run, progress: ProgressDisplay) -> None:
    """Run a stream to its end, and finish each shard when its account closes."""
    shards = {shard.name: shard for shard in run.todo}
    task = ray.remote(num_cpus=0, max_retries=3)(finish_shard)
    open_shards: dict[str, _Open] = {}
    finishing: list[Any] = []
    reasons: Counter[str] = Counter()
    images = 0

    def collect(at_most: int) -> None:
        """Take in finished shards until at most so many are still being put together."""
        nonlocal finishing
        while len(finishing) > at_most:
            ready, finishing = ray.wait(finishing)
            for receipt in ray.get(ready):
                progress.shard(shards[receipt["shard"]].size_bytes)

    outputs = sum(table.rows_per_image for name, table in run.tables.items() if name != "images")
    for row in accounts.iter_rows():
        account = open_shards.setdefault(row["shard"], _Open())
        account.add(row)
        images += row["images"]
        progress.rows(row["images"], row["errors"])
        if row["reason"]:
            reasons[row["reason"]] += max(row["errors"], 1)  # one for a shard without rows
            _stop_at_errors(run, images, reasons)
        if account.closes(outputs):
            shard = shards[row["shard"]]
            ref = task.remote(run.output, shard, account.fragments, account.total, run.tables)
            finishing.append(ref)
            del open_shards[row["shard"]]
            collect(FINISHING_AT_ONCE)
    collect(0)


def _stop_at_errors(run: Run, images: int, reasons: Counter[str]) -> None:
    """Raise JobError when too large a share of the rows failed."""
    errors = reasons.total()
    rows = images + errors
    if rows >= ERROR_RATE_ROWS and errors > run.max_error_rate * rows:
        often, _ = reasons.most_common(1)[0]
        raise JobError(
            f"{errors:,} of the first {rows:,} rows failed, most often with {often}, which is more "
            f"than --max-error-rate {run.max_error_rate:g} allows: look at {run.output}/errors, "
            "and raise it if the input is like that"
        )


def _as_pipeline_error(error: BaseException) -> PipelineError:
    """The PipelineError inside what Ray raised, or a JobError with the last line of the cause."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, PipelineError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    # Ray Data wraps what a stage raises, and pickling the wrapper loses it: the worker's traceback
    # is what is left.
    found = re.findall(r"^pipeline\.errors\.(\w+): (.*)$", str(error), re.MULTILINE)
    if found:
        name, message = found[-1]
        kind = getattr(errors, name, JobError)
        return kind(message) if issubclass(kind, (UsageError, StorageError)) else JobError(message)
    # Behind the cause stands what Ray made of it, which ends in advice on how to retry.
    cause = str(error).split("\n\nThe above exception was the direct cause", 1)[0]
    lines = [line for line in cause.splitlines() if line.strip()]
    return JobError(f"a worker failed: {lines[-1].strip() if lines else type(error).__name__}")
