"""README's install lines in fresh environments: seconds, bytes on disk, and whether the demo runs.

    python -m benchmarks.install [--pythons python3.10 python3.13] [--lines 1 5]

A row for each installer (pip, uv), Python and line: README's own, and the lowest versions that
pyproject.toml allows. The proof is `clipseg-ray demo` in an empty folder, and `segment` on Ray over
its shards. Environments are removed when they are measured. uv is taken from PATH, or --uv. Where
download.pytorch.org cannot be reached, --cpu-torch names a CPU build that pip's and uv's own
configuration finds elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")
LOWEST = "uv pip install --compile-bytecode --resolution lowest-direct ."
_CPU_PIP = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
_CPU_UV = "--torch-backend cpu"
_TIMEOUT_S = 3600


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An environment after a line of installation, and a demo in it."""

    result: str
    """"ok", or the step that failed and its last line."""
    install_s: float = 0.0
    size_bytes: int = 0
    demo_s: float = 0.0
    ray_s: float = 0.0
    """Of `segment` on Ray."""
    versions: str = ""
    """Of torch and Ray."""


def readme_lines() -> list[str]:
    """The lines of README's section on installing, in its order."""
    section = (ROOT / "README.md").read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    return re.findall(r"^((?:uv )?pip install .*)$", section, re.MULTILINE)


def main() -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS))
    parser.add_argument("--lines", nargs="+", type=int, help="numbers of lines; by default all")
    parser.add_argument("--uv", default=shutil.which("uv") or "")
    parser.add_argument("--cpu-torch", default="", help="such as torch==2.13.0+cpu")
    parser.add_argument("--work", default=None, help="folder for the environments, removed again")
    arguments = parser.parse_args()
    print("| line | Python | result | seconds | GB on disk | demo, s | on Ray, s | torch, Ray |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for number, line in enumerate([*readme_lines(), LOWEST], 1):
        if arguments.lines and number not in arguments.lines:
            continue
        for python in arguments.pythons:
            with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                found = try_line(line, python, Path(folder), arguments.uv, arguments.cpu_torch)
            print(
                f"| `{line}` | {version_of(python)} | {found.result} "
                f"| {found.install_s:.0f} | {found.size_bytes / 1e9:.2f} | {found.demo_s:.1f} "
                f"| {found.ray_s:.1f} | {found.versions} |",
                flush=True,
            )


def version_of(python: str) -> str:
    """Version of an interpreter, or its name where there is none."""
    if shutil.which(python) is None:
        return python
    asked = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def try_line(line: str, python: str, folder: Path, uv: str, cpu_torch: str) -> Installed:
    """Install by a line of README in an environment of its own in `folder`, and run the demo."""
    if shutil.which(python) is None:
        return Installed(result="not tried: no such Python here")
    if line.startswith("uv ") and not uv:
        return Installed(result="not tried: no uv here")
    home, checkout = folder / "env", folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    made = [uv, "venv", "--python", python] if line.startswith("uv ") else [python, "-m", "venv"]
    run([*made, str(home)], folder)
    started = time.perf_counter()
    for part in elsewhere(line, cpu_torch).split(" && "):
        said = run(command(part, home, uv), checkout)
        if said is not None:
            return Installed(result=f"failed: {said}")
    seconds = time.perf_counter() - started
    size = size_of(home)
    ours = str(home / "bin" / "clipseg-ray")
    on_ray = ["segment", "demo-output/shards", "on-ray", "--model", "demo", "--prompt", "star"]
    failed, spent = "", []
    for words in (["demo", "demo-output"], on_ray):
        started = time.perf_counter()
        said = run([ours, *words], folder)
        spent.append(time.perf_counter() - started)
        failed = failed or (f"{words[0]} failed: {said}" if said else "")
    asked = "import importlib.metadata as m; print(m.version('torch'), m.version('ray'))"
    told = subprocess.run([home / "bin" / "python", "-c", asked], capture_output=True, text=True)
    return Installed(
        result=failed or "ok",
        install_s=seconds,
        size_bytes=size,
        demo_s=spent[0],
        ray_s=spent[1],
        versions=told.stdout.strip(),
    )


def elsewhere(line: str, cpu_torch: str) -> str:
    """The line, with another CPU build of torch than that of PyTorch's own index, if wanted."""
    if not cpu_torch:
        return line
    line = line.replace(_CPU_PIP, f"pip install {cpu_torch}")
    return line.replace(f" {_CPU_UV}", f" {cpu_torch}")


def command(part: str, home: Path, uv: str) -> list[str]:
    """The command of a line, in the environment at `home`."""
    words = part.split()
    if words[0] == "uv":
        return [uv, *words[1:3], "--python", str(home / "bin" / "python"), *words[3:]]
    return [str(home / "bin" / "python"), "-m", *words]


def run(line: list[str], folder: Path) -> str | None:
    """None for a command that succeeded, else the last line that it wrote."""
    ours = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        line, cwd=folder, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if not done.returncode:
        return None
    said = (done.stderr or done.stdout).strip().splitlines()
    return " ".join(said[-1].split())[:200] if said else f"exit code {done.returncode}"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, each once whatever the number of its names."""
    seen = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            stat = path.stat()
            seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


if __name__ == "__main__":
    main()
