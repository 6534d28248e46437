"""RAY_ADDRESS: said while Ray is waited for, and tried before Ray tries it for minutes."""

from __future__ import annotations

import os
import re
import socket

from pipeline.errors import JobError, one_line


def ray_address() -> str:
    """The cluster to join; "" to start Ray on this machine."""
    return os.environ.get("RAY_ADDRESS", "")


def starting_ray() -> str:
    """The phase of starting Ray, or of joining its cluster."""
    address = ray_address()
    return f"joining the Ray cluster at {one_line(address, 200)}" if address else "starting Ray"


def refuse_nobody(address: str, *, timeout_s: float = 10) -> None:
    """Raise JobError if nothing listens at `host:port`, of a cluster or behind ray://.

    ray.init tries for minutes. Other forms of an address (auto) are left to it.
    """
    match = re.fullmatch(r"(?:ray://)?\[?([^/\]]+?)\]?:(\d{1,5})", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout_s).close()
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise JobError(
            f"no Ray cluster at RAY_ADDRESS={one_line(address, 200)}: {why.lower()}; correct it, "
            "or unset it to start Ray on this machine"
        ) from error
