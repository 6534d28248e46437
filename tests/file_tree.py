"""Write the files of the project into docs/architecture.md, each with the first line of its docstring.

python -m tests.file_tree
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
WIDTH = 24


def first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring in one line, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def file_tree() -> str:
    """The rooms in the order of pipeline/__init__.py, the jobs, the benchmarks."""
    import pipeline

    entries = [line.split()[0] for line in (pipeline.__doc__ or "").splitlines() if line[:4] == "    "]
    files = [f"{name}.py" for name in entries if not name.endswith("/")]
    lines = ["pipeline/", *(_line(ROOT / "pipeline" / name) for name in files)]
    rooms = [ROOT / "pipeline" / name for name in entries if name.endswith("/")]
    for room in [*rooms, ROOT / "jobs", ROOT / "benchmarks"]:
        name = room.relative_to(ROOT).as_posix()
        lines.append(f"{name + '/':{WIDTH}} {first_sentence(room / '__init__.py')}")
        lines += [_line(path) for path in sorted(room.glob("*.py")) if path.name[0] != "_"]
    return "\n".join(lines)


def _line(path: Path) -> str:
    return f"  {path.name:{WIDTH - 2}} {first_sentence(path)}"


def main() -> None:
    """Replace the first code block of the page."""
    before, _, after = PAGE.read_text(encoding="utf-8").split("```", 2)
    PAGE.write_text(f"{before}```\n{file_tree()}\n```{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
