"""What the documents promise of the code's shape, and cluster.yaml as Ray's own check sees it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

import pipeline

ROOT = Path(__file__).parent.parent
CODE = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/*.py")]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_ray_is_imported_in_the_jobs_and_in_one_module() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in CODE
        if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert {name for name in users if not name.startswith("jobs/")} == {"pipeline/run.py"}


def test_transformers_is_never_imported() -> None:
    assert not [p for p in CODE if any(n.split(".")[0] == "transformers" for n in imports(p))]


def test_a_module_imports_only_from_those_above_it_in_the_list() -> None:
    assert pipeline.__doc__
    order = re.findall(r"^ {4}((?:\w+/?(?:, )?)+)(?:  |$)", pipeline.__doc__, re.MULTILINE)
    names = [name.strip("/") for line in order for name in line.split(", ")]
    modules = {path.stem for path in ROOT.glob("pipeline/*.py")} - {"__init__"}
    assert set(names) == modules | {"model", "demo"}
    for path in ROOT.glob("pipeline/*.py"):
        if path.stem == "__init__":
            continue
        used = {n.split(".")[1] for n in imports(path) if n.startswith("pipeline.")} & set(names)
        below = {name for name in used if names.index(name) >= names.index(path.stem)}
        assert not below, f"{path.stem} imports {below}"


def test_jobs_never_import_jobs() -> None:
    for path in ROOT.glob("jobs/*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "jobs"], path


def test_cluster_yaml_passes_rays_own_check() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
