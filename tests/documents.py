"""Write into docs/ what the code says already: the list of files, and the table of reasons.

python -m tests.documents
"""

from __future__ import annotations

import ast
from pathlib import Path

import pipeline
from pipeline.errors import REASONS

ROOT = Path(__file__).parent.parent
ARCHITECTURE, ERRORS = ROOT / "docs" / "architecture.md", ROOT / "docs" / "errors.md"
_WIDTH = 24


def file_tree() -> str:
    """Every file with the first paragraph of its docstring; rooms as in pipeline/__init__.py."""
    doc = pipeline.__doc__ or ""
    entries = [line.split()[0] for line in doc.splitlines() if line.startswith("    ")]
    files = [f"{name}.py" for name in entries if not name.endswith("/")]
    lines = ["pipeline/", *(_line(ROOT / "pipeline" / name) for name in files)]
    rooms = [ROOT / "pipeline" / name for name in entries if name.endswith("/")]
    for room in [*rooms, ROOT / "jobs", ROOT / "benchmarks"]:
        name = room.relative_to(ROOT).as_posix() + "/"
        lines.append(f"{name:{_WIDTH}} {_phrase(room / '__init__.py')}")
        lines += [_line(path) for path in sorted(room.glob("*.py")) if path.name[0] != "_"]
    return "\n".join(lines) + "\n"


def _line(path: Path) -> str:
    return f"  {path.name:{_WIDTH - 2}} {_phrase(path)}"


def _phrase(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".:")


def reasons_table() -> str:
    """errors.REASONS as the rows of a table."""
    return "".join(f"| {reason} | {meaning} |\n" for reason, meaning in REASONS.items())


def pages() -> dict[Path, str]:
    """Both pages as they should be."""
    before, _, after = ARCHITECTURE.read_text(encoding="utf-8").split("```", 2)
    architecture = f"{before}```\n{file_tree()}```{after}"
    before, after = ERRORS.read_text(encoding="utf-8").split("| reason | meaning |\n", 1)
    rest = after.split("\n\n", 1)[1]
    errors = f"{before}| reason | meaning |\n| --- | --- |\n{reasons_table()}\n{rest}"
    return {ARCHITECTURE: architecture, ERRORS: errors}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
