"""Try everything on bundled images with the bundled model, without a download.

    python -m jobs.demo DIR

`clipseg-ray demo` is the same. It writes the bundled shards into DIR, then prints and runs each
command, in this process.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence

from pipeline import storage
from pipeline.config.command import run_command
from pipeline.config.demo import DemoConfig
from pipeline.demo import FILES
from pipeline.errors import UsageError


def demo(config: DemoConfig) -> None:
    """Write the bundled files -> segment -> label -> export -> view -> print where all of it is."""
    folder = storage.check_uri(config.folder)
    for name, file in FILES.items():
        write_once(storage.join(folder, name), file.read_bytes())
    for name, *arguments in config.commands():
        print(f"\n$ clipseg-ray {shlex.join([name, *arguments])}", flush=True)
        code = importlib.import_module(f"jobs.{name}").main(arguments)
        if code:
            sys.exit(code)
    print(where_it_is(folder))


def where_it_is(folder: str) -> str:
    """Lines for the user of a finished demo: what to look at, and commands to try next."""
    at = {name: storage.join(folder, name) for name in ("contact-sheet.png", "view.html", "coco")}
    shards, vectors = (shlex.quote(storage.join(folder, name)) for name in ("shards", "vectors"))
    return f"""
picture: {at["contact-sheet.png"]}
page, for a browser: {at["view.html"]}
tables: {storage.join(folder, "run", "masks")}/*.parquet, and images and errors beside them
labels: {storage.join(folder, "labels", "annotations")}/*.parquet
COCO: {storage.join(at["coco"], "annotations")} and {storage.join(at["coco"], "images")}
next, without a download:
  clipseg-ray embed {shards} {vectors} --model demo --local
  clipseg-ray search {vectors} --text "a red star" --top 5 --gallery found.html
your own images, with a model from the hub:
  clipseg-ray segment YOUR_IMAGES masks --prompt "a cat" --contact-sheet masks.png"""


def write_once(uri: str, data: bytes) -> None:
    """Write a missing file, and leave an existing one as it is: a run knows its version.

    Raises UsageError for a file of other content.
    """
    if not storage.exists(uri):
        storage.write_bytes(uri, data)
    elif storage.read_bytes(uri, limit_bytes=len(data) + 1) != data:
        raise UsageError(f"{uri}: is there with other content; choose another folder")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(DemoConfig, demo, "clipseg-ray demo", argv, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
