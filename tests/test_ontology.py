"""Ontology files: each mistake is one line with its place, and lists of other tools become one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jobs.ontology import main
from pipeline.config.ontology import (
    OVERLAPS,
    Ontology,
    OntologyClass,
    parse_ontology,
    read_ontology,
)
from pipeline.config.ontology_from import convert_to_ontology, to_yaml
from pipeline.config.prompt import VISUAL_MODES, Example, Prompt, parse_image_prompts
from pipeline.config.yaml_file import parse_yaml
from pipeline.errors import UsageError

WHOLE = """\
overlap: priority
instances: false
classes:
  - name: no                 # a text, not False
    phrases: [2024-01-01, 12, "yes"]
    templates: ["{}", "a photo of a {}"]
    negatives: moon
    threshold: .4
    presence: 0.6
    min_area: 64
    fill_holes: 9
    priority: -2
    color: "#E2001A"
  - name: star
    combine: mean
    phrases: [star, five-pointed star]
    image_prompts:
      - {file: a.png, mask: masks/a.png, weight: 0.5}
      - {file: /b.jpg, box: [1, 2, 30, 40], mode: crop}
      - {embedding: star.npy}
  - circle
"""


def parse(text: str) -> Ontology:
    return parse_ontology(parse_yaml(text.encode(), "o.yaml"))


def test_every_field_is_read(tmp_path: Path) -> None:
    file = tmp_path / "o.yaml"
    file.write_text(WHOLE)
    found = read_ontology(str(file))
    assert (found.overlap, found.instances) == ("priority", False)
    no, star, circle = found.classes
    assert no == OntologyClass(
        name="no",
        phrases=("2024-01-01", "12", "yes"),
        templates=("{}", "a photo of a {}"),
        negatives=("moon",),
        threshold=0.4,
        presence=0.6,
        min_area=64,
        fill_holes=9,
        priority=-2,
        color="#e2001a",
        line=4,
    )
    examples = (
        Example(file=f"{tmp_path}/a.png", mask=f"{tmp_path}/masks/a.png", weight=0.5),
        Example(file="/b.jpg", box=(1, 2, 30, 40), mode="crop"),
        Example(embedding=f"{tmp_path}/star.npy"),
    )
    assert star.image_prompts == examples
    assert (circle.name, circle.phrases, circle.threshold) == ("circle", ("circle",), 0.5)


def test_prompts_are_those_that_a_run_needs() -> None:
    found = parse(WHOLE)
    names = [prompt.name for prompt in found.prompts]
    phrases = [
        t.replace("{}", p) for p in ("2024-01-01", "12", "yes") for t in ("{}", "a photo of a {}")
    ]
    assert names == [*phrases, "moon", "star (mean)", "circle"]
    mean = found.prompts[-2]
    assert mean.texts == ("star", "five-pointed star")
    assert (len(mean.examples), mean.is_plain) == (3, False)
    shown = OntologyClass(name="s", phrases=("a",), image_prompts=(Example(file="x"),)).prompts
    assert [p.name for p in shown] == ["a", "s (examples)"]
    # One phrase is its own mean, so that it needs no prompt of its own.
    one = OntologyClass(name="s", phrases=("a",), combine="mean").prompts
    assert one == [Prompt(name="a", texts=("a",))]


# Of a class, in line 3 of the file.
OF_A_CLASS = {
    "treshold: 1": "o.yaml:3: key of classes[0] 'treshold': no such field; known: name, phrases",
    "threshold: 1.5": "o.yaml:3: classes[0].threshold '1.5': must be a number from 0 to 1",
    "threshold: .nan": "must be a number from 0 to 1",
    "threshold: [1]": "o.yaml:3: classes[0].threshold a list: must be a number",
    "min_area: 1.5": "'1.5': must be a whole number from 1",
    "min_area: ²": "must be a whole number",
    "min_area: 99999999999999999": "must be a whole number",
    "color: #ff0000": "o.yaml:3: classes[0].color '': must not be empty",
    "color: red": "o.yaml:3: classes[0].color 'red': must be \"#rrggbb\"",
    "combine: sum": "'sum': must be one of max, mean",
    "name: b": "o.yaml:3: key of classes[0] 'name': this key stands in line 2 already",
    "phrases: [x, x]": "classes[0].phrases[1] 'x': is given twice",
    "phrases: {x: x}": "classes[0].phrases a mapping: must be a list",
    'phrases: "a\\e[31m"': "must be printable text",
    "templates: [photo]": "a template has one {}",
    "negatives: a": "'a' is a phrase of the class itself",
    "image_prompts: [{mask: b.png}]": "needs either a file or an embedding",
    "image_prompts: [{file: a, mask: b, box: [1,1,1,1]}]": "goes not with a mask",
    "image_prompts: [{embedding: a.pkl}]": "must be a .npy or .safetensors file",
    "image_prompts: [{file: a, box: [1,1,0,1]}]": "must be above 0",
    "image_prompts: [{file: a, weight: 0}]": "o.yaml:3: classes[0].image_prompts[0].weight '0'",
}
OF_A_FILE = {
    "classes:\n  - a\n  - b\n  - a\n": "o.yaml:4: classes[2] 'a': class 'a' stands in line 2",
    "classes:\n  - {name: a, combine: mean, phrases: [x, y]}\n  - a (mean)\n": (
        "o.yaml:3: 'a (mean)': another prompt is named 'a (mean)', too"
    ),
    "classes: []\n": "o.yaml:1: classes a list: must have 1 to 10,000 classes",
    "classes: a\n": "o.yaml:1: classes 'a': must be a list",
    "overlap: x\nclasses: [a]\n": "o.yaml:1: overlap 'x': must be one of argmax",
    "instances: yes\nclasses: [a]\n": "must be one of true, false",
    "- a\n": "o.yaml:1: a list: must be a mapping",
    "classes: [a\nx": "o.yaml:2: not valid YAML",
    "classes: &x [*x]\n": "o.yaml:1: anchors and aliases",
    "classes: !!python/object:os.system [a]\n": "o.yaml:1: tags",
    "a: 1\n--- \nb: 1\n": "not valid YAML",
    "classes: [\0]\n": "not valid YAML",
    "classes: " + "[" * 5000: "nested more than 12 levels deep",
    "": "o.yaml: empty",
}
MISTAKES = OF_A_FILE | {f"classes:\n  - name: a\n    {k}\n": v for k, v in OF_A_CLASS.items()}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert MISTAKES[text] in message
    assert message.isprintable()


def test_a_file_too_large_is_refused_unread() -> None:
    with pytest.raises(UsageError, match="larger than"):
        parse_yaml(b" " * 100, "o.yaml", limit_bytes=99)
    with pytest.raises(UsageError, match="more than 500 values"):
        parse_yaml(b"[" + b"a," * 600 + b"]", "o.yaml", limit_events=500)


names = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=12)
shares = st.floats(0, 1)
phrases = st.lists(names, unique=True, max_size=3).map(tuple)


@st.composite
def classes(draw: st.DrawFn) -> OntologyClass:
    name, own = draw(names), draw(phrases)
    shown = st.builds(Example, file=names.map("/{}".format), mode=st.sampled_from(VISUAL_MODES))
    return OntologyClass(
        name=name,
        phrases=own or (name,),
        combine=draw(st.sampled_from(["max", "mean"])),
        image_prompts=tuple(draw(st.lists(shown, max_size=2))),
        negatives=tuple(t for t in draw(phrases) if t not in (*own, name)),
        threshold=draw(shares),
        min_area=draw(st.integers(1, 10**9)),
        priority=draw(st.integers(-5, 5)),
        color=draw(st.sampled_from([None, "#0a0b0c"])),
    )


@given(
    st.lists(classes(), min_size=1, max_size=4, unique_by=lambda c: c.name),
    st.sampled_from(OVERLAPS),
)
def test_an_ontology_survives_its_file(some: list[OntologyClass], overlap: str) -> None:
    ontology = Ontology(classes=tuple(some), overlap=overlap)  # type: ignore[arg-type]
    text = to_yaml(ontology)
    found = parse(text)
    assert to_yaml(found) == text
    assert found.prompts == ontology.prompts
    assert [c["name"] for c in yaml.safe_load(text)["classes"]] == [c.name for c in some]


FORMATS = {
    "data.yaml": "path: x\ntrain: images\nnames:\n  0: no\n  1: red star\n",
    "list.yaml": "nc: 2\nnames: [no, 'red star']\n",
    "coco.json": (
        '{"images": [], "categories": [{"id": 7, "name": "red star"},'
        ' {"id": 3, "name": "no", "color": [0, 255, 0]}]}'
    ),
    "cvat.json": '[{"name": "no", "color": "#00FF00", "attributes": []}, {"name": "red star"}]',
    "labels.json": json.dumps(["no", "red star"]),
    "labels.txt": "no\r\n\r\nred star\r\n",
    "distill.json": json.dumps({"no": "no", "red star": "red star"}),
    "distill.yaml": "no: no\nred star: red star\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_lists_of_other_tools_become_ontologies(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(FORMATS[name])
    assert main(["--from", str(tmp_path / name), str(tmp_path / "o.yaml")]) == 0
    found = read_ontology(str(tmp_path / "o.yaml"))
    assert [(c.name, c.phrases) for c in found.classes] == [
        ("no", ("no",)),
        ("red star", ("red star",)),
    ]
    assert found.classes[0].color == ("#00ff00" if name in ("cvat.json", "coco.json") else None)
    capsys.readouterr()
    assert main(["--from", str(tmp_path / name), str(tmp_path / "o.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["--from", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out == (tmp_path / "o.yaml").read_text()


def test_phrases_of_one_class_stay_together(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"kitten": "cat", "dog": "dog", "tabby": "cat"}))
    found = convert_to_ontology(str(tmp_path / "d.json"))
    assert [(c.name, c.phrases) for c in found.classes] == [
        ("cat", ("kitten", "tabby")),
        ("dog", ("dog",)),
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '{"a": [1]}', "not a list of classes that is known"),
        ("a.json", '[{"id": 1}]', "entry 0: must be a name"),
        ("a.json", "[]", "no classes in it"),
        ("a.yaml", "train: {a: b}\n", "not a list of classes that is known"),
        ("a.txt", "\n", "no classes in it"),
        ("a.txt", "x\nx\n", "class 'x' stands in line"),
    ],
)  # fmt: skip
def test_other_files_are_refused(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says):
        convert_to_ontology(str(tmp_path / name))
    with pytest.raises(UsageError, match="cannot be read"):
        convert_to_ontology(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("value", "file", "mask"),
    [
        ("red star=a.jpg", "a.jpg", ""),
        ("x=a.png", "a.png", ""),
        ("x=a.jpg:m.PNG", "a.jpg", "m.PNG"),
        ("x=s3://b/a.png", "s3://b/a.png", ""),
        ("x=s3://b/a.png:s3://b/m.png", "s3://b/a.png", "s3://b/m.png"),
        ("x=a=b.jpg:s3://b/m.png", "a=b.jpg", "s3://b/m.png"),
    ],
)
def test_image_prompts_of_the_command_line(value: str, file: str, mask: str) -> None:
    (found,) = parse_image_prompts([value, value])
    assert found.name == value.partition("=")[0]
    assert found.examples == (Example(file=file, mask=mask),) * 2


@pytest.mark.parametrize("value", ["a.jpg", "=a.jpg", " =a.jpg", "x="])
def test_image_prompts_without_name_or_image_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="must be NAME=IMAGE"):
        parse_image_prompts([value])


def test_the_documented_ontology_is_one_and_every_field_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "labels.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert len(parse(example).classes) == 4
    rows = set(re.findall(r"^\| (\w+) \|", page, re.MULTILINE))
    fields = {f.name for f in dataclasses.fields(OntologyClass)} - {"name", "line"}
    assert fields | {"overlap", "instances"} <= rows
