"""The wheel in an environment of its own, and in folders whose files have the names of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.run.package import worker_path

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "pipeline" / "demo"
RAISES = "raise RuntimeError('the file of a user was run')\n"
EXITS = "import sys\nsys.exit('the file of a user was run')\n"


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command as a user has it: nothing of the checkout on its path, no Ray to join."""
    kept = {n: v for n, v in os.environ.items() if n != "PYTHONPATH" and n[:4] != "RAY_"}
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that git knows, or would; made in a copy of them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    made = run(*pip, "--no-index", "--wheel-dir", folder, copy, cwd=folder)
    assert made.returncode == 0, made.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin of an environment with the wheel, and with what else is installed here."""
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    done = run(*pip, "--no-index", wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    (packages,) = home.glob("lib/python*/site-packages")
    # A path from a .pth is searched, but its own .pth files, an editable install's, are not read.
    (packages / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = "import jobs, pipeline; print(jobs.__file__, pipeline.__file__)"
    found = run(python, "-c", where, cwd=home).stdout.split()
    assert found == [str(packages / name / "__init__.py") for name in ("jobs", "pipeline")]
    return home / "bin"


def rows(folder: Path) -> int:
    return sum(pq.read_table(path).num_rows for path in folder.glob("*.parquet"))


def test_the_wheel_holds_every_package_and_the_demo(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    code = {p.relative_to(ROOT).as_posix() for d in ("pipeline", "jobs") for p in code_of(ROOT / d)}
    data = {p.relative_to(ROOT).as_posix() for p in DEMO.glob("*/*") if p.suffix != ".pyc"}
    data = {name for name in data if "__pycache__" not in name}
    assert len(data) >= 8
    assert code | data <= packed
    others = {name.split("/")[0] for name in packed} - {"pipeline", "jobs", "clipseg_ray.py"}
    assert all(name.endswith(".dist-info") for name in others)


def code_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]


def test_the_command_segments_beside_files_of_the_same_names(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "pipeline.py").write_text(EXITS)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text(RAISES)
    shutil.copytree(DEMO / "shards", tmp_path / "shards")
    options = ["--model", DEMO / "model", "--prompt", "blue", "--quiet"]
    done = run(installed / "clipseg-ray", "segment", "shards", "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out" / "masks") == 72


def test_the_demo_runs_in_any_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "clipseg-ray", "demo", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "here" / "run" / "masks") == 3 * 72
    assert len(list((tmp_path / "here" / "coco" / "images" / "train").iterdir())) == 72


_FIVE_LINES = """
import ray
from pipeline import segment
images = ray.data.read_parquet(SHARD)
masks = segment(images, prompts=["blue"], model=MODEL)
masks.write_parquet("masks")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script of a user, in a folder of its own."""
    values = {"SHARD": DEMO / "shards" / "scenes-000001.parquet", "MODEL": DEMO / "model"}
    text = _FIVE_LINES
    for name, value in values.items():
        text = text.replace(name, repr(str(value)))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "mine.py").write_text(text)
    return tmp_path / "scripts" / "mine.py"


@pytest.mark.soak  # of the parts, the stages are in test_entry, the imports in the test below
def test_a_script_of_a_user_segments_in_any_folder(
    installed: Path, script: Path, tmp_path: Path
) -> None:
    done = run(installed / "python", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "masks") == 32


def test_a_package_of_the_same_name_on_the_workers_is_told(
    installed: Path, script: Path, tmp_path: Path
) -> None:
    """The user's own ray.init has put the current folder on the workers' path."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text(RAISES)
    done = run(installed / "python", script, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"Ray's workers import {tmp_path}/pipeline/__init__.py as 'pipeline', not" in last
    assert "the file of a user was run" not in done.stderr


@pytest.mark.parametrize(
    "name", [f"{n}{f}" for n in ("pipeline", "jobs") for f in (".py", "/__init__.py", "/other.py")]
)
def test_a_command_whose_package_is_not_ours_ends_in_one_line(
    name: str, installed: Path, tmp_path: Path
) -> None:
    """Of `python -m jobs` Python itself takes what is in the current folder."""
    foreign = tmp_path / "foreign"
    (foreign / name).parent.mkdir(parents=True)
    (foreign / name).write_text(EXITS)
    commands = [([installed / "clipseg-ray", "--version"], tmp_path)]
    if name.startswith("pipeline"):
        commands.append(([installed / "python", "-m", "jobs.segment", "--help"], foreign))
    for command, cwd in commands:
        done = run(*command, cwd=cwd, PYTHONPATH=str(foreign))
        if name.endswith("other.py"):  # no package: Python goes on and finds ours
            assert done.returncode == 0, done.stderr
            continue
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"clipseg-ray: error: the name '{name[:4]}")
        assert str(foreign) in done.stderr
        assert done.stderr.count("\n") == 1


def test_workers_look_into_the_folder_of_the_package_alone(tmp_path: Path) -> None:
    assert worker_path(ROOT / "pipeline") == [str(ROOT)]
    assert worker_path(tmp_path / "lib" / "site-packages" / "pipeline") == []
