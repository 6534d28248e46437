"""Every use of names that Ray does not promise, with the versions they are known to hold for.

A version without one of them is told in one line. Checked with Ray 2.60.
"""

from __future__ import annotations

from typing import Any

import ray

from pipeline.errors import JobError


def attempts_before() -> int:
    """How many attempts at the task that runs here were lost with their workers."""
    worker: Any = _find(ray, "_private.worker.global_worker")
    return int(_find(worker, "core_worker.get_current_task_attempt_number")())


def reload_auth_mode() -> None:
    """Make Ray read RAY_AUTH_MODE again, which it did when it was imported."""
    _find(ray, "_raylet.Config.initialize")("")


def _find(owner: Any, path: str) -> Any:
    """An attribute behind dots. Raises JobError naming what this version of Ray lacks."""
    for name in path.split("."):
        try:
            owner = getattr(owner, name)
        except AttributeError as error:
            raise JobError(
                f"Ray {ray.__version__} has no {path}: this version of clipseg-ray knows Ray 2.56 "
                "to 2.60; install one of them"
            ) from error
    return owner
