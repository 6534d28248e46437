"""Ray as the engine of one job: started or joined, and its errors as one line each."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import ray

from pipeline import errors
from pipeline.config import log
from pipeline.config.command import at_end
from pipeline.config.options import WorkerOptions
from pipeline.errors import JobError, PipelineError, StorageError, UsageError
from pipeline.run.address import ray_address, refuse_nobody, starting_ray
from pipeline.run.engine import Engine
from pipeline.run.guard import guarded
from pipeline.run.package import check_workers, worker_path
from pipeline.run.private import (
    fewer_actors,
    fewer_processes,
    job_with_path,
    no_sigterm_handler,
    reload_auth_mode,
)
from pipeline.run.progress import phase
from pipeline.storage.retry import DEFAULT_TIMEOUT_S, TIMEOUT_VARIABLE, storage_timeout

_started_here: list[bool] = []  # not empty between start_ray and the end of the session
FINISHING_THREADS = 4  # shards of a local job that are put together at the same time
# Of a cluster's CPUs, for each such shard; most of the time it waits for the storage.
CPUS_PER_FINISHER = 4


@contextmanager
def open_ray(options: WorkerOptions) -> Iterator[Engine]:
    """Ray as the engine of a job; see engine.open_engine."""
    with ray_session(quiet=options.quiet):
        from pipeline.run.resources import share_cluster  # Ray Data: see start_ray
        from pipeline.run.source import dataset_of

        on_cluster = bool(ray_address())
        fewer = contextlib.nullcontext() if on_cluster else fewer_actors()
        with fewer, ThreadPoolExecutor(FINISHING_THREADS) as threads:
            yield Engine(
                **share_cluster(options),
                dataset=dataset_of,  # type: ignore[arg-type]  # more of the same methods
                guard=guarded,
                # On one machine a thread saves the start of a worker; on a cluster the bytes of
                # all shards would pass through the driver.
                submit=_submit_task if on_cluster else threads.submit,
                finishers=_cluster_finishers() if on_cluster else FINISHING_THREADS,
            )


def _cluster_finishers() -> int:
    cpus = ray.cluster_resources().get("CPU", 0.0)
    return max(2 * FINISHING_THREADS, int(cpus / CPUS_PER_FINISHER))


@cache
def _task(function: Any) -> Any:
    # Spread: tasks without a CPU would all be put on the driver's node, which is never full.
    return ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")(function)


def _submit_task(function: Any, *arguments: Any) -> Future[Any]:
    """Call a function in a Ray task."""
    future: Future[Any] = _task(function).remote(*arguments).future()
    return future


@contextmanager
def ray_session(*, quiet: bool = False) -> Iterator[None]:
    """Ray, started or joined if need be, and ended if it was started here.

    Errors of tasks come out as the PipelineError they were, or as a JobError.
    """
    if not ray.is_initialized():
        log.mute_native_stderr()
    with phase(starting_ray(), quiet=quiet or ray.is_initialized()):
        start_ray()
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _as_pipeline_error(error) from error
    finally:
        _end_ray()


def _end_ray() -> None:
    """End Ray, or leave its cluster, if it was started or joined here."""
    if _started_here:
        ray.shutdown()
        _started_here.clear()


def start_ray() -> None:
    """Attach to the cluster at RAY_ADDRESS, or start Ray on this machine.

    Called in the main thread. Raises JobError, one line, if it fails.
    """
    if not ray.is_initialized():
        _start()
        _started_here.append(True)
        at_end.callback(_end_ray)  # of a job that fails before its session
    from ray.data import DataContext  # 1 s, in which Ray's workers start already

    # What Ray would log of an error comes out as one line of ours.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _start() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if storage_timeout() != DEFAULT_TIMEOUT_S:  # the workers' default, too
        told = {TIMEOUT_VARIABLE: str(storage_timeout())}
        options["runtime_env"] = {"env_vars": told}
    address = ray_address()
    alone = not address
    refuse_nobody(address)
    if "://" not in address:  # a Ray Client adds no folders by itself
        options["job_config"] = job_with_path(worker_path())
    if alone:
        _require_token()
        # Ray ends a task's process that was idle for 1 s: the next pays for its imports again.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        # Workers run at nice 15 otherwise, behind everything else on this machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Not any cluster that /tmp says is running on this machine: it may be another user's.
        options |= {"address": "local", "include_dashboard": False}
    try:
        with fewer_processes() if alone else contextlib.nullcontext(), no_sigterm_handler():
            ray.init(**options)
    # A node that is slow to start raises a plain Exception.
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise JobError(f"Ray cannot be reached or started: {said}") from error
    if not alone:
        check_workers()


def _require_token() -> None:
    """Make the Ray started here require a token, known to this process and its children.

    Without one, anybody with access to its ports can run code. The token lives in the environment
    of these processes; no file is written or read. RAY_AUTH_MODE and a named token have the last
    word if they are set.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    # Ray looked at the mode when it was imported; before 2.60 it turns nothing on by itself.
    reload_auth_mode()


def _as_pipeline_error(error: BaseException) -> PipelineError:
    """The PipelineError inside an error of Ray, or a JobError with the last line of its cause."""
    inner: BaseException | None = error
    while inner is not None:
        # Ray makes a class of its own that is ours, too, and whose text is a traceback.
        if isinstance(inner, PipelineError) and not isinstance(inner, ray.exceptions.RayError):
            said = str(inner).splitlines()  # Ray adds advice on how to retry
            return type(inner)(said[0]) if len(said) > 1 else inner
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
