"""Photos in, annotations out: the commands of docs/labels.md, as written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from transformers import AutoTokenizer, CLIPSegModel

from jobs import retry_failed
from pipeline.demo import MODEL, SHARDS
from pipeline.demo.scenes import Scene, draw_scene
from pipeline.errors import JobError
from pipeline.run.finished import list_finished

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


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of segment over the bundled shards, with embeddings."""
    output = tmp_path_factory.mktemp("maps") / "run"
    options = ["--ontology", str(ONTOLOGY), "--embed", "--model", str(MODEL), "--local"]
    assert run(f"clipseg-ray segment {SHARDS} {output}", *options) == 0
    return output


def parts_of(output: Path, table: str = "annotations") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / table).glob("*.parquet")}


def rows_of(output: Path) -> pa.Table:
    return pa.concat_tables(map(pq.read_table, sorted((output / "annotations").glob("*.parquet"))))


def test_label_straight_on_images_gives_the_same_table(
    maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = f"--ontology {ONTOLOGY} --local"
    assert run(f"clipseg-ray label {maps} {tmp_path}/two {cut}") == 0
    straight = f"clipseg-ray label {SHARDS} {tmp_path}/one {cut} --model {MODEL}"
    assert run(straight) == 0
    for table in ("annotations", "images", "errors"):
        assert parts_of(tmp_path / "one", table) == parts_of(tmp_path / "two", table)
    capsys.readouterr()
    assert run(straight) == 0
    assert capsys.readouterr().out.count("72 images in 2 shards") == 2
    # The images are found through both runs.
    assert run(f"clipseg-ray export {tmp_path}/one {tmp_path}/coco --format coco") == 0
    # Nothing is segmented for labels that could not be written.
    other = tmp_path / "other.yaml"
    other.write_text(ONTOLOGY.read_text().replace("threshold: 0.4", "threshold: 0.9"))
    assert run(straight.replace(str(ONTOLOGY), str(other))) == 2
    assert "holds another run (ontology was" in capsys.readouterr().err
    (tmp_path / "full" / "images").mkdir(parents=True)
    (tmp_path / "full" / "images" / "mine.parquet").write_bytes(b"")
    assert run(straight.replace("/one", "/full")) == 2
    assert "holds files that are not from a run" in capsys.readouterr().err
    assert not (tmp_path / "full" / "segment").exists()
    assert run(f"clipseg-ray label {maps} {tmp_path}/x {cut} --model {MODEL}") == 2
    assert "is a run, whose maps are cut; leave out --model" in capsys.readouterr().err
    assert run(f"clipseg-ray label {SHARDS} {tmp_path}/x {cut} --max-pixels 9") == 2
    assert "name the --model" in capsys.readouterr().err


def test_a_class_is_absent_where_clip_says_so(
    maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"clipseg-ray label {maps} {tmp_path}/all --ontology {ONTOLOGY} --local") == 0
    # The reference: cosines by transformers' text tower and the table's vectors.
    texts = CLIPSegModel.from_pretrained(MODEL).eval()
    tokens = AutoTokenizer.from_pretrained(MODEL)(
        ["star", "a purple star"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        found = texts.get_text_features(**tokens)
    found = getattr(found, "pooler_output", found).numpy()
    mean = (found / np.linalg.norm(found, axis=1, keepdims=True)).mean(0)
    parts = sorted((maps / "embeddings").glob("*.parquet"))
    table = pa.concat_tables(map(pq.read_table, parts))
    vectors = np.stack(table["vector"].to_pylist())
    cosines = vectors @ (mean / np.linalg.norm(mean))
    least = float(np.sort(cosines)[36:38].mean())
    above = {
        (shard, row)
        for shard, row, cosine in zip(
            table["shard"].to_pylist(), table["row"].to_pylist(), cosines, strict=True
        )
        if cosine >= least
    }
    file = tmp_path / "gated.yaml"
    file.write_text(
        ONTOLOGY.read_text().replace("threshold:", f"clip_score: {least}\n    threshold:")
    )
    cut = f"--ontology {file} --local"
    assert run(f"clipseg-ray label {maps} {tmp_path}/gated {cut}") == 0
    every, gated = rows_of(tmp_path / "all").to_pylist(), rows_of(tmp_path / "gated").to_pylist()
    kept = [
        {k: v for k, v in row.items() if k != "instance"}
        for row in every
        if row["class"] == "blue" or (row["shard"], row["row"]) in above
    ]
    assert 0 < len(kept) < len(every)
    assert [{k: v for k, v in row.items() if k != "instance"} for row in gated] == kept
    # A run without embeddings is refused, and one whose prompts' vectors are gone.
    record = json.loads((maps / "_run.json").read_text())
    record["fingerprint"]["embed"] = False
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "_run.json").write_text(json.dumps(record))
    assert run(f"clipseg-ray label {tmp_path}/other {tmp_path}/x {cut}") == 2
    assert "gated.yaml:7: class 'star': clip_score needs the images' embeddings" in (
        capsys.readouterr().err
    )
    record["fingerprint"]["embed"] = True
    (tmp_path / "other" / "_run.json").write_text(json.dumps(record))
    assert run(f"clipseg-ray label {tmp_path}/other {tmp_path}/x {cut}") == 1
    assert "_prompts.npy: gone or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["probabilities", "embeddings"])
def test_a_part_that_is_gone_is_told_before_labels_are_cut(
    table: str, maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(maps, tmp_path / "run")
    lost = sorted(path for path in (tmp_path / "run" / table).glob("*-*.parquet"))[0]
    lost.unlink()
    with pytest.raises(JobError, match=f"{table}/{lost.name}: gone, of a shard that was finished"):
        list_finished(f"{tmp_path}/run", table)


KILLED = """
import os, signal, sys
from jobs import label
class Dying(label.CutAnnotations):
    shards = set()
    def __call__(self, records):
        self.shards.update(records["shard"].to_pylist())
        if len(self.shards) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(records)
label.CutAnnotations = Dying
label.main(sys.argv[1:])
"""


def test_labels_that_were_killed_are_completed_to_the_byte(maps: Path, tmp_path: Path) -> None:
    options = ["--ontology", str(ONTOLOGY), "--local"]
    assert run(f"clipseg-ray label {maps} {tmp_path}/calm", *options) == 0
    command = [sys.executable, "-c", KILLED, str(maps), f"{tmp_path}/labels", *options]
    killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    receipts = list((tmp_path / "labels").glob("_receipts/*/*.json"))
    assert len(receipts) == 1
    before = receipts[0].stat().st_mtime_ns
    assert not (tmp_path / "labels" / "_SUCCESS").exists()
    assert run(f"clipseg-ray label {maps} {tmp_path}/labels", *options) == 0
    for table in ("annotations", "images", "errors"):
        assert parts_of(tmp_path / "labels", table) == parts_of(tmp_path / "calm", table)
    assert receipts[0].stat().st_mtime_ns == before


def test_a_run_is_retried_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here" / "photos").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.fromarray(draw_scene(np.random.default_rng(1)).image).save("photos/a.png")
    Path("photos/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (9, 9)).save("shown.png")
    Image.new("L", (9, 9), 255).save("mask.png")
    options = ["--image-prompt", "a=shown.png:mask.png", "--image-prompt", "a=shown.png"]
    assert run(f"clipseg-ray segment photos out --model {MODEL} --local", *options) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "there")
    assert retry_failed.main([f"{tmp_path}/here/out", "--all", "--local"]) == 0
    assert "2 images in 1 shard: 1 done, 1 failed" in capsys.readouterr().out


def ious(coco: COCO, image: int, scene: Scene) -> list[float]:
    """Of both classes, where one is in the scene: their annotations' IoU with what was drawn."""
    overlaps = []
    for category, truth in ((1, scene.mask(colour="blue")), (2, scene.mask(shape="star"))):
        if truth.any():
            some = coco.loadAnns(coco.getAnnIds(imgIds=image, catIds=category))
            mask = np.any([np.zeros_like(truth), *map(coco.annToMask, some)], axis=0)
            overlaps.append((mask & truth).sum() / (mask | truth).sum())
    return overlaps


def test_nobody_waits_for_an_installation_in_silence() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipes = re.findall(r"^\$\(VENV\)/\.installed.*:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert len(recipes) == 2
    for recipe in recipes:
        assert recipe.startswith('\t@echo "installing ')
