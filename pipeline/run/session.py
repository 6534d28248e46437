"""Ray started or joined for one job, and its errors as one line each."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from pipeline import errors
from pipeline.errors import JobError, PipelineError, StorageError, UsageError
from pipeline.storage.retry import DEFAULT_TIMEOUT_S, TIMEOUT_VARIABLE, storage_timeout


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
