"""A line where Python has not compiled the large packages."""

from __future__ import annotations

import py_compile
from importlib.machinery import ModuleSpec
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from pipeline.run.bytecode import describe_uncompiled


def test_packages_without_bytecode_are_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> ModuleSpec | None:
        file = tmp_path / name / "__init__.py"
        return ModuleSpec(name, None, origin=str(file)) if file.exists() else None

    def said(*, writes: bool = True) -> list[str]:
        return describe_uncompiled(("torch", "ray", "gone"), find=find, writes=writes)

    for name in ("torch", "ray"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (line,) = said()
    assert line.startswith("torch and ray are compiled to bytecode by this first start, ")
    assert line.endswith(f"and so does: python -m compileall -q {tmp_path}")
    (line,) = said(writes=False)
    assert line.startswith("every process compiles torch and ray anew, for 10 s: PYTHONDONT")
    py_compile.compile(str(tmp_path / "torch" / "__init__.py"))
    (line,) = said(writes=False)
    assert line.startswith("every process compiles ray anew")
    py_compile.compile(str(tmp_path / "ray" / "__init__.py"))
    assert said() == said(writes=False) == []
    # Bytecode may lie elsewhere.
    monkeypatch.setattr("sys.pycache_prefix", str(tmp_path / "cache"))
    (line,) = said()
    for name in ("torch", "ray"):
        source = str(tmp_path / name / "__init__.py")
        py_compile.compile(source)
        assert Path(cache_from_source(source)).is_relative_to(tmp_path / "cache")
    assert said() == []


def test_a_folder_that_is_not_ones_own_is_told() -> None:
    """/proc lets nobody make files, root included."""

    def find(name: str) -> ModuleSpec:
        return ModuleSpec(name, None, origin="/proc/self/torch/__init__.py")

    (line,) = describe_uncompiled(("torch",), find=find, writes=True)
    assert ": /proc/self is not yours to write to; " in line
