"""The CPUs and GPUs of the cluster, divided among the stages of a job."""

from __future__ import annotations

from typing import Any

from pipeline.config.options import WorkerOptions
from pipeline.errors import UsageError


def share_cluster(options: WorkerOptions, *, spare: float = 0.0) -> dict[str, Any]:
    """Divide the cluster: device, threads, read, task and actor of an Engine.

    Actors leave `spare` CPUs to tasks of others. Raises UsageError if the cluster lacks the wanted
    GPUs.
    """
    import ray
    import ray.data

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    device = options.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    share = divide(options, device, cpus=cpus, gpus=gpus, spare=spare)
    size = share["actor"].pop("actors")
    for options_of_stage in (share["read"], share["task"], share["actor"]):
        options_of_stage["batch_format"] = "pyarrow"
    share["actor"]["compute"] = ray.data.ActorPoolStrategy(size=size)
    return share


def divide(
    options: WorkerOptions, device: str, *, cpus: float, gpus: int, spare: float = 0.0
) -> dict[str, Any]:
    """Divide so many CPUs and GPUs; `actors` of `actor` is the number of workers with the model.

    Read, decode and write tasks take `task` CPUs each, so one of every kind fits beside the actors
    even on one CPU; else a streaming job waits for itself for ever.
    """
    actors = options.actors
    task = min(1.0, cpus / 8)
    for_actors = max(0.0, min(cpus / 2, cpus - spare))
    if device == "cuda":
        actors = actors or gpus
        if not 0 < actors <= gpus:
            raise UsageError(f"--device cuda: {actors or 1} GPUs wanted, the cluster has {gpus}")
        share = {"num_gpus": 1, "num_cpus": min(task, for_actors / actors)}
        threads = None
    else:
        actors = actors or max(1, int(cpus // 8))
        if actors > 4 * cpus:
            raise UsageError(f"--actors {actors}: the cluster has {cpus:g} CPUs, 4 fit on each")
        share = {"num_cpus": for_actors / actors}
        threads = max(1, round(cpus / actors))
    return {
        "device": device,
        "threads": threads,
        # Another share than the other tasks have, or Ray would make one task of reading and
        # decoding, and a single large shard would be decoded on a single CPU.
        "read": {"num_cpus": task / 2, "batch_size": 1},
        "task": {"num_cpus": task, "batch_size": None},
        "actor": share
        | {"actors": actors, "batch_size": options.batch_size or (256 if device == "cuda" else 16)},
    }
