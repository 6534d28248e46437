"""Write a page with images of a run and their masks, for a browser.

    python -m jobs.view RUN --prompt "a cat" --sort uncertain --output view.html

where RUN is the OUTPUT of `clipseg-ray segment`. `clipseg-ray view` is the same. The page is one
self-contained file; without Ray.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from pipeline import storage
from pipeline.annotations.view import draw_page, view_run
from pipeline.config.command import run_command
from pipeline.config.view import ViewConfig
from pipeline.errors import one_line
from pipeline.run.progress import phase


def view(config: ViewConfig) -> None:
    """Choose images from the tables -> draw their masks over them -> HTML."""
    with phase("choosing and reading images"):
        found = view_run(config)
    page = draw_page(found, named=config.prompt is not None)
    storage.write_bytes(storage.check_uri(config.output), page.encode())
    print(f"{len(found.images):,} images -> {config.output}")
    for note in found.notes:
        print(f"  {one_line(note, 500)}")
    missing = Counter(why for why in found.pictures.values() if isinstance(why, str))
    for why, count in missing.most_common():
        hint = "" if config.input_moved_to else "; moved? --input-moved-to says where it is now"
        print(f"  {count:,} have no picture: {why}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ViewConfig, view, "clipseg-ray view", argv)


if __name__ == "__main__":
    sys.exit(main())
