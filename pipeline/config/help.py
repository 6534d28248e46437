"""Texts of --help: each option's docstring as one paragraph; an example and a page a command.

tyro keeps line breaks of a docstring in front of anything but a letter, in the midst of a sentence,
and prints a default of None as such.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import tyro

EXAMPLES = {
    "demo": "demo-output",
    "segment": 'photos/ masks/ --prompt "a cat" --prompt "a remote control"',
    "embed": "s3://bucket/shards/ embeddings/ --model openai/clip-vit-base-patch16",
    "classify": 'photos/ labels/ --labels labels.txt --template "a photo of a {}."',
    "ontology": "--from data.yaml ontology.yaml",
    "label": "masks/ labels/ --ontology ontology.yaml",
    "export": "labels/ coco/ --format coco --split train=0.8,val=0.2",
    "review": "labels/ --top 200 --format labelstudio --output review",
    "evaluate": "maps/ --ground-truth truth.json --output evaluation/",
    "calibrate": "maps/ --ground-truth truth.json --ontology in.yaml --output out.yaml",
    "reproduce": "phrasecut --data VGPhraseCut_v0 --model CIDAS/clipseg-rd64",
    "report": "masks/",
    "view": 'masks/ --prompt "a cat" --sort uncertain --output view.html',
    "plan": 'segment photos/ masks/ --prompt "a cat" --gpus 8 --cpus-per-gpu 16',
    "status": "masks/ --errors",
    "verify": "masks/ --sample 0.01",
    "retry-failed": "masks/",
    "index": "embeddings/ index/",
    "search": 'embeddings/ --text "a red car" --top 20 --gallery found.html',
    "duplicates": "embeddings/ --output duplicates.parquet --gallery duplicates.html",
}
"""Arguments of a call of each command."""

PAGES = {
    "demo": "docs/labels.md",
    "segment": "docs/inputs.md, docs/tables.md",
    "embed": "docs/search.md, docs/tables.md",
    "classify": "docs/inputs.md, docs/tables.md",
    "ontology": "docs/labels.md",
    "label": "docs/labels.md",
    "export": "docs/exports.md",
    "review": "docs/review.md",
    "evaluate": "docs/evaluate.md",
    "calibrate": "docs/evaluate.md",
    "reproduce": "docs/reproduce.md",
    "report": "docs/report.md",
    "view": "docs/tables.md",
    "plan": "docs/speed.md",
    "status": "docs/errors.md",
    "verify": "docs/reliability.md",
    "retry-failed": "docs/reliability.md",
    "index": "docs/search.md",
    "search": "docs/search.md",
    "duplicates": "docs/search.md",
}


_done: set[type[Any]] = set()


def describe(config: type[Any], prog: str) -> str:
    """The first lines of a command's help."""
    doc = " ".join((config.__doc__ or "").split())
    name = prog.rpartition(" ")[2]
    if name not in EXAMPLES:
        return doc
    return f"{doc}\n\nExample: {prog} {EXAMPLES[name]}\n\nMore in {PAGES[name]}."


def with_help(config: type[Any]) -> None:
    """Give the fields of a config dataclass, and of those in it, their help as tyro takes it."""
    if config in _done:
        return
    _done.add(config)
    docs = _field_docs(config)
    hints = get_type_hints(config, include_extras=True)
    for item in fields(config):
        made = item.default_factory() if callable(item.default_factory) else None
        if is_dataclass(made):
            with_help(type(made))
            continue
        for kind in get_args(hints[item.name]):
            if is_dataclass(command := next(iter(get_args(kind)), None)):
                with_help(command)  # type: ignore[arg-type]
        nothing = item.default is None or item.default is False
        told = tyro.conf.arg(help=docs.get(item.name), help_behavior_hint="" if nothing else None)
        config.__annotations__[item.name] = Annotated[hints[item.name], told]


def _field_docs(config: type[Any]) -> dict[str, str]:
    """The string below each field, as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for one, other in zip(body.body, body.body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            value = other.value if isinstance(other, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[one.target.id] = " ".join(value.value.split())
    return found
