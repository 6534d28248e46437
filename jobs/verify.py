"""Compare the parts of a run with the hashes in their receipts.

    python -m jobs.verify OUTPUT
    python -m jobs.verify OUTPUT --sample 0.01

`clipseg-ray verify` is the same. The exit code is 1 if a part differs; the command of the run then
makes its shard again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from pipeline.config.command import run_command
from pipeline.config.status import VerifyConfig
from pipeline.errors import JobError
from pipeline.run.status import open_output
from pipeline.run.verify import describe, verify_run


def verify(config: VerifyConfig) -> None:
    """List the receipts -> read and hash the parts -> print the account."""
    output, record = open_output(config.output)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("verifying", total=None)
        found = verify_run(output, share=config.sample, on_shard=lambda: progress.advance(bar))
    print(describe(output, found, record))
    if found.differences:
        count = f"{len(found.differences):,} differences"
        raise JobError(f"{count}; the command of the run makes those shards again")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(VerifyConfig, verify, "clipseg-ray verify", argv)


if __name__ == "__main__":
    sys.exit(main())
