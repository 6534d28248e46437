"""The one retry layer: requests with transient faults are sent again until a timeout.

The clients below storage retry nothing themselves. Each request has a timeout of its own: a listing
of many pages or an upload in parts may take as long as it makes progress.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import TransientError
from pipeline.storage.faults import storage_errors

# Also how the driver tells its workers (see run.ray_session).
TIMEOUT_VARIABLE = "CLIPSEG_RAY_STORAGE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 300.0

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0
_SILENT_S = 10.0  # of trying, before a line says so: whoever waits should know what for

T = TypeVar("T")


def set_storage_timeout(timeout_s: float) -> None:
    """Set the seconds to retry a failing request, for this process and its children."""
    os.environ[TIMEOUT_VARIABLE] = str(timeout_s)


def storage_timeout() -> float:
    """Seconds to retry a failing request."""
    try:
        timeout_s = float(os.environ.get(TIMEOUT_VARIABLE, ""))
    except ValueError:
        return DEFAULT_TIMEOUT_S
    return timeout_s if 0 < timeout_s < float("inf") else DEFAULT_TIMEOUT_S


def persist(uri: str, attempt: Callable[[], T], *, timeout_s: float | None = None) -> T:
    """Call `attempt` until it meets no TransientError, or until the timeout has passed.

    Errors of the client inside `attempt` come out as a StorageError (see storage_errors). A
    TransientError tells the time of all attempts; other errors come out at once.
    The last attempt starts before the timeout and may outlast it, by a hang of `patience_s`.
    """
    timeout_s = storage_timeout() if timeout_s is None else timeout_s
    started = time.monotonic()
    wait_s, tries, told = _FIRST_WAIT_S, 0, False
    while True:
        tries += 1
        try:
            with storage_errors(uri):
                return attempt()
        except TransientError as error:
            tried_s = time.monotonic() - started
            if tried_s >= timeout_s:
                times = "once" if tries == 1 else f"{tries} times"
                raise TransientError(f"{error}; tried {times} in {tried_s:.1f} s") from error
            if tried_s > _SILENT_S and not told:
                told = True
                message = "%s; trying again for up to %.0f s"
                logging.getLogger(__name__).warning(message, error, timeout_s - tried_s)
        # Jittered, or all workers would come back at the same moment.
        time.sleep(min(wait_s * random.uniform(0.5, 1), timeout_s - tried_s))
        wait_s = min(wait_s * 2, _LONGEST_WAIT_S)


def patience_s() -> float:
    """Seconds without a byte before an attempt counts as failed and another follows.

    Half the timeout, or a single hang would be the only attempt.
    """
    return min(60.0, storage_timeout() / 2)
