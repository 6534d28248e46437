"""Print the progress of a run: shards and rows done, failed and left.

    python -m jobs.status OUTPUT

`clipseg-ray status` is the same. Reads OUTPUT alone, while the job runs or afterwards, without Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.config.command import run_command
from pipeline.config.status import StatusConfig
from pipeline.run.status import describe, describe_errors, open_output


def status(config: StatusConfig) -> None:
    """Open the output -> print its account, and the errors if wanted."""
    output, record = open_output(config.output)
    print(describe(output, record))
    if config.errors:
        print("\n".join(describe_errors(output)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(StatusConfig, status, "clipseg-ray status", argv)


if __name__ == "__main__":
    sys.exit(main())
