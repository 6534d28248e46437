"""The jobs, one a file; each is a command, and a function for code of one's own.

Before any of them is imported, their package must be the one beside them: a `pipeline.py` in the
current folder or on PYTHONPATH is refused in one line, and is not run.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_OURS = Path(__file__).parent.parent / "pipeline" / "__init__.py"


def _refuse_foreign_package() -> None:
    """End the process with exit code 2 if `import pipeline` would find somebody else's."""
    spec = find_spec("pipeline")
    found = spec.origin or next(iter(spec.submodule_search_locations or []), "") if spec else ""
    if not found or Path(found).resolve() != _OURS.resolve():
        print(
            f"clipseg-ray: error: the name 'pipeline' means {found or 'nothing'} here, not "
            f"{_OURS.parent}: start the command in another folder, or change PYTHONPATH",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _end_at_once(number: int, _: Any) -> None:
    """Leave on a signal in one line while modules are imported, for about a second."""
    how = "interrupted" if number == signal.SIGINT else "terminated"
    os.write(2, f"clipseg-ray: error: {how}\n".encode())
    os._exit(128 + number)


# Not where tests or other programs import a job. config.command takes the signals over.
if os.path.basename(sys.argv[0]) in ("-m", "clipseg-ray"):
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _end_at_once)

_refuse_foreign_package()
