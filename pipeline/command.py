"""The command line of every job: read the arguments, run, and end with one clear line.

Exit codes: 0 all rows are accounted for, 1 the job failed, 2 it was asked for something that
cannot be done, 130 it was interrupted.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from pipeline.errors import PipelineError, UsageError, one_line

_SAID_CHARACTERS = 4000

Config = TypeVar("Config")


def run_command(
    config: type[Config],
    job: Callable[[Config], None],
    prog: str,
    argv: Sequence[str] | None,
    *,
    resumes: bool = False,
) -> int:
    """Build `config` from `argv` (default: the process's own), run `job`, return the exit code.

    `resumes` says that a job which was interrupted is continued where it was, not begun anew.
    """
    try:
        job(_parse(config, prog, argv))
    except UsageError as error:
        return _say(prog, error, 2)
    except PipelineError as error:
        return _say(prog, error, 1)
    except BrokenPipeError:  # who read our output, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        hint = "; the same command again completes the run" if resumes else ""
        return _say(prog, f"interrupted{hint}", 130)
    return 0


def _parse(config: type[Config], prog: str, argv: Sequence[str] | None) -> Config:
    """`config` from the command line; what tyro says of a mistake in a box becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, prog=prog, args=argv, description=config.__doc__)
    except SystemExit as end:
        if not end.code:
            raise
    # The first paragraph of the box, without its frame and without help texts (8 blanks deep).
    lines = [line[2:-1].rstrip() for line in said.getvalue().splitlines()[1:]]
    first = itertools.takewhile(lambda line: line and not line.startswith("───"), lines)
    message = " ".join(line.strip() for line in first if not line.startswith(" " * 8))
    message = message.removeprefix(f"Error parsing {config.__name__}: ")
    raise UsageError(f"{message}; see {prog} --help")


def _say(prog: str, message: object, code: int) -> int:
    said = one_line(" ".join(str(message).split()), _SAID_CHARACTERS)
    print(f"{prog}: error: {said}", file=sys.stderr)
    return code
