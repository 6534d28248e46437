"""The ontology file: classes, their prompts, and the way from masks to annotations.

    overlap: argmax
    classes:
      - name: star
        phrases: [red star, blue star]
        negatives: [moon]
        threshold: 0.4
      - circle

A text alone is a class with that phrase. docs/labels.md describes every field.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from typing import Literal

from pipeline import storage
from pipeline.config.prompt import VISUAL_MODES, Example, Prompt
from pipeline.config.yaml_file import Field, open_yaml
from pipeline.errors import UsageError

Overlap = Literal["argmax", "priority", "multilabel"]
OVERLAPS = ("argmax", "priority", "multilabel")
_LIMIT_CLASSES = 10_000
_LIMIT_PROMPTS = 100  # of one class


@dataclass(frozen=True, kw_only=True)
class OntologyClass:
    """One class. Probabilities are 0..1, areas in pixels of the image."""

    name: str
    phrases: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    combine: Literal["max", "mean"] = "max"
    """max of the phrases' maps, or one map of the mean of their embeddings."""
    image_prompts: tuple[Example, ...] = ()
    negatives: tuple[str, ...] = ()
    """A pixel belongs to the class only where the class is more probable than these phrases."""
    threshold: float = 0.5
    presence: float = 0.0
    """The class is absent from an image whose largest probability of it is below this."""
    clip_score: float | None = None
    """The class is absent from an image whose CLIP cosine with its texts is below this."""
    min_area: int = 1
    fill_holes: int = 0
    """Holes of at most this area are filled."""
    priority: int = 0
    color: str | None = None
    """#rrggbb."""
    line: int = 0
    """In the file; no part of what the class is."""

    @property
    def prompts(self) -> list[Prompt]:
        """Those with the class's largest probability: texts first, then the examples."""
        texts = tuple(t.replace("{}", p) for p in self.phrases for t in self.templates)
        if self.combine == "max":
            plain = [Prompt(name=text, texts=(text,)) for text in dict.fromkeys(texts)]
            shown = Prompt(name=f"{self.name} (examples)", examples=self.image_prompts)
            return [*plain, shown] if self.image_prompts else plain
        if len(texts) == 1 and not self.image_prompts:
            return [Prompt(name=texts[0], texts=texts)]
        return [Prompt(name=f"{self.name} (mean)", texts=texts, examples=self.image_prompts)]


@dataclass(frozen=True, kw_only=True)
class Ontology:
    """The classes in the order of their class_id, and their way of sharing an image."""

    classes: tuple[OntologyClass, ...]
    overlap: Overlap = "argmax"
    """Which class has a pixel that several pass: the most probable, the one of the highest
    priority, or each."""
    instances: bool = True
    """Whether the 8-connected parts of a class are annotations of their own."""
    file: str = "ontology"

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt of a run needed by the classes, in their order, negatives included."""
        found: dict[str, Prompt] = {}
        for each in self.classes:
            negatives = [Prompt(name=text, texts=(text,)) for text in each.negatives]
            for prompt in [*each.prompts, *negatives]:
                if found.setdefault(prompt.name, prompt) != prompt:
                    raise UsageError(
                        f"{self.file}:{each.line}: {each.name!r}: another prompt is named "
                        f"{prompt.name!r}, too; rename the class or the phrase"
                    )
        return list(found.values())


def read_ontology(file: str) -> Ontology:
    """The ontology in a YAML file, local or s3://.

    Raises UsageError with file, line, field, value and rule for the first mistake.
    """
    return parse_ontology(open_yaml(file))


def parse_ontology(document: Field) -> Ontology:
    """The ontology of a document; raises UsageError as read_ontology."""
    values = document.fields("classes", "overlap", "instances")
    if "classes" not in values:
        raise document.wrong("needs a list of classes")
    items = values["classes"].items()
    if not 0 < len(items) <= _LIMIT_CLASSES:
        raise values["classes"].wrong(f"must have 1 to {_LIMIT_CLASSES:,} classes")
    classes: dict[str, OntologyClass] = {}
    for item in items:
        each = _parse_class(item)
        if each.name in classes:
            raise item.wrong(f"class {each.name!r} stands in line {classes[each.name].line}, too")
        classes[each.name] = each
    overlap = values["overlap"].choice(*OVERLAPS) if "overlap" in values else "argmax"
    instances = "instances" not in values or values["instances"].choice("true", "false") == "true"
    ontology = Ontology(
        classes=tuple(classes.values()),
        overlap=overlap,  # type: ignore[arg-type]
        instances=instances,
        file=document.file,
    )
    _ = ontology.prompts  # refuses names of two meanings
    return ontology


def _parse_class(item: Field) -> OntologyClass:
    line = item.node.start_mark.line + 1
    if item.is_text:
        return OntologyClass(name=item.text(), phrases=(item.text(),), line=line)
    known = [f.name for f in fields(OntologyClass) if f.name != "line"]
    values = item.fields(*known)
    if "name" not in values:
        raise item.wrong("a class needs a name")
    name = values["name"].text(200)
    read = {
        "phrases": lambda f: tuple(f.texts()),
        "templates": _templates,
        "combine": lambda f: f.choice("max", "mean"),
        "image_prompts": lambda f: tuple(_parse_example(each) for each in f.items()),
        "negatives": lambda f: tuple(f.texts()),
        "threshold": lambda f: f.number(0, 1),
        "presence": lambda f: f.number(0, 1),
        "clip_score": lambda f: f.number(-1, 1),
        "min_area": lambda f: f.integer(1),
        "fill_holes": lambda f: f.integer(0),
        "priority": lambda f: f.integer(-(10**6), 10**6),
        "color": _color,
    }
    found = {key: read[key](field) for key, field in values.items() if key != "name"}
    if not found.get("phrases") and not found.get("image_prompts"):
        found["phrases"] = (name,)
    each = OntologyClass(name=name, line=line, **found)
    if len(each.phrases) * len(each.templates) + len(each.negatives) > _LIMIT_PROMPTS:
        raise item.wrong(f"more than {_LIMIT_PROMPTS} phrases, with templates and negatives")
    for text in each.negatives:
        if text in [prompt.name for prompt in each.prompts]:
            raise values["negatives"].wrong(f"{text!r} is a phrase of the class itself")
    return each


def _templates(field: Field) -> tuple[str, ...]:
    texts = field.texts()
    for text in texts:
        if text.count("{}") != 1:
            raise field.wrong(f"a template has one {{}} for the phrase, not as in {text!r}")
    return tuple(texts)


def _color(field: Field) -> str:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", field.text()):
        raise field.wrong('must be "#rrggbb", in quotes: YAML takes a bare # for a comment')
    return field.text().lower()


def _parse_example(item: Field) -> Example:
    """An example, its paths from the ontology's folder."""
    values = item.fields(*[f.name for f in fields(Example)])
    if ("file" in values) == ("embedding" in values):
        raise item.wrong("needs either a file or an embedding")
    for name in ("mask", "box", "mode"):
        if name in values and ("embedding" in values or (name == "box" and "mask" in values)):
            other = "an embedding" if "embedding" in values else "a mask"
            raise values[name].wrong(f"goes not with {other}")
    if "embedding" in values and not re.search(r"\.(npy|safetensors)$", values["embedding"].text()):
        raise values["embedding"].wrong("must be a .npy or .safetensors file")
    paths = {n: _beside(values[n]) for n in ("file", "mask", "embedding") if n in values}
    return Example(
        **paths,
        box=_box(values["box"]) if "box" in values else None,
        mode=values["mode"].choice(*VISUAL_MODES) if "mode" in values else VISUAL_MODES[0],
        weight=values["weight"].number(0.001, 1000) if "weight" in values else 1.0,
    )


def _beside(field: Field) -> str:
    """The path in a field, as seen from the folder of the file."""
    path = field.text()
    if storage.is_s3(path) or path.startswith("/"):
        return path
    return storage.join(storage.parent(storage.check_uri(field.file)), path)


def _box(field: Field) -> tuple[float, float, float, float]:
    items = field.items()
    if len(items) != 4:
        raise field.wrong("must be [x, y, width, height]")
    x, y, width, height = (item.number(0, 1e6) for item in items)
    if not width or not height:
        raise field.wrong("width and height must be above 0")
    return x, y, width, height


def is_default(of: OntologyClass | Example, name: str) -> bool:
    """Whether a field has its default value."""
    default = next(f.default for f in fields(of) if f.name == name)
    return default is not MISSING and getattr(of, name) == default
