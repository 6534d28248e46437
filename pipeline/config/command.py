"""The command line of every job: read the arguments, run, and end with one clear line.

Exit codes: 0 all rows are accounted for, 1 the job failed, 2 it was asked for something that
cannot be done, 130 it was interrupted.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
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
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        job(_parse(config, prog, arguments))
    except UsageError as error:
        return _say(prog, error, 2)
    except PipelineError as error:
        return _say(prog, error, 1)
    except BrokenPipeError:  # who read our output, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        how = "without --restart" if "--restart" in arguments else "again"
        hint = f"; the same command {how} completes the run" if resumes else ""
        return _say(prog, f"interrupted{hint}", 130)
    return 0


def _parse(config: type[Config], prog: str, arguments: list[str]) -> Config:
    """`config` from the command line; what tyro says of a mistake in a box becomes one line."""
    for argument in arguments:
        if any("\ud800" <= c <= "\udfff" for c in argument):  # bytes that are no UTF-8
            raise UsageError(f"an argument that is not UTF-8: {argument!a}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(config, prog=prog, args=arguments, description=config.__doc__)
        _refuse_empty(arguments)
        return found
    except SystemExit as end:
        if not end.code:
            raise
    # The first paragraph of the box, without its frame and without help texts (8 blanks deep). A
    # terminal without UTF-8 has no frame: there the last character of a full line is the message's.
    lines = [line[2:].rstrip(" │╯") for line in said.getvalue().splitlines()[1:]]
    while lines and _is_rule(lines[0]):  # of a terminal without UTF-8, below the title
        del lines[0]
    first = itertools.takewhile(lambda line: line and not _is_rule(line), lines)
    message = " ".join(line.strip() for line in first if not line.startswith(" " * 8))
    message = message.removeprefix(f"Error parsing {config.__name__}: ")
    raise UsageError(f"{message}; see {prog} --help")


def _is_rule(line: str) -> bool:
    return len(line) > 3 and not line.strip("─-")


def _refuse_empty(arguments: list[str]) -> None:
    """Raise UsageError for an empty value, of which a job could only think that it is not given."""
    for before, argument in itertools.pairwise(["", *arguments]):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            option = argument or before
            name = option.rstrip("=") if option.startswith("--") else "an argument"
            raise UsageError(f"{name}: it is empty; give it a value, or leave it out")


def _say(prog: str, message: object, code: int) -> int:
    said = one_line(" ".join(str(message).split()), _SAID_CHARACTERS)
    print(f"{prog}: error: {said}", file=sys.stderr)
    return code
