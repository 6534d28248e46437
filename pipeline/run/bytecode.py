"""Whether Python has compiled the large packages: if not, every process does it anew.

Installers leaving it out (uv by default) cost 10 s a process on first use, and on every use if
nothing can be written beside the packages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import cache_from_source, find_spec
from pathlib import Path


def describe_uncompiled(
    packages: Sequence[str],
    *,
    find: Callable[[str], ModuleSpec | None] = find_spec,
    writes: bool | None = None,
) -> list[str]:
    """A line with the remedy if bytecode of packages is missing; none is imported.

    `writes`: whether Python writes bytecode; None: as this process does.
    """
    found = [(name, spec.origin) for name in packages if (spec := find(name)) and spec.origin]
    missing = {name: Path(origin) for name, origin in found if not _is_compiled(origin)}
    if not missing:
        return []
    folder = next(iter(missing.values())).parent.parent
    names = " and ".join(missing)
    writes = not sys.dont_write_bytecode if writes is None else writes
    if writes and os.access(folder, os.W_OK):
        cost = f"{names} are compiled to bytecode by this first start, which takes 10 s longer"
    elif writes:
        cost = f"every process compiles {names} anew, for 10 s: {folder} is not yours to write to"
    else:
        cost = f"every process compiles {names} anew, for 10 s: PYTHONDONTWRITEBYTECODE is set"
    remedy = f"uv's --compile-bytecode does it once, and so does: python -m compileall -q {folder}"
    return [f"{cost}; {remedy}"]


def _is_compiled(source: str) -> bool:
    return not source.endswith(".py") or os.path.exists(cache_from_source(source))
