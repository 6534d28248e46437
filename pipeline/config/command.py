"""The command line of every job: read the arguments, run, and end with one clear line.

Exit codes: 0 all rows are accounted for, 1 the job failed, 2 it was asked for something impossible,
130 it was interrupted (Ctrl-C), 143 it was told to end (SIGTERM).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from pipeline.config import log
from pipeline.config.help import describe, with_help
from pipeline.errors import PipelineError, UsageError, one_line

# Set where a decoder has ended the process of a local job: see run.local.
ISOLATE = "CLIPSEG_RAY_ISOLATE"

_SAID_CHARACTERS = 4000
_ENDING = (signal.SIGINT, signal.SIGTERM)
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

Config = TypeVar("Config")

# Whatever a job has started and that ends with its command: Ray.
at_end = contextlib.ExitStack()


def run_command(
    config: type[Config],
    job: Callable[[Config], None],
    prog: str,
    argv: Sequence[str] | None,
    *,
    resumes: bool = False,
) -> int:
    """Build `config` from `argv` (default: the process's own), run `job`, return the exit code.

    `resumes`: an interrupted job goes on, and does not begin anew.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    told: list[int] = []
    try:
        with _ended_by_signals(told):
            asked = _parse(config, prog, arguments)
            workers = getattr(asked, "workers", None)
            log.set_log(
                as_json=getattr(workers, "log_format", "text") == "json",
                quiet=getattr(workers, "quiet", False),
            )
            if argv is None and getattr(workers, "local", False):
                _fork_until_it_survives(prog)
            job(asked)
    except UsageError as error:
        return _say(prog, error, 2)
    except PipelineError as error:
        return _say(prog, error, 1)
    except BrokenPipeError:  # who read our output, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        how = "without --restart" if "--restart" in arguments else "again"
        hint = f"; the same command {how} completes the run" if resumes else ""
        # From a spot machine that is taken back, Kubernetes, SLURM, timeout; or a terminal.
        ended, code = ("terminated", 143) if signal.SIGTERM in told else ("interrupted", 130)
        if argv is None:  # another signal does not wait for threads, and leaves no traceback
            for number in _ENDING:
                signal.signal(number, lambda *_: os._exit(code))
        return _say(prog, f"{ended}{hint}", code)
    finally:
        at_end.close()
    return 0


@contextlib.contextmanager
def _ended_by_signals(told: list[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM in this block, and add the signal to `told`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        if number == signal.SIGTERM:  # some send it again and again
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told.append(number)
        raise KeyboardInterrupt  # itself: C++ that calls back into Python knows no other

    before = [signal.getsignal(number) for number in _ENDING]
    signal.signal(signal.SIGTERM, end)
    if before[0] != signal.SIG_IGN:  # as in a script's background
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        for number, handler in zip(_ENDING, before, strict=True):
            signal.signal(number, handler)


def _fork_until_it_survives(prog: str) -> None:
    """Return in a child process, and leave this one when the child ends.

    If a decoder ends the child, another one takes the run up, with each image in a process of its
    own. Called before threads exist.
    """
    before = [signal.getsignal(number) for number in _ENDING]
    while True:
        # A signal in between would end this process and leave the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, (*_ENDING, signal.SIGCHLD))
        child = os.fork()
        if child == 0:
            for number, handler in zip(_ENDING, before, strict=True):
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_ENDING, signal.SIGCHLD))
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child gets it from the terminal, too
        code = _wait_for(child)
        if code >= 0:
            os._exit(code)
        name = signal.Signals(-code).name
        if -code not in _CRASHES or ISOLATE in os.environ:
            _say(prog, f"ended by {name}; the same command again goes on where it was", 128 - code)
            os._exit(128 - code)
        log.say("note", f"{prog}: ended by {name}; going on with each image apart")
        os.environ[ISOLATE] = "1"


def _wait_for(child: int) -> int:
    """Exit code of a child, negative for the signal that ended it; SIGTERM is passed on to it.

    Both signals are blocked, and waited for at once: a handler that runs just before waitpid would
    leave it waiting.
    """
    while True:
        if signal.sigwait((signal.SIGTERM, signal.SIGCHLD)) == signal.SIGTERM:
            os.kill(child, signal.SIGTERM)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


def _parse(config: type[Config], prog: str, arguments: list[str]) -> Config:
    """`config` from the command line; what tyro says of a mistake in a box becomes one line."""
    for argument in arguments:
        if any("\ud800" <= c <= "\udfff" for c in argument):  # bytes that are no UTF-8
            raise UsageError(f"an argument that is not UTF-8: {argument!a}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = _run_tyro(config, prog, arguments)
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
    message = re.sub(rf"^Error parsing (?:{config.__name__}|job): ", "", message)
    if message.startswith("Unrecognized options: "):
        rest = message.removeprefix("Unrecognized options: ")
        many = f"too many arguments: {rest} (put a phrase of several words in quotes)"
        message = _name_unknown(config, prog, arguments) or many
    raise UsageError(f"{message}; see {prog} --help")


def _run_tyro(config: type[Config], prog: str, arguments: list[str]) -> Config:
    with_help(config)
    return tyro.cli(config, prog=prog, args=arguments, description=describe(config, prog))


def _name_unknown(config: type[Any], prog: str, arguments: list[str]) -> str:
    """The mistake behind superfluous arguments; "" if not found."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _run_tyro(config, prog, [*itertools.takewhile(str.isalpha, arguments[:1]), "--help"])
    known = set(re.findall(r"--[a-z][\w-]*", text.getvalue()))
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            return f"no option {option}" + (f" (did you mean {near[0]}?)" if near else "")
    return ""


def _is_rule(line: str) -> bool:
    return len(line) > 3 and not line.strip("─-")


def _refuse_empty(arguments: list[str]) -> None:
    """Raise UsageError for an empty value: a job could not tell it from a missing one."""
    for before, argument in itertools.pairwise(["", *arguments]):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            option = argument or before
            name = option.rstrip("=") if option.startswith("--") else "an argument"
            raise UsageError(f"{name}: it is empty; give it a value, or leave it out")


def _say(prog: str, message: object, code: int) -> int:
    said = one_line(" ".join(str(message).split()), _SAID_CHARACTERS)
    log.say("error", f"{prog}: error: {said}", code=code)
    return code
