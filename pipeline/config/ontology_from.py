"""Lists of classes of other tools -> an ontology, and an ontology -> its file.

Known: Ultralytics' data.yaml (`names`), COCO's categories, CVAT's labels, autodistill's
{phrase: class}, and a text file with one label a line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from pipeline import storage
from pipeline.config.ontology import Ontology, OntologyClass, is_default, parse_ontology
from pipeline.config.options import check_file
from pipeline.config.prompt import Example
from pipeline.config.yaml_file import LIMIT_BYTES, Field, open_yaml, parse_yaml
from pipeline.errors import StorageError, UsageError

# COCO files hold annotations, too: instances_train2017.json has 450 MB.
_LIMIT_JSON_BYTES = 2**29
_KNOWN = "Ultralytics names, COCO categories, CVAT labels, {phrase: class} or a list of labels"


@dataclass(frozen=True, kw_only=True)
class OntologyConfig:
    """Make an ontology file from a list of classes in another tool's format."""

    source: Annotated[str, tyro.conf.arg(name="from", metavar="FILE")]
    """data.yaml of Ultralytics, COCO .json, CVAT labels .json, autodistill's {phrase: class} as
    .json or .yaml, or a .txt file with one label a line."""

    output: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="OUTPUT")] = None
    """Where to write the ontology, a new file; by default it is printed."""

    def __post_init__(self) -> None:
        check_file("--from", self.source)
        check_file("OUTPUT", self.output)


def convert_to_ontology(file: str) -> Ontology:
    """The classes listed in a file of another tool.

    Raises UsageError for an unreadable file, or one of no known kind.
    """
    if file.lower().endswith(".json"):
        return _checked(_classes_of_json(_read_json(file), file), file)
    if file.lower().endswith(".txt"):
        data = _read(file, LIMIT_BYTES)
        lines = data.decode("utf-8-sig", errors="replace").splitlines()
        return _checked([{"name": line.strip()} for line in lines if line.strip()], file)
    document = open_yaml(file)
    if not document.is_mapping:
        return _checked([{"name": item.text()} for item in document.items()], file)
    values = {key.text(): value for key, value in document.pairs()}
    if "names" in values:
        return _checked([{"name": name} for name in _names(values["names"])], file)
    if all(value.is_text for value in values.values()):
        return _checked(_of_phrases({k: v.text() for k, v in values.items()}), file)
    raise UsageError(f"{file}: not a list of classes that is known: {_KNOWN}")


def _names(field: Field) -> list[str]:
    """Ultralytics: a list, or {0: name, 1: name}."""
    if not field.is_mapping:
        return [item.text() for item in field.items()]
    numbered = [(key.integer(0), value.text()) for key, value in field.pairs()]
    return [name for _, name in sorted(numbered)]


def _classes_of_json(value: Any, file: str) -> list[dict[str, Any]]:
    if isinstance(value, dict) and isinstance(value.get("categories"), list):
        value = sorted(value["categories"], key=_category_id)
    elif isinstance(value, dict) and isinstance(value.get("names"), (list, dict)):
        names = value["names"]
        value = list(names.values()) if isinstance(names, dict) else names
    elif isinstance(value, dict) and value and all(isinstance(v, str) for v in value.values()):
        return _of_phrases(value)
    if not isinstance(value, list):
        raise UsageError(f"{file}: not a list of classes that is known: {_KNOWN}")
    classes = []
    for i, each in enumerate(value):
        named = {"name": each} if isinstance(each, str) else each
        if not isinstance(named, dict) or not isinstance(named.get("name"), str):
            raise UsageError(f"{file}: entry {i}: must be a name, or an object with a name")
        color = _color(named.get("color"))
        classes.append({"name": named["name"]} | ({"color": color} if color else {}))
    return classes


def _color(value: Any) -> str | None:
    """CVAT's "#rrggbb" or COCO panoptic's [r, g, b]; None for any other."""
    if isinstance(value, list) and len(value) == 3 and all(type(v) is int for v in value):
        value = "#" + "".join(f"{v & 255:02x}" for v in value)
    return value if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value) else None


def _category_id(category: Any) -> int:
    found = category.get("id") if isinstance(category, dict) else None
    return found if isinstance(found, int) else 0


def _of_phrases(classes: dict[str, str]) -> list[dict[str, Any]]:
    """autodistill: {phrase: class}, several phrases of one class."""
    found: dict[str, list[str]] = {}
    for phrase, name in classes.items():
        found.setdefault(name, []).append(phrase)
    return [{"name": name, "phrases": phrases} for name, phrases in found.items()]


def _checked(classes: list[dict[str, Any]], file: str) -> Ontology:
    """The ontology, by the rules of an ontology file; names equal in both stay as they are.

    Raises UsageError for a broken one, with its line in the ontology to be written.
    """
    if not classes:
        raise UsageError(f"{file}: no classes in it")
    data = json.dumps({"classes": classes}, ensure_ascii=False).encode("utf-8", "replace")
    return parse_ontology(parse_yaml(data, file, _LIMIT_JSON_BYTES))


def _read(file: str, limit_bytes: int) -> bytes:
    try:
        data = storage.read_bytes(storage.check_uri(file), limit_bytes=limit_bytes + 1)
    except StorageError as error:
        raise UsageError(f"{file}: cannot be read ({error})") from error
    if len(data) > limit_bytes:
        raise UsageError(f"{file}: larger than {limit_bytes:,} bytes")
    return data


def _read_json(file: str) -> Any:
    try:
        return json.loads(_read(file, _LIMIT_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not valid JSON: {str(error)[:200]}") from error


def to_yaml(ontology: Ontology) -> str:
    """The file of an ontology; fields at their default are left out."""
    lines = []
    if ontology.overlap != "argmax":
        lines.append(f"overlap: {ontology.overlap}")
    if not ontology.instances:
        lines.append("instances: false")
    lines.append("classes:")
    for each in ontology.classes:
        given = _given(each)
        if given.get("phrases") == (each.name,) and not each.image_prompts:
            del given["phrases"]
        head, *rest = given.items()
        lines.append(f"  - {head[0]}: {_show(head[1])}")
        lines += [f"    {name}: {_show(value)}" for name, value in rest]
    return "\n".join(lines) + "\n"


def _given(of: OntologyClass | Example) -> dict[str, Any]:
    names = [f.name for f in fields(of) if f.name != "line" and not is_default(of, f.name)]
    return {name: getattr(of, name) for name in names}


def _show(value: Any) -> str:
    """A value in YAML's flow style, JSON's own."""
    if isinstance(value, tuple) and value and isinstance(value[0], Example):
        value = [_given(example) for example in value]
    return json.dumps(value, ensure_ascii=False)
