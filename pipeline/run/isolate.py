"""Run a generator in a process of its own, to survive and report the end of the process.

Decoders and pyarrow are C: crafted bytes may end their process, and nothing can be caught. After
the death of a worker its work is done again like this, to find the row at fault.
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
        """Whether it was killed from outside, as the kernel does when memory is short."""
        self.how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def run_apart(function: Callable[..., Iterator[T]], *args: Any) -> Iterator[T]:
    """Yield from function(*args), each value as soon as it is there; all must be picklable.

    Its errors are raised here. Raises ProcessDiedError if its process ends early.
    """
    # A copy of this process by fork would have its locks and none of its threads.
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_all, args=(sender, function, args), daemon=True)
    # Ctrl-C in a terminal reaches it, too: this process ends it then, without a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
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
