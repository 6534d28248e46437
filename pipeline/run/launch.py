"""The engine of a job, started beside the loading of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TypeVar

from pipeline.config import log
from pipeline.config.options import WorkerOptions
from pipeline.run.address import ray_address, refuse_nobody, starting_ray
from pipeline.run.bytecode import describe_uncompiled
from pipeline.run.engine import Engine
from pipeline.run.lifecycle import is_unfinished
from pipeline.run.progress import phase, tell

T = TypeVar("T")
Progress = Callable[[int, int], None]


@contextmanager
def open_engine(options: WorkerOptions, *, sample_s: float = 0.0) -> Iterator[Engine]:
    """The engine asked for in the options: Ray, or with `local` this process.

    `sample_s`: seconds for a sample of the images, in this process; see run.sample.

    Errors of stages come out as the PipelineError they were, or as a JobError. Raises UsageError
    for missing GPUs.
    """
    if sample_s:
        from pipeline.run.sample import open_sampler

        open_it: Callable[..., AbstractContextManager[Engine]] = partial(open_sampler, sample_s)
    elif options.local:
        from pipeline.run.local import open_local as open_it
    else:
        from pipeline.run.session import open_ray as open_it  # Ray: 2 s that not all can do with
    with open_it(options) as engine:
        yield engine


def load_beside(options: WorkerOptions, output: str, load: Callable[[Progress], T]) -> T:
    """The result of `load`, called in a thread while Ray starts in this one.

    `load` is given a function to be told how many texts are encoded, and of how many.

    Ray must start in the main thread. It is left alone with `local`, and if the run in `output` is
    complete: then there may be nothing to do.
    """
    starts = not options.local and is_unfinished(output, new=True)
    if starts:
        refuse_nobody(ray_address())
        log.mute_native_stderr()
    tell(describe_uncompiled(("torch", "ray") if starts else ("torch",)))
    what = f"{starting_ray()}, loading the model" if starts else "loading the model"
    with ThreadPoolExecutor(1) as beside, phase(what) as show:
        loading = beside.submit(
            load, lambda done, total: show(f"{done:,} of {total:,} texts encoded")
        )
        if starts:
            from pipeline.run.session import start_ray

            start_ray()
        return loading.result()
