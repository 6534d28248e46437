"""A generator run in a process of its own, so that what ends that process can be told.

Decoders and pyarrow are C: on bytes made for it they may end their process, where nothing can be
caught. Where a worker has died, its work is done again like this, to find the row to blame.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


class ProcessDiedError(Exception):
    """The process ended before its work did."""

    def __init__(self, exit_code: int | None):
        super().__init__(exit_code)
        code = exit_code or 0
        self.killed = -code == signal.SIGKILL
        """Whether from outside, as the kernel does where memory is short."""
        self.how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def run_apart(function: Callable[..., Iterator[T]], *args: Any) -> Iterator[T]:
    """What function(*args) yields, each value as soon as it is there; all must be picklable.

    What it raises is raised here. Raises ProcessDiedError where its process ends before.
    """
    # A copy of this process by fork would have its locks and none of its threads.
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_all, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            try:
                kind, value = receiver.recv()
            except (EOFError, OSError):
                process.join()
                raise ProcessDiedError(process.exitcode) from None
            if kind == "value":
                yield value
            elif kind == "error":
                raise value
            else:
                return
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send_all(sender: Connection, function: Callable[..., Iterator[T]], args: Any) -> None:
    try:
        for value in function(*args):
            sender.send(("value", value))
    # It goes on in the other process.
    except Exception as error:
        sender.send(("error", error))
    else:
        sender.send(("end", None))
