"""Photos in, annotations out: the commands of docs/labels.md and of `make demo`, as written."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline.demo import MODEL
from pipeline.demo.scenes import Scene, draw_scene

ROOT = Path(__file__).parent.parent
ONTOLOGY = ROOT / "pipeline" / "demo" / "ontology.yaml"


def run(command: str, *options: str) -> int:
    """The exit code of `clipseg-ray JOB ...` in this process."""
    _, job, *arguments = shlex.split(command)
    code: int = import_module(f"jobs.{job}").main([*arguments, *options])
    return code


def test_photos_become_coco_with_three_commands_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ONTOLOGY, "ontology.yaml")
    scenes = [draw_scene(np.random.default_rng((5, i))) for i in range(12)]
    Path("photos").mkdir()
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(f"photos/{i:02}.png")
    page = (ROOT / "docs" / "labels.md").read_text()
    commands = re.findall(r"^(clipseg-ray .*)$", page, re.MULTILINE)[:3]
    assert [command.split()[1] for command in commands] == ["segment", "label", "export"]
    assert run(commands[0], "--model", str(MODEL), "--local") == 0
    assert run(commands[1], "--local") == 0
    assert run(commands[2]) == 0
    (opened,) = re.findall(r'pycocotools\.coco\.COCO\("(.*)"\)', capsys.readouterr().out)
    coco = COCO(opened)
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == ["blue", "star"]
    found = {image["key"]: image["id"] for image in coco.loadImgs(coco.getImgIds())}
    assert sorted(found) == [f"{i:02}" for i in range(12)]
    overlaps = [iou for i, s in enumerate(scenes) for iou in ious(coco, found[f"{i:02}"], s)]
    assert len(overlaps) > 8
    assert np.mean(overlaps) > 0.6
    assert Image.open("maps.png").height > 500
    # The picture has the colours of the ontology.
    drawn = set(map(tuple, np.asarray(Image.open("maps.png")).reshape(-1, 3).tolist()))
    assert {(0xE6, 0x9F, 0x00), (0xE2, 0x00, 0x74)} <= drawn


def ious(coco: COCO, image: int, scene: Scene) -> list[float]:
    """Of both classes, where one is in the scene: their annotations' IoU with what was drawn."""
    overlaps = []
    for category, truth in ((1, scene.mask(colour="blue")), (2, scene.mask(shape="star"))):
        if truth.any():
            some = coco.loadAnns(coco.getAnnIds(imgIds=image, catIds=category))
            mask = np.any([np.zeros_like(truth), *map(coco.annToMask, some)], axis=0)
            overlaps.append((mask & truth).sum() / (mask | truth).sum())
    return overlaps


def test_the_demo_ends_with_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipe = makefile.partition("\ndemo:")[2].partition("\n\n")[0]
    recipe = recipe.replace("$(OUT)", f"{tmp_path}/demo").replace("pipeline/", f"{ROOT}/pipeline/")
    commands = re.findall(r"\$\(BIN\)/(clipseg-ray .*)", recipe)
    assert [command.split()[1] for command in commands] == ["segment", "label", "export"]
    for again in range(2):
        assert run(commands[0], *(() if "--local" in commands[0] else ["--local"])) == 0
        assert run(commands[1]) == 0
        assert run(commands[2]) == 0
        said = capsys.readouterr().out
        assert ("nothing was left to do" in said) == bool(again)
    (opened,) = re.findall(r'pycocotools\.coco\.COCO\("(.*)"\)', said)
    coco = COCO(opened)
    assert len(coco.getImgIds()) == 72
    assert set(coco.getCatIds()) == {a["category_id"] for a in coco.loadAnns(coco.getAnnIds())}


def test_nobody_waits_for_an_installation_in_silence() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipes = re.findall(r"^\$\(VENV\)/\.installed.*:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert len(recipes) == 2
    for recipe in recipes:
        assert recipe.startswith('\t@echo "installing ')
