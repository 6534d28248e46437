"""Corrections made in Label Studio and CVAT come back as ground truth, to the pixel; hostile files
are one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from cvat_sdk.masks import decode_mask, encode_mask
from pycocotools import mask as coco

from jobs import evaluate
from pipeline.annotations.truth import Matcher
from pipeline.annotations.truth_files import open_truth
from pipeline.errors import UsageError
from tests.label_tables import CLASSES, Found, export_labels, image_row, random_blobs, write_labels

SIZE = (48, 64)
NAMES = [name for name, _ in CLASSES]
KEYS = ["a/1", "a/2", "b/3", "b/4"]


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[str, list[list[Found]]]:
    """Labels of four images, and their masks; the last image has none."""
    rows = [image_row("s.tar", i, key, SIZE) for i, key in enumerate(KEYS)]
    found = [*(random_blobs(i, SIZE, count=3) for i in range(3)), []]
    return write_labels(f"{tmp_path}/labels", list(zip(rows, found, strict=True))), found


def correct(random: np.random.Generator, found: list[list[Found]]) -> list[list[Found]]:
    """A person deletes a mask of the first image, draws anew one of the second, changes the class
    of one of the third, and adds one to the last."""
    drawn = (random.random(SIZE) < 0.3).astype(np.uint8)
    renamed = (found[2][0][0] + 1) % len(NAMES)
    return [
        found[0][1:],
        [(found[1][0][0], drawn), *found[1][1:]],
        [(renamed, found[2][0][1]), *found[2][1:]],
        [(1, np.roll(drawn, 5, 1))],
    ]


def check(labels: str, truth: str, found: list[list[Found]], wanted: list[list[Found]]) -> None:
    """Figures of `evaluate` are those of the masks counted by hand."""
    out = Path(labels).parent / "evaluation"
    assert evaluate.main([labels, "--ground-truth", truth, "--output", str(out)]) == 0
    rows = {r["class"]: r for r in pq.read_table(out / "evaluation.parquet").to_pylist()}
    for class_id, name in enumerate(NAMES):
        one, other = (np.stack([union(f, class_id) for f in some]) for some in (found, wanted))
        assert rows[name]["iou"] == (one & other).sum() / (1 + (one | other).sum())
        assert rows[name]["images_present"] == other.any((1, 2)).sum()
        absent = ~other.any((1, 2))
        assert rows[name]["absent_found"] == (one.any((1, 2)) & absent).sum()
    assert 0.2 < rows[None]["miou"] < 0.95
    assert rows[None]["images"] == len(KEYS) * len(NAMES)
    assert 0 < rows[None]["coco_ap"] < 1


def union(found: list[Found], class_id: int) -> np.ndarray:
    masks = [mask for each, mask in found if each == class_id]
    return np.logical_or.reduce([np.zeros(SIZE, bool), *masks])


# ---- Label Studio


def brush_as_studio(mask: np.ndarray) -> list[int]:
    """The SDK's encoder (label_studio_sdk/converter/brush.py, encode_rle), said again: a bit for
    each bit, runs of equal bytes of RGBA, and bytes one by one where they do not repeat."""
    data = np.repeat((mask.ravel() > 0) * 255, 4).tolist()
    sizes = [3, 4, 8, 16]
    bits = f"{len(data):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    while at < len(data):
        end = at
        while end < len(data) and data[end] == data[at] and end - at < 2**16:
            end += 1
        kind = next(k for k, size in enumerate(sizes) if end - at <= 2**size)
        bits += f"1{kind:02b}{end - at - 1:0{sizes[kind]}b}{data[at]:08b}"
        at = end
    bits += "0" * (8 - len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def result_of(value: dict[str, Any], kind: str, name: str, **more: Any) -> dict[str, Any]:
    shown = {"type": kind, "value": value | {kind: [name]}, "from_name": "label"}
    return shown | {"original_height": SIZE[0], "original_width": SIZE[1]} | more


def test_corrections_made_in_label_studio(
    labelled: tuple[str, list[list[Found]]], tmp_path: Path
) -> None:
    labels, found = labelled
    wanted = correct(np.random.default_rng(7), found)
    assert export_labels(labels, f"{tmp_path}/studio", "labelstudio") == 0
    tasks = json.loads((tmp_path / "studio/tasks/train-00000.json").read_text())
    for task in tasks:
        result = task.pop("predictions")[0]["result"]
        before, after = found[task["data"]["row"]], wanted[task["data"]["row"]]
        kept = [r for r, f in zip(result, before, strict=True) if any(f is w for w in after)]
        anew = [
            result_of({"format": "rle", "rle": brush_as_studio(mask)}, "brushlabels", NAMES[c])
            for c, mask in after
            if not any(mask is m for c_, m in before if c_ == c)
        ]
        task["annotations"] = [{"was_cancelled": False, "result": [*kept, *anew]}]
    (tmp_path / "studio.json").write_text(json.dumps(tasks))
    check(labels, str(tmp_path / "studio.json"), found, wanted)


def studio(tmp_path: Path, *results: dict[str, Any]) -> str:
    task = {"data": {"image": "/data/?d=a/1.jpg"}, "annotations": [{"result": list(results)}]}
    (tmp_path / "studio.json").write_text(json.dumps([task]))
    return str(tmp_path / "studio.json")


@pytest.mark.parametrize("angle", [0, 30, 355])
def test_rectangles_and_ellipses_of_label_studio(angle: int, tmp_path: Path) -> None:
    """Corners as its converter has them (label_studio_sdk/converter/utils.py,
    convert_annotation_to_yolo_obb), rasterised by pycocotools; an ellipse by OpenCV."""
    box = {"x": 30, "y": 20, "width": 40, "height": 25, "rotation": angle}
    x, y, w, h = (box[n] / 100 * s for n, s in zip(box, (64, 48, 64, 48), strict=False))
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = [x, y, x + w * c, y + w * s, x + w * c - h * s, y + w * s + h * c]
    corners += [x - h * s, y + h * c]
    round_ = {"x": 50, "y": 50, "radiusX": 30, "radiusY": 15, "rotation": angle}
    truth = open_truth(
        studio(
            tmp_path,
            result_of(box, "rectanglelabels", "box"),
            result_of(round_, "ellipselabels", "round"),
        )
    )
    wanted = coco.decode(coco.frPyObjects([corners], *SIZE))[..., 0]
    assert (wanted == truth.read(0).mask_at("box", SIZE).T).all()
    grown = np.zeros((480, 640), np.uint8)
    cv2.ellipse(grown, (320, 240), (192, 72), angle, 0, 360, 1, -1)
    by_cv2 = grown[5::10, 5::10] > 0
    ours = truth.read(0).mask_at("round", SIZE).T
    assert (ours & by_cv2).sum() / (ours | by_cv2).sum() > 0.97


def test_what_label_studio_holds_beside_areas_is_told(tmp_path: Path) -> None:
    box = {"x": 0, "y": 0, "width": 50, "height": 50}
    truth = open_truth(
        studio(
            tmp_path,
            result_of(box, "labels", "box"),  # <Rectangle> with <Labels>
            result_of(box, "rectangle", ""),
            {"type": "choices", "value": {"choices": ["good"]}},
            {"type": "keypointlabels", "value": {"x": 1, "y": 2, "keypointlabels": ["box"]}},
        )
    )
    assert truth.classes == ["box"]
    assert truth.read(0).mask_at("box", SIZE).sum() == 24 * 32
    assert truth.notes == (
        "1 results of type choices are left out: no area of a class",
        "1 results of type keypointlabels are left out: no area of a class",
    )


@pytest.mark.parametrize(
    ("value", "more", "says"),
    [
        ({"x": "?", "y": 0, "width": 5, "height": 5}, {}, "coordinates that are no numbers"),
        ({"x": 0, "y": 0, "width": 1e300, "height": 5}, {}, "no places in an image"),
        ({"x": 0, "y": 0, "width": 5, "height": None}, {}, "coordinates that are no numbers"),
        ({"points": [[1, 2], [3]]}, {}, r"points are no \[x, y\]"),
        ({"points": "ab"}, {}, r"points are no \[x, y\]"),
        ({"rle": [1, 2, 3]}, {}, "a brush mask that is no RLE of 48 x 64"),
        ({"points": [[0, 0]] * 3}, {"image_rotation": 90}, "was turned in Label Studio"),
        ({"points": [[0, 0]] * 3}, {"original_width": 10**9}, "is too large"),
        ({"points": [[0, 0]] * 3}, {"original_width": None}, "must be whole numbers above 0"),
    ],
)
def test_damaged_results_are_one_line(
    value: dict[str, Any], more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = studio(tmp_path, result_of(value, "rectanglelabels", "a") | more)
    with pytest.raises(UsageError, match=says) as caught:
        open_truth(file).read(0)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("annotations", [3, {"a": 1}, [{"result": 3}], [{"result": [3]}]])
def test_tasks_that_are_none_are_one_line(annotations: Any, tmp_path: Path) -> None:
    content = [{"data": {"image": "a.jpg"}, "annotations": annotations}]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="annotations that are not as Label Studio exports them"):
        open_truth(str(tmp_path / "x.json"))


# ---- CVAT


def as_cvat(mask: np.ndarray, name: str) -> ElementTree.Element:
    """A mask as CVAT writes it, from its own encoder: runs, then the box with inclusive ends."""
    *runs, left, top, right, bottom = map(int, encode_mask(mask > 0))
    place = {"left": left, "top": top, "width": right - left + 1, "height": bottom - top + 1}
    attributes = {"label": name, "rle": ", ".join(map(str, runs)), "source": "manual"}
    return ElementTree.Element("mask", attributes | {n: str(v) for n, v in place.items()})


def test_corrections_made_in_cvat(labelled: tuple[str, list[list[Found]]], tmp_path: Path) -> None:
    """The images go by the file names that the export gave them."""
    labels, found = labelled
    wanted = correct(np.random.default_rng(7), found)
    assert export_labels(labels, f"{tmp_path}/cvat", "cvat") == 0
    tree = ElementTree.parse(tmp_path / "cvat/annotations_train.xml")
    (index,) = (tmp_path / "cvat").glob("_images-*.parquet")
    rows = {r["file_name"]: r["row"] for r in pq.read_table(index).to_pylist()}
    for image in tree.iter("image"):
        before, after = (some[rows[image.get("name")]] for some in (found, wanted))
        for mask, each in zip(image.findall("mask"), before, strict=True):
            runs = [int(n) for n in mask.get("rle").split(",")]
            x, y, w, h = (int(mask.get(n)) for n in ("left", "top", "width", "height"))
            points = [*runs, x, y, x + w - 1, y + h - 1]
            theirs = decode_mask(points, image_width=SIZE[1], image_height=SIZE[0])
            assert (theirs == each[1]).all()
            if not any(each is w for w in after):
                image.remove(mask)
        image.extend(
            as_cvat(mask, NAMES[c])
            for c, mask in after
            if not any(mask is m for c_, m in before if c_ == c)
        )
    tree.write(tmp_path / "annotations.xml", encoding="utf-8", xml_declaration=True)
    check(labels, str(tmp_path / "annotations.xml"), found, wanted)


def cvat(folder: Path, inside: str, head: str = "", size: str = 'width="64" height="48"') -> str:
    (folder / "annotations.xml").write_text(
        f'<?xml version="1.0" encoding="utf-8"?>{head}<annotations><version>1.1</version>'
        "<meta><task><labels><label><name>sk&amp;y</name><attributes><attribute><name>score</name></attribute>"
        f"</attributes></label></labels></task></meta>"
        f'<image id="0" name="train/a/1.jpg" {size}>{inside}</image>'
        f'<image id="1" name="a/2.jpg" {size}/></annotations>',
        encoding="utf-8",
    )
    return str(folder / "annotations.xml")


@pytest.mark.parametrize("angle", [0, 30, 210.5])
def test_boxes_polygons_and_ellipses_of_cvat(angle: float, tmp_path: Path) -> None:
    """Boxes turn clockwise around their centre, as cv2.RotatedRect does."""
    file = cvat(
        tmp_path,
        f'<box label="b" xtl="20.5" ytl="14" xbr="40.25" ybr="30" rotation="{angle}"/>'
        '<polygon label="p &gt; q" points="1.5,2;30,4.25;20,40" z_order="1">'
        '<attribute name="x">1</attribute></polygon>'
        f'<ellipse label="e" cx="32" cy="24" rx="19.2" ry="7.2" rotation="{angle}"/>'
        '<mask label="e" rle="1" left="0" top="0" width="1" height="1"/>'  # CVAT's empty one
        '<polyline label="b" points="1,2;3,4"/><tag label="b"/><tag label="c"/>',
    )
    truth = open_truth(file)
    assert truth.classes == ["b", "e", "p > q", "sk&y"]
    assert truth.notes == (
        "1 elements <polyline> are left out: no areas",
        "2 elements <tag> are left out: no areas",
    )
    image = truth.read(0)
    assert [each.name for each in image.instances] == ["b", "p > q", "e"]
    corners = cv2.boxPoints(((30.375, 22.0), (19.75, 16.0), angle)).astype(float)
    by_box = coco.decode(coco.frPyObjects([corners.ravel().tolist()], *SIZE))[..., 0]
    assert (by_box != image.mask_at("b", SIZE).T).sum() <= 1  # float32 corners
    points = [1.5, 2, 30, 4.25, 20, 40]
    by_points = coco.decode(coco.frPyObjects([points], *SIZE))[..., 0]
    assert (by_points == image.mask_at("p > q", SIZE).T).all()
    grown = np.zeros((480, 640), np.uint8)
    cv2.ellipse(grown, (320, 240), (192, 72), angle, 0, 360, 1, -1)
    ours, by_cv2 = image.mask_at("e", SIZE).T, grown[5::10, 5::10] > 0
    assert (ours & by_cv2).sum() / (ours | by_cv2).sum() > 0.97
    assert truth.read(1).size == SIZE and truth.read(1).instances == ()
    assert Matcher(truth).find("s", 0, ("a/2", "a/2.jpg")) == 1


MASK = '<mask label="a" left="{}" top="{}" width="{}" height="{}" rle="{}"/>'


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        (MASK.format(0, 0, 2, 2, "1, 2"), "mask 0: an rle whose runs are not of 2 x 2 px"),
        (MASK.format(0, 0, 2, 2, "5, -1"), "an rle whose runs"),
        (MASK.format(0, 0, 2, 2, "x"), "an rle whose runs"),
        (MASK.format(0, 0, 2, 2, "9" * 5000), "an rle whose runs"),
        (MASK.format(63, 0, 2, 2, "0, 4"), "a mask outside of its image of 48 x 64 px"),
        (MASK.format(-1, 0, 2, 2, "0, 4"), "a mask outside of its image"),
        (MASK.format(0, 0, 10**6, 10**6, f"0, {10**12}"), "a mask outside of its image"),
        (MASK.format(0.5, 0, 2, 2, "0, 4"), "must be whole numbers"),
        ('<mask label="a" rle="1"/>', "coordinates that are no numbers"),
        ('<polygon label="a" points="1,2;3"/>', "points that are no x,y"),
        ('<polygon label="a" points="1,2;3,nan;4,5"/>', "no places in an image"),
        ('<polygon label="a" points="1,2;3,4"/>', "a polygon needs 3 or more points"),
        ('<box label="a" xtl="1" ytl="2" xbr="inf" ybr="4"/>', "no places in an image"),
        ('<ellipse label="a" cx="1"/>', "coordinates that are no numbers"),
    ],
)
def test_damaged_shapes_are_one_line(inside: str, says: str, tmp_path: Path) -> None:
    file = cvat(tmp_path, inside)
    with pytest.raises(UsageError, match=says) as caught:
        open_truth(file).read(0)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ['width="64"', 'width="x" height="4"', 'width="0" height="4"'])
def test_images_without_a_size_are_one_line(size: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"image a/2\.jpg: "):
        open_truth(cvat(tmp_path, "", size=size)).read(1)
    with pytest.raises(UsageError, match="is too large"):
        open_truth(cvat(tmp_path, "", size='width="100000" height="100000"')).read(0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid XML"),
        ("<annotations><image>", "not valid XML"),
        ("<annotations></annotations>", "no <image> in it"),
        ("<html></html>", "begins with <html>"),
        ('<annotations><track id="1"/></annotations>', "is CVAT for video"),
        ("<annotations><image/></annotations>", "an image without a name"),
        ('<annotations><image name="a"><box/></image></annotations>', "or a label without one"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "has a DOCTYPE"),
        ("\udc80", "not valid XML"),
    ],
)
def test_what_is_no_cvat_file_is_one_line(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.xml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=says) as caught:
        open_truth(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
