"""This package as Ray's workers find it: from its own folder, whatever else has its name.

`pipeline` is a common name. A file of this name in a command's current folder must reach no worker:
importing it could end the worker, and every one after it.
"""

from __future__ import annotations

from pathlib import Path

import ray

import pipeline
from pipeline.errors import JobError, UsageError

_FILE = Path(pipeline.__file__)


def worker_path(package: Path = _FILE.parent) -> list[str]:
    """The folders for workers to find `package` in: none if Python's own do.

    Always searched are PYTHONPATH and the folders of installed packages.
    """
    folder = package.resolve().parent
    return [] if folder.name in ("site-packages", "dist-packages") else [str(folder)]


def check_workers() -> None:
    """Raise UsageError if a worker would import another package, or version, under this name.

    Raises JobError if no worker answers.
    """

    def find(name: str) -> tuple[str, bytes]:
        """The file of a package and its text; neither is run."""
        from importlib.util import find_spec
        from pathlib import Path

        spec = find_spec(name)
        file = spec.origin if spec else None
        return file or "", Path(file).read_bytes() if file else b""

    # A function inside another is pickled as it is: the worker imports nothing of ours for it.
    asked = ray.remote(num_cpus=0)(find).remote(pipeline.__name__)
    try:
        file, text = ray.get(asked)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()[-1:]
        raise JobError(f"Ray's workers cannot be asked for their packages: {said}") from error
    if text != _FILE.read_bytes():
        found = f"import {file} as" if file else "have no package named"
        raise UsageError(
            f"Ray's workers {found} {pipeline.__name__!r}, not clipseg-ray {pipeline.__version__}: "
            "install it on every node, and start where no file or folder has that name"
        )
