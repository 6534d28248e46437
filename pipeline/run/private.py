"""Every use of private names of Ray, and the versions known to have them.

A version without one of them is an error of one line. Checked with Ray 2.60.
"""

from __future__ import annotations

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.job_config

from pipeline.errors import JobError


def attempts_before() -> int:
    """Number of earlier attempts at the running task, lost with their workers."""
    worker: Any = _find(ray, "_private.worker.global_worker")
    return int(_find(worker, "core_worker.get_current_task_attempt_number")())


def job_with_path(folders: list[str]) -> ray.job_config.JobConfig:
    """A job whose workers look for modules in `folders`, beside Python's own.

    ray.init would add the driver's current folder, before all others, and its script's.
    """
    config = ray.job_config.JobConfig()
    _find(config, "_py_driver_sys_path.extend")
    config._py_driver_sys_path = _Fixed(folders)  # type: ignore[assignment]
    return config


class _Fixed:
    """Folders closed to additions."""

    def __init__(self, folders: list[str]):
        self.folders = folders

    def __iter__(self) -> Iterator[str]:
        return iter(self.folders)

    def extend(self, more: list[str]) -> None:
        """Leave the folders as they are."""


def reload_auth_mode() -> None:
    """Make Ray read RAY_AUTH_MODE again: it did so on import."""
    _find(ray, "_raylet.Config.initialize")("")


@contextmanager
def fewer_processes() -> Iterator[None]:
    """Let ray.init start no autoscaler monitor, log monitor and API server in this block.

    A Ray on one machine, for one job, needs none of them; together they take seconds of CPU. A
    version of Ray without these names starts them.
    """
    node = getattr(getattr(getattr(ray, "_private", None), "node", None), "Node", None)
    names = ("start_monitor", "start_log_monitor", "start_api_server")
    known = {name: getattr(node, name) for name in names if hasattr(node, name)}
    for name in known:
        setattr(node, name, lambda self, *args, **options: None)
    try:
        yield
    finally:
        for name, method in known.items():
            setattr(node, name, method)


_DATA = "ray.data._internal"
_HELPERS_OF = "2.60."  # 2.56 asks them otherwise
# Modules, the function in them, and what its actor would answer; other calls have no answer.
_HELPERS: tuple[tuple[tuple[str, ...], str, str, Callable[..., Any]], ...] = (
    (
        (f"{_DATA}.stats",),
        "get_or_create_stats_actor",
        "gen_dataset_id",
        lambda: uuid.uuid4().hex,
    ),
    (
        (
            f"{_DATA}.utils.cached_ray_internals",
            f"{_DATA}.execution.operators.actor_pool_map_operator",
        ),
        "get_or_create_actor_location_tracker",
        "get_actor_locations",
        lambda actors: dict.fromkeys(actors, ray.get_runtime_context().get_node_id()),
    ),
    (
        (f"{_DATA}.cluster_autoscaler.default_autoscaling_coordinator",),
        "get_or_create_autoscaling_coordinator",
        "get_reserved_resources",
        lambda _: {ray.get_runtime_context().get_node_id(): ray.cluster_resources()},
    ),
)


@contextmanager
def fewer_actors() -> Iterator[None]:
    """Let Ray Data's executions in this block start no helper actors of their own.

    Each is a process importing Ray Data: one keeps statistics for a dashboard, one knows the nodes
    of actors, one divides the cluster among executions. On one machine, with one execution and no
    dashboard, the answers are known here. Another version of Ray than was tried starts them.
    """
    known: list[tuple[Any, str, Any]] = []
    for modules, name, asked, answer in _HELPERS if ray.__version__.startswith(_HELPERS_OF) else ():
        helper = _Helper(asked, answer)
        for module in modules:
            with contextlib.suppress(ImportError, AttributeError):
                owner = importlib.import_module(module)
                known.append((owner, name, getattr(owner, name)))
                setattr(owner, name, lambda told=helper: told)
    try:
        yield
    finally:
        for owner, name, function in known:
            setattr(owner, name, function)


class _Helper:
    """In the place of an actor, also on workers: answers one kind of call, and ignores others."""

    def __init__(self, asked: str, answer: Callable[..., Any]):
        self.asked, self.answer = asked, answer

    def __getattr__(self, name: str) -> _Call:
        if name.startswith("__"):  # of pickle
            raise AttributeError(name)
        return _Call(self.answer if name == self.asked else None)


class _Call:
    """A method of a _Helper, called as an actor's."""

    def __init__(self, answer: Callable[..., Any] | None):
        self.answer = answer

    def remote(self, *arguments: Any, **options: Any) -> Any:
        """A reference to the answer; None if nobody waits for one."""
        return ray.put(self.answer(*arguments)) if self.answer else None


@contextmanager
def no_sigterm_handler() -> Iterator[None]:
    """Let ray.init set no handler for SIGTERM in this block: its own ends the process in silence.

    The job has one of its own, ending it as Ctrl-C does. A version of Ray without this name sets
    its own.
    """
    utils: Any = getattr(getattr(ray, "_private", None), "utils", None)
    known = getattr(utils, "set_sigterm_handler", None)
    if known:
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        if known:
            utils.set_sigterm_handler = known


def _find(owner: Any, path: str) -> Any:
    """An attribute behind dots. Raises JobError naming one missing in this version of Ray."""
    for name in path.split("."):
        try:
            owner = getattr(owner, name)
        except AttributeError as error:
            raise JobError(
                f"Ray {ray.__version__} has no {path}: this version of clipseg-ray knows Ray 2.56 "
                "to 2.60; install one of them"
            ) from error
    return owner
