"""Write a page about a run, finished or not: counts, classes, pictures, errors, speed.

    python -m jobs.report RUN

where RUN is the OUTPUT of segment, label, embed or classify, which write RUN/report/index.html when
they end. `clipseg-ray report` is the same. The page is one self-contained file; without Ray.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from pipeline import storage
from pipeline.annotations.report_gather import write_report
from pipeline.config.command import run_command
from pipeline.config.report import ReportConfig
from pipeline.run.progress import phase
from pipeline.run.status import open_output
from pipeline.write.layout import REPORT_PAGE


def report(config: ReportConfig) -> None:
    """Read a sample of the tables, and a few images -> HTML."""
    output, record = open_output(config.run)
    page = storage.check_uri(config.output or storage.join(output, REPORT_PAGE))
    with phase("reading tables and images"):
        found = write_report(output, record, page, moved_to=config.input_moved_to)
    print(f"look: {page}")
    missing = Counter(
        why
        for why in (*found.pictures.values(), *found.thumbnails.values())
        if isinstance(why, str)
    )
    for why, count in missing.most_common():
        hint = "" if config.input_moved_to else "; moved? --input-moved-to says where it is now"
        print(f"  {count:,} have no picture: {why}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ReportConfig, report, "clipseg-ray report", argv)


if __name__ == "__main__":
    sys.exit(main())
