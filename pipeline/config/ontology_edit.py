"""An ontology file with other values of a few fields, its comments and layout kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import yaml

from pipeline.config.ontology import Ontology, parse_ontology
from pipeline.config.ontology_from import to_yaml
from pipeline.config.yaml_file import Field, parse_yaml
from pipeline.errors import UsageError, one_line

Changes = Mapping[str, Mapping[str, float]]
"""By class, by field."""


def edit_ontology(
    data: bytes, file: str, output: str, changes: Changes, comments: Sequence[str]
) -> str:
    """The text of the file `output`: that of `file` with changed fields, below comments.

    The text is edited at the places of the nodes. If that gives something else, as with relative
    paths and an output in another folder, the file is written anew. JSON gets no comments.
    """
    text = data.decode("utf-8-sig")
    asked = _changed(parse_ontology(parse_yaml(data, file)), changes)
    classes = parse_yaml(data, file).fields("classes", "overlap", "instances")["classes"]
    edits = [e for item in classes.items() for e in _edit_class(item, changes, text)]
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    if not _says(text, output, asked):
        text = to_yaml(asked)
    if output.lower().endswith(".json"):
        return text
    head = "".join(f"# {one_line(line, 1000)}\n" for line in comments)
    return head + text


def _changed(ontology: Ontology, changes: Changes) -> Ontology:
    classes = tuple(
        replace(each, **dict(changes.get(each.name, {})))  # type: ignore[arg-type]
        for each in ontology.classes
    )
    return replace(ontology, classes=classes)


def _says(text: str, file: str, asked: Ontology) -> bool:
    """Whether a text means the wanted ontology."""
    try:
        found = parse_ontology(parse_yaml(text.encode(), file))
    except UsageError:
        return False
    return _plain(found) == _plain(asked)


def _plain(ontology: Ontology) -> Ontology:
    """Without lines and file."""
    classes = tuple(replace(each, line=0) for each in ontology.classes)
    return replace(ontology, classes=classes, file="")


def _edit_class(item: Field, changes: Changes, text: str) -> list[tuple[int, int, str]]:
    """(start, end, new text) of each edit in a class."""
    start, end = item.node.start_mark.index, item.node.end_mark.index
    if item.is_text:
        wanted = changes.get(item.text(), {})
        fields = "".join(f', "{n}": {v:g}' for n, v in wanted.items())
        quoted = json.dumps(item.text(), ensure_ascii=False)
        return [(start, end, f'{{"name": {quoted}{fields}}}')] if wanted else []
    known = {key.text(): (key, value) for key, value in item.pairs()}
    key, name = known["name"]
    edits, added = [], []
    for of, number in changes.get(name.text(), {}).items():
        if of in known:
            node = known[of][1].node
            edits.append((node.start_mark.index, node.end_mark.index, f"{number:g}"))
        else:
            added.append(f"{of}: {number:g}")
    if not added:
        return edits
    assert isinstance(item.node, yaml.MappingNode)
    after = name.node.end_mark.index
    if item.node.flow_style:
        if text[key.node.start_mark.index] == '"':  # JSON
            added = ['"{}":{}'.format(*a.split(":")) for a in added]
        return [*edits, (after, after, "".join(f", {a}" for a in added))]
    line_end = text.find("\n", after)
    line_end = len(text) if line_end < 0 else line_end
    if text[line_end - 1 : line_end] == "\r":
        line_end -= 1
    blanks = " " * item.node.value[0][0].start_mark.column
    return [*edits, (line_end, line_end, "".join(f"\n{blanks}{a}" for a in added))]
