"""Run a command and watch what it and all its descendants hold in memory, from /proc (Linux)."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a command took."""

    seconds: float
    """From its start to its exit."""
    peak_pss_mib: float
    """Largest sum of proportional set sizes: a page that several share is counted once in all."""
    peak_rss_mib: float
    """Largest sum of resident set sizes: a shared page, Ray's object store's too, counts for each
    process that has touched it."""
    processes: int
    """Most of them at a time."""


def run_watched(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, period_s: float = 0.2
) -> Watched:
    """Run to the end, sampling every `period_s`. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    pss = rss = processes = 0
    while process.poll() is None:
        pids = descendants(process.pid)
        sizes = [memory_kib(pid) for pid in pids]
        pss = max(pss, sum(size[0] for size in sizes))
        rss = max(rss, sum(size[1] for size in sizes))
        processes = max(processes, len(pids))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(period_s)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Watched(
        seconds=seconds, peak_pss_mib=pss / 1024, peak_rss_mib=rss / 1024, processes=processes
    )


def descendants(root: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid ...", where the name may hold anything
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def memory_kib(pid: int) -> tuple[int, int]:
    """(PSS, RSS) of a process; zeros when it is gone."""
    sizes = {"Pss:": 0, "Rss:": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, *rest = line.split()
            if name in sizes:
                sizes[name] = int(rest[0])
    return sizes["Pss:"], sizes["Rss:"]
