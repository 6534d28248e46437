"""The command line: what is mistyped ends in one clear line and exit code 2."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import segment
from jobs.__main__ import COMMANDS
from pipeline.config.command import run_command
from pipeline.config.help import EXAMPLES, PAGES
from pipeline.config.segment import SegmentConfig
from pipeline.errors import JobError


def run(*argv: str) -> tuple[int, SegmentConfig | None]:
    """The exit code, and the config if the job was reached."""
    reached: list[SegmentConfig] = []

    def job(config: SegmentConfig) -> None:
        config.resolve()
        reached.append(config)

    code = run_command(SegmentConfig, job, "clipseg-ray segment", argv)
    return code, reached[0] if reached else None


def test_arguments_become_the_config() -> None:
    code, config = run("in", "out", "--prompt", "a cat", "--prompt", "a dog", "--threshold", "0.25")
    assert code == 0
    assert config is not None
    assert (config.input, config.output, config.threshold) == ("in", "out", 0.25)
    assert list(config.resolve().prompt) == ["a cat", "a dog"]


def test_prompts_of_the_file_follow_those_of_the_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("ein Hund\n\n  ネコ  \n", encoding="utf-8-sig")  # as Windows' editor does
    config = run("in", "out", "--prompt", "a cat", "--prompts", str(file))[1]
    assert config is not None
    assert list(config.resolve().prompt) == ["a cat", "ein Hund", "ネコ"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "Missing from clipseg-ray segment: INPUT OUTPUT"),
        (["in"], "OUTPUT"),
        (["in", "out"], 'give at least one --prompt "..."'),
        (["in", "out", "--prompt", " "], "empty prompt"),
        (["in", "out", "--prompt", "x", "--prompt", "x"], "the prompt 'x' is given twice"),
        (["in", "out", "--promt", "y"], "no option --promt (did you mean --prompt?); see "),
        (["in", "out", "--prompt", "x", "--treshold=1"], "(did you mean --threshold?)"),
        (
            ["in", "out", "--prompt", "x", "--zzz"],
            "no option --zzz; see clipseg-ray segment --help",
        ),
        (["in", "out", "--prompt", "a", "cat"], "too many arguments: cat (put a phrase of several"),
        (
            ["in", "out", "--prompts", "a cat"],
            "to segment these words themselves: --prompt 'a cat'",
        ),
        (["in", "out", "--prompt", "x", "--contact-sheet", "a.bmp"], "end its name in .png, .jpg"),
        (["in", "out", "--prompt", "x", "--threshold", "1.01"], "between 0 and 1"),
        (["in", "out", "--prompt", "x", "--threshold", "nan"], "between 0 and 1"),
        (["in", "out", "--prompt", "x", "--threshold", "half"], "half"),
        (["in", "out", "--prompt", "x", "--mask-size", "huge"], "'image', 'model'"),
        (["in", "out", "--prompt", "x", "--actors", "0"], "--actors 0: must be at least 1"),
        (
            ["in", "out", "--prompts", "no/such/file"],
            "no/such/file: No such file or directory; --prompts names a text file with one of the "
            "prompts a line",
        ),
        (["in", "out", "--prompt", "caf\udce9"], r"not UTF-8: 'caf\udce9'"),
        (["in\udce9", "out", "--prompt", "x"], r"not UTF-8: 'in\udce9'"),
        (["in", "out", "--prompt", "x", "--contact-sheet", ""], "--contact-sheet: it is empty"),
        (["in", "out", "--prompt", "x", "--image-column="], "--image-column: it is empty"),
        (["", "out", "--prompt", "x"], "an argument: it is empty"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == (2, None)
    said = capsys.readouterr().err
    assert said.startswith("clipseg-ray segment: error: ")
    assert says in said
    assert said.count("\n") == 1


def test_mistakes_are_told_as_well_where_the_terminal_has_no_utf8() -> None:
    command = [sys.executable, "-m", "jobs", "segment", "in", "out", "--bogus"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    says = "no option --bogus; see clipseg-ray segment --help"
    assert done.stderr == f"clipseg-ray segment: error: {says}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_works_and_names_a_page(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = importlib.import_module(f"jobs.{command.replace('-', '_')}")
    with pytest.raises(SystemExit) as ended:
        job.main(["--help"])
    assert not ended.value.code
    said = capsys.readouterr().out
    example = f"clipseg-ray {command} {EXAMPLES[command]}"
    assert f"Example: {example}" in " ".join(said.split())
    for page in PAGES[command].split(", "):
        assert page in said
        assert (Path(__file__).parent.parent / page).is_file()
    assert "(default: None)" not in said and "(default: False)" not in said
    # It is understood: what is named is missing, and nothing else is wrong.
    (config,) = {
        value
        for name, value in vars(job).items()
        if name.endswith("Config") and f"run_command({name}," in inspect.getsource(job)
    }
    reached: list[object] = []
    assert run_command(config, reached.append, "x", shlex.split(EXAMPLES[command])) == 0
    assert len(reached) == 1


def test_help_breaks_lines_only_where_they_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Each text fills its lines: the first word of a line had no room on the one before."""
    with pytest.raises(SystemExit):
        segment.main(["--help"])
    said = capsys.readouterr().out
    box = [line[2:-2] for line in said.splitlines() if line.startswith("│ ")]
    for line, following in itertools.pairwise(box):
        if following.startswith(" " * 8) and line.startswith(" " * 8):
            assert len(line.rstrip()) + 1 + len(following.split()[0]) > 76, line


def test_prompt_files_without_prompts_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, says in (("blank", "no prompts in it"), ("bytes", "not a UTF-8 text file")):
        assert run("in", "out", "--prompts", str(tmp_path / name))[0] == 2
        assert says in capsys.readouterr().err


def test_a_failed_job_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: SegmentConfig) -> None:
        raise JobError("3 shards\nwere not finished")

    assert run_command(SegmentConfig, job, "job", ["in", "out", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == "job: error: 3 shards were not finished\n"


def test_names_in_an_error_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    def job(config: SegmentConfig) -> None:
        raise JobError(
            f"not finished: \x1b]0;owned\x07\x1b[2J\u202e\x9b1m.tar, é猫\udcff{'x' * 9999}"
        )

    assert run_command(SegmentConfig, job, "job", ["in", "out", "--prompt", "x"]) == 1
    said = capsys.readouterr().err
    assert said[:-1].isprintable()
    assert said.startswith(
        "job: error: not finished: \ufffd]0;owned\ufffd\ufffd[2J\ufffd\ufffd1m.tar, é猫"
    )
    assert said.endswith("xxx...\n") and len(said) < 5000


def test_a_reader_that_has_enough_sees_no_traceback() -> None:
    command = f"{sys.executable} -m jobs segment --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: clipseg-ray segment")
    assert done.stderr == ""


def test_the_entry_point_names_its_commands() -> None:
    def clipseg_ray(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs", *argv]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "segment" in clipseg_ray("--help").stdout
    assert clipseg_ray("--version").stdout.startswith("clipseg-ray ")
    wrong = clipseg_ray("segmnt")
    assert wrong.returncode == 2
    assert wrong.stderr == "clipseg-ray: error: no command 'segmnt'; did you mean segment?\n"
    assert f"; known: {', '.join(COMMANDS)}\n" in clipseg_ray("xyz").stderr


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ([], "the same command again completes the run"),
        (["--restart"], "the same command without --restart completes the run"),
    ],
)
def test_who_interrupts_a_job_is_told_how_to_go_on(
    options: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(_: SegmentConfig) -> None:
        raise KeyboardInterrupt

    argv = ["in", "out", "--prompt", "x", *options]
    assert run_command(SegmentConfig, job, "clipseg-ray segment", argv, resumes=True) == 130
    assert hint in capsys.readouterr().err
