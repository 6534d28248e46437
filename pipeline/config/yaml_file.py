"""YAML from strangers, read within bounds: every mistake is one line with its place in the file.

    ontology.yaml:7: classes[1].threshold '1.5': must be a number from 0 to 1

Read as nodes, for their lines. Text is the text as written: `name: no` is "no". Aliases, tags and
duplicate keys are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import yaml

from pipeline import storage
from pipeline.errors import StorageError, UsageError, one_line

LIMIT_BYTES = 8 * 2**20
_LIMIT_DEPTH = 12
_LIMIT_EVENTS = 200_000
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Field:
    """One value of a YAML file, with its place."""

    file: str
    node: yaml.Node
    path: str
    """Such as "classes[1].threshold"; "" for the whole file."""

    def wrong(self, rule: str) -> UsageError:
        """An error with the file, line, field, value and rule."""
        place = f"{self.file}:{self.node.start_mark.line + 1}"
        if isinstance(self.node, yaml.ScalarNode):
            shown = repr(one_line(self.node.value, _SHOWN_CHARACTERS))
        else:
            shown = "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"
        return UsageError(f"{place}: {self.path + ' ' if self.path else ''}{shown}: {rule}")

    @property
    def is_text(self) -> bool:
        """Whether this is a single value: no list, no mapping."""
        return isinstance(self.node, yaml.ScalarNode)

    @property
    def is_mapping(self) -> bool:
        """Whether this is a mapping."""
        return isinstance(self.node, yaml.MappingNode)

    def pairs(self) -> list[tuple[Field, Field]]:
        """The keys and values of a mapping. Raises UsageError for a duplicate key."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong("must be a mapping (name: value)")
        found: dict[str, tuple[Field, Field]] = {}
        for key_node, node in self.node.value:
            key = Field(file=self.file, node=key_node, path=f"key of {self.path or 'the file'}")
            name = key.text()
            if name in found:
                first = found[name][0].node.start_mark.line + 1
                raise key.wrong(f"this key stands in line {first} already")
            path = f"{self.path}.{name}" if self.path else one_line(name, _SHOWN_CHARACTERS)
            found[name] = key, Field(file=self.file, node=node, path=path)
        return list(found.values())

    def fields(self, *known: str) -> dict[str, Field]:
        """The values of a mapping by key. Raises UsageError for an unknown key."""
        pairs = self.pairs()
        for key, _ in pairs:
            if key.text() not in known:
                raise key.wrong(f"no such field; known: {', '.join(known)}")
        return {key.text(): value for key, value in pairs}

    def items(self) -> list[Field]:
        """The elements of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong("must be a list")
        return [
            Field(file=self.file, node=node, path=f"{self.path}[{i}]")
            for i, node in enumerate(self.node.value)
        ]

    def text(self, limit: int = 1000) -> str:
        """A text of one line, without the blanks around it."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.wrong("must be a text")
        value = str(self.node.value).strip()
        if not value:
            raise self.wrong("must not be empty")
        if len(value) > limit or not value.isprintable():
            raise self.wrong(f"must be printable text of one line, at most {limit} characters")
        return value

    def texts(self) -> list[str]:
        """A text, or a list of different ones."""
        if self.is_text:
            return [self.text()]
        found: list[str] = []
        for item in self.items():
            if item.text() in found:
                raise item.wrong("is given twice")
            found.append(item.text())
        return found

    def number(self, low: float, high: float = math.inf) -> float:
        """A finite number in [low, high]."""
        bound = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        try:
            value = float(self.text().replace("_", "x")) if self.is_text else math.nan  # no 1_000
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or math.isinf(value):
            raise self.wrong(f"must be a number {bound}")
        return value

    def integer(self, low: int, high: int = 10**9) -> int:
        """A whole number in [low, high]."""
        text = self.text() if self.is_text else ""
        if not re.fullmatch(r"-?[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise self.wrong(f"must be a whole number from {low} to {high}")
        return int(text)

    def choice(self, *choices: str) -> str:
        """One of the choices."""
        if not self.is_text or self.text() not in choices:
            raise self.wrong(f"must be one of {', '.join(choices)}")
        return self.text()


def open_yaml(file: str, limit_bytes: int = LIMIT_BYTES) -> Field:
    """The one document of a YAML (or JSON) file, local or s3://.

    Raises UsageError for a file unreadable, too large or nested too deeply, without YAML, or with
    an alias or a tag.
    """
    try:
        data = storage.read_bytes(storage.check_uri(file), limit_bytes=limit_bytes + 1)
    except StorageError as error:
        raise UsageError(f"{file}: cannot be read ({error})") from error
    return parse_yaml(data, file, limit_bytes)


def parse_yaml(
    data: bytes, file: str, limit_bytes: int = LIMIT_BYTES, limit_events: int = _LIMIT_EVENTS
) -> Field:
    """The document in the bytes of a file of this name; raises UsageError as open_yaml."""
    if len(data) > limit_bytes:
        raise UsageError(f"{file}: larger than {limit_bytes:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not a UTF-8 text file") from error
    try:
        _check_events(text, file, limit_events)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{file}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if node is None:
        raise UsageError(f"{file}: empty")
    return Field(file=file, node=node, path="")


def _check_events(text: str, file: str, limit_events: int) -> None:
    """Refuse aliases, tags and what is too deep or too much, before anything recursive runs."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        place = f"{file}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UsageError(f"{place}: anchors and aliases (&, *) are not used here")
        tag = getattr(event, "tag", None)
        if tag:
            raise UsageError(f"{place}: tags ({one_line(str(tag), 40)}) are not used here")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _LIMIT_DEPTH:
            raise UsageError(f"{place}: nested more than {_LIMIT_DEPTH} levels deep")
        if count > limit_events:
            raise UsageError(f"{place}: more than {limit_events:,} values")
