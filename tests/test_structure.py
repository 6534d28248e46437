"""What the documents promise of the code's shape, and cluster.yaml as Ray's own check sees it."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
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


def test_ray_is_imported_in_the_jobs_and_in_one_room() -> None:
    users = {
        path.relative_to(ROOT)
        for path in CODE
        if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert {path.parts[1] for path in users if path.parts[0] == "pipeline"} == {"run"}


def test_models_need_torch_alone() -> None:
    known = {"torch", "numpy", "safetensors", "tokenizers", "pipeline"}
    for path in ROOT.glob("pipeline/model/*.py"):
        foreign = (
            {name.split(".")[0] for name in imports(path)} - known - set(sys.stdlib_module_names)
        )
        assert not foreign, f"{path.name} imports {foreign}"


def test_transformers_is_never_imported() -> None:
    assert not [p for p in CODE if any(n.split(".")[0] == "transformers" for n in imports(p))]


def test_a_room_imports_only_from_rooms_above_it() -> None:
    assert pipeline.__doc__
    order = re.findall(r"^ {4}(\w+)/? {2,}", pipeline.__doc__, re.MULTILINE)
    entries = {path.stem for path in ROOT.glob("pipeline/*") if path.name[0] not in "_."}
    assert set(order) == entries
    assert len(entries) <= 13  # twelve, and the bundled demo
    for path in ROOT.glob("pipeline/**/*.py"):
        room = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        used = {n.split(".")[1] for n in imports(path) if n.startswith("pipeline.")} & set(order)
        below = {name for name in used if order.index(name) > order.index(room)}
        assert not below, f"{path} imports {below}"


def test_modules_import_each_other_in_no_circle() -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.glob("pipeline/**/*.py")
    }
    used = {
        name: (imports(path) & files.keys()) - {name, "pipeline"} for name, path in files.items()
    }
    # A room's front door names its modules, which may name the room to reach one another.
    used = {name: {u for u in some if not name.startswith(f"{u}.")} for name, some in used.items()}
    graphlib.TopologicalSorter(used).prepare()  # raises CycleError


def test_jobs_never_import_jobs() -> None:
    for path in ROOT.glob("jobs/*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "jobs"], path


def test_cluster_yaml_passes_rays_own_check() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
