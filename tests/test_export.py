"""Exports: the masks that went in come back through the tools' own readers."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from export_readers import TOLD, Truth, compare
from export_table import read_truth
from export_table import write as write_all
from label_tables import (
    CLASSES,
    FORMATS,
    SMALL,
    export_labels,
    image_row,
    read_json,
    write_labels,
)
from PIL import Image
from pycocotools import mask as coco

from pipeline.annotations.coco import run_lengths
from pipeline.annotations.polygons import trace_polygons

DOCS = (Path(__file__).parent.parent / "docs" / "exports.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 images with two masks each and one without, in every format."""
    folder = tmp_path_factory.mktemp("exports")
    write_all(folder, size=(240, 320))
    return folder


@pytest.fixture(scope="module")
def truth(exported: Path) -> Truth:
    return read_truth(exported)


# There and back


@pytest.mark.parametrize(
    ("name", "reader", "read", "how"), TOLD, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_masks_come_back(
    name: str, reader: str, read: Any, how: str, exported: Path, truth: Truth
) -> None:
    ious = compare(truth, read(exported / name), how)
    if name == "yolo":
        assert np.mean(ious) >= 0.999
        assert min(ious) >= 0.995
    else:
        assert min(ious) == 1
    assert len(ious) >= 35


def test_coco_is_what_evaluation_and_trainers_expect(exported: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(exported / "coco/annotations/instances_train.json"))
    assert min(truth.anns) == 1 and min(truth.imgs) == 1 and min(truth.cats) == 1
    assert {a["iscrowd"] for a in truth.anns.values()} == {0}
    assert len(truth.imgs) == 26  # one has no annotation
    assert {a["image_id"] for a in truth.anns.values()} < set(truth.imgs)
    assert [c["name"] for c in truth.cats.values()] == [name for name, _ in CLASSES]
    for annotation in truth.anns.values():
        assert annotation["area"] == truth.annToMask(annotation).sum()
        assert annotation["score"] >= 0.5
    found = [dict(a) for a in truth.anns.values()]
    evaluation = COCOeval(truth, truth.loadRes(found), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_are_those_of_the_compressed_counts(seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random((random.integers(1, 90), random.integers(1, 900))) > random.random()
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = run_lengths(rle["counts"].decode())
    assert sum(counts) == mask.size
    again = coco.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)
    assert again["counts"] == rle["counts"]


@pytest.mark.parametrize("seed", range(20))
def test_polygons_make_the_same_mask(seed: int) -> None:
    random = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(random.standard_normal((90, 120)).astype(np.float32), (0, 0), 2)
    mask = (noise > 0).astype(np.uint8)
    polygons, left_out = trace_polygons(mask)
    filled = np.zeros_like(mask)
    for polygon in polygons:
        cv2.fillPoly(filled, [polygon.astype(np.int32)], 1)
    parts, labels = cv2.connectedComponents(mask, connectivity=8)
    assert len(polygons) + left_out == parts - 1
    wrong = filled != mask
    # Besides the parts that are left out, a seam may graze a pixel.
    small = np.isin(labels, np.flatnonzero(np.bincount(labels.ravel()) < 8))
    assert (wrong & ~small).sum() <= 2


def test_parts_of_under_three_points_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros(SMALL, np.uint8)
    mask[3:9, 3:9] = 1
    mask[20, 20] = 1  # a point
    mask[30, 5:20] = 1  # a line
    alone = np.zeros(SMALL, np.uint8)
    alone[40, 40] = 1
    found = [(0, mask), (1, alone)]
    labels = write_labels(f"{tmp_path}/labels", [(image_row("a", 0, "k", SMALL), found)])
    assert export_labels(labels, f"{tmp_path}/yolo", "yolo") == 0
    said = capsys.readouterr().out
    assert "3 parts of under 3 points were left out, and with them 1 annotations" in said
    (text,) = Path(tmp_path, "yolo/labels/train").glob("*.txt")
    (line,) = text.read_text().splitlines()
    assert line.startswith("0 ")


def test_pixels_that_two_classes_claim_are_void(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right, same = (np.zeros(SMALL, np.uint8) for _ in range(3))
    left[:, :30], right[:, 20:], same[:10, :25] = 1, 1, 1
    found = [(0, left), (1, right), (0, same)]
    labels = write_labels(f"{tmp_path}/labels", [(image_row("a", 0, "k", SMALL), found)])
    for form, files in (("voc", "SegmentationClass/*.png"), ("png", "train/masks/*.png")):
        assert export_labels(labels, f"{tmp_path}/{form}", form) == 0
        assert f"{SMALL[0] * 10} pixels that two classes claim" in capsys.readouterr().out
        (path,) = Path(tmp_path, form).glob(files)
        pixels = np.array(Image.open(path))
        assert np.array_equal(np.unique(pixels), [1, 2, 255])
        assert (pixels == 255)[:, 20:30].all()
        assert (pixels == 255).sum() == SMALL[0] * 10


def test_many_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = [(f"c{i}", None) for i in range(300)]
    mask = np.ones(SMALL, np.uint8)
    images = [(image_row("a", 0, "k", SMALL), [(299, mask)])]
    labels = write_labels(f"{tmp_path}/labels", images, classes=classes)
    assert export_labels(labels, f"{tmp_path}/voc", "voc") == 2
    assert "at most 254 classes, not 300" in capsys.readouterr().err
    assert export_labels(labels, f"{tmp_path}/png", "png") == 0
    (path,) = Path(tmp_path, "png").glob("train/masks/*.png")
    assert (np.array(Image.open(path)) == 300).all()
    for form in FORMATS:
        assert form == "voc" or export_labels(labels, f"{tmp_path}/{form}-2", form) == 0


def test_the_palette_is_that_of_the_devkit() -> None:
    from pipeline.annotations.maps import voc_palette

    palette = np.array(voc_palette()).reshape(256, 3).tolist()
    # aeroplane, bicycle, bird, boat, bottle, ..., tv/monitor, void
    assert palette[:6] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128],
                           [128, 0, 128]]  # fmt: skip
    assert palette[20] == [0, 64, 128]
    assert palette[255] == [224, 224, 192]


# The documents


def blocks(form: str, language: str) -> list[str]:
    """The blocks of code in a section of docs/exports.md."""
    section = DOCS.split(f"\n## {form}\n")[1].split("\n## ")[0] if form else DOCS
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def run_code(code: str, dest: Path, **names: str) -> dict[str, Any]:
    for name, value in {**names, "DEST": str(dest)}.items():
        code = code.replace(name, value)
    found: dict[str, Any] = {}
    exec(code, found)
    return found


def test_code_in_the_documents_opens_the_exports(exported: Path, truth: Truth) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        (code,) = blocks("coco", "python")
        mask = run_code(code, exported / "coco")["mask"]
    assert any(np.array_equal(mask, m) for found in truth.values() for _, m in found)
    (code,) = blocks("voc", "python")
    name = next(iter(truth))
    assert run_code(code, exported / "voc", NAME=name)["classes"].shape == mask.shape


def test_sam_takes_the_prompts_as_the_documents_have_it(exported: Path, tmp_path: Path) -> None:
    import torch
    from transformers import SamConfig, SamModel, SamProcessor
    from transformers.models.sam.configuration_sam import (
        SamMaskDecoderConfig,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    torch.manual_seed(0)
    small = {"hidden_size": 8, "mlp_dim": 8}
    vision = SamVisionConfig(
        **small,
        output_channels=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_pos_feats=4,
        global_attn_indexes=[],
    )
    decoder = SamMaskDecoderConfig(
        **small, num_attention_heads=1, iou_head_hidden_dim=8, attention_downsample_rate=1
    )
    prompts = SamPromptEncoderConfig(hidden_size=8, mask_input_channels=4)
    config = SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    model, processor = SamModel(config).eval(), SamProcessor(SamImageProcessorPil())
    (code,) = blocks("sam", "python")
    code = re.sub(r"^(model|processor) = .*\n", "", code, flags=re.MULTILINE)
    code = re.sub(r"^( +)for row in .*", r"\1for row in batch.to_pylist()[:1]:", code, flags=re.M)
    code = code.replace("iter_batches(16):", "iter_batches(49):").replace("DEST", f"{exported}/sam")
    seen: dict[str, Any] = {"model": model, "processor": processor}
    exec(code, seen)
    assert seen["mask"].shape == (1, 1, 240, 320)
    with torch.no_grad():
        bare = model(**seen["inputs"], multimask_output=False)
    assert not torch.equal(seen["found"].pred_masks, bare.pred_masks)


def test_sam_prompts_lie_where_the_masks_are(exported: Path, truth: Truth) -> None:
    table = pq.read_table(exported / "sam/prompts/train-00000.parquet").to_pylist()
    for row in table:
        _, mask = truth[Path(row["file_name"]).stem][row["instance"]]
        x0, y0, x1, y1 = map(int, row["box"])
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert row["point_labels"] == [1, 0]
        for (x, y), label in zip(row["points"], row["point_labels"], strict=True):
            assert mask[int(y), int(x)] == label
        logits = np.array(row["mask_logits"], np.float32).reshape(256, 256)
        # 320 pixels on 256 cells: 5 pixels are 4 cells.
        height, width = mask.shape
        cells = logits[: height * 256 // width].repeat(5, 0).repeat(5, 1)
        cells = cells.reshape(height, 4, width, 4).mean((1, 3))
        assert ((cells > 0) == mask).mean() > 0.98
        assert (logits[height * 256 // width :] == -8).all()


def test_hostile_names_of_classes(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    names = ['"/><script>alert(1)</script>', "a\x00b\x1b[31m\ud7ff", "]]>&amp;\n# :no", "yes"]
    mask = np.ones(SMALL, np.uint8)
    images = [(image_row("a", 0, names[0], SMALL), [(i, mask) for i in range(4)])]
    labels = write_labels(f"{tmp_path}/l", images, classes=[(name, None) for name in names])
    for form in FORMATS:
        assert export_labels(labels, f"{tmp_path}/{form}", form) == 0
    root = ElementTree.parse(tmp_path / "cvat/annotations_train.xml").getroot()
    assert len(list(root.iter("mask"))) == 4
    assert next(n.text for n in root.iter("name")) == names[0]
    labels = ElementTree.parse(tmp_path / "labelstudio/config.xml").getroot().iter("Label")
    assert len(list(labels)) == 4
    import yaml

    data = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text(encoding="utf-8"))
    assert list(data["names"].values()) == names


def test_scores_are_kept_where_there_is_a_place(exported: Path) -> None:
    from xml.etree import ElementTree

    wanted = [0.5, 0.51] * 25
    content = read_json(str(exported / "coco/annotations/instances_train.json"))
    assert [a["score"] for a in content["annotations"]] == wanted
    shapes = [read_json(str(p))["shapes"] for p in sorted((exported / "labelme").glob("*/*.json"))]
    assert [shape["score"] for some in shapes for shape in some] == wanted
    tasks = read_json(str(exported / "labelstudio/tasks/train-00000.json"))
    found = [r["score"] for t in tasks for p in t["predictions"] for r in p["result"]]
    assert found == wanted
    root = ElementTree.parse(exported / "cvat/annotations_train.xml").getroot()
    assert [float(a.text or "") for a in root.iter("attribute") if a.get("name")] == wanted
    for path in ("hf/data", "sam/prompts"):
        rows = pq.read_table(exported / path / "train-00000.parquet").to_pylist()
        scores = [i["score"] for r in rows for i in r.get("instances", [r])]
        assert scores == pytest.approx(wanted)
