"""The installed command, under a name that nobody else has: `jobs` may be a folder of the user's.

Before anything of that name is run, it must be the package beside this file.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_OURS = Path(__file__).parent / "jobs" / "__init__.py"


def run() -> None:
    """Run `clipseg-ray COMMAND ...`, or end with exit code 2 if `jobs` is somebody else's."""
    spec = find_spec("jobs")
    found = spec.origin or next(iter(spec.submodule_search_locations or []), "") if spec else ""
    if not found or Path(found).resolve() != _OURS.resolve():
        print(
            f"clipseg-ray: error: the name 'jobs' means {found or 'nothing'} here, not "
            f"{_OURS.parent}: change PYTHONPATH",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from jobs.__main__ import run

    run()
