"""Exports as the tools' own libraries read them, or as their reading is told here where a package
is large: IoU with the masks that went in.

    python tests/export_table.py write FOLDER    # with this project installed
    python tests/export_table.py read FOLDER     # anywhere: what can be imported there reads

A reader takes the folder of an export and yields (name of the image, class, mask).
"""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from PIL import Image

Read = Iterator[tuple[str, str, np.ndarray]]
SPLIT = "train"


def stem(file: str) -> str:
    return Path(file).stem


# COCO


def coco_pycocotools(dest: Path) -> Read:
    from pycocotools.coco import COCO

    coco = COCO(str(dest / f"annotations/instances_{SPLIT}.json"))
    for annotation in coco.loadAnns(coco.getAnnIds(iscrowd=0)):
        (image,) = coco.loadImgs(annotation["image_id"])
        (category,) = coco.loadCats(annotation["category_id"])
        yield stem(image["file_name"]), category["name"], coco.annToMask(annotation)


def coco_torchvision(dest: Path) -> Read:
    """torchvision's references/detection/coco_utils.py, on `--counts list`."""
    from pycocotools import mask as coco_mask

    content = json.loads((dest / f"annotations/instances_{SPLIT}.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for a in content["annotations"]:
        image = images[a["image_id"]]
        rles = coco_mask.frPyObjects(a["segmentation"], image["height"], image["width"])
        mask = coco_mask.decode(rles)
        mask = mask[..., None] if mask.ndim < 3 else mask
        yield stem(image["file_name"]), names[a["category_id"]], mask.any(axis=2)


def coco_supervision(dest: Path) -> Read:
    import supervision

    yield from _supervision(
        supervision.DetectionDataset.from_coco(
            images_directory_path=str(dest / f"images/{SPLIT}"),
            annotations_path=str(dest / f"annotations/instances_{SPLIT}.json"),
            force_masks=True,
        )
    )


def _supervision(data) -> Read:
    for path, _, found in data:
        for i in range(len(found)):
            yield stem(path), data.classes[found.class_id[i]], found.mask[i]


# YOLO


def _yolo(dest: Path, to_pixels: Callable[[np.ndarray, tuple[int, int]], np.ndarray]) -> Read:
    import yaml

    names = yaml.safe_load((dest / "data.yaml").read_text(encoding="utf-8"))["names"]
    for path in sorted((dest / f"labels/{SPLIT}").glob("*.txt")):
        (picture,) = (dest / f"images/{SPLIT}").glob(f"{path.stem}.*")
        with Image.open(picture) as image:
            size = (image.height, image.width)
        for line in path.read_text().splitlines():
            numbers = line.split()
            points = np.array(numbers[1:], np.float32).reshape(-1, 2)
            assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
            yield path.stem, names[int(numbers[0])], to_pixels(points, size)


def yolo_ultralytics(dest: Path) -> Read:
    """Ultralytics 8.4: data/dataset.py update_labels_info, ops.resample_segments, and
    data/utils.py polygon2mask: resampled to 1,000 points or one more than there are, scaled, cut
    to whole numbers, filled."""

    def read(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        n = 1000 if len(points) <= 1000 else len(points) + 1
        closed = np.concatenate([points, points[:1]])
        at = np.arange(len(closed))
        x = np.linspace(0, len(closed) - 1, n - len(closed) if len(closed) < n else n)
        x = np.insert(x, np.searchsorted(x, at), at) if len(closed) < n else x
        many = np.stack([np.interp(x, at, closed[:, i]) for i in range(2)], 1).astype(np.float32)
        scaled = many * np.array(size[::-1], np.float32)
        mask = np.zeros(size, np.uint8)
        return cv2.fillPoly(mask, [scaled.astype(np.int32)], 1)

    return _yolo(dest, read)


def yolo_rounded(dest: Path) -> Read:
    """supervision 0.31: dataset/formats/yolo.py: scaled, rounded, filled."""

    def read(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        scaled = np.round(points * np.array(size[::-1])).astype(np.int32)
        return cv2.fillPoly(np.zeros(size, np.uint8), [scaled], 1)

    return _yolo(dest, read)


def yolo_supervision(dest: Path) -> Read:
    import supervision

    yield from _supervision(
        supervision.DetectionDataset.from_yolo(
            images_directory_path=str(dest / f"images/{SPLIT}"),
            annotations_directory_path=str(dest / f"labels/{SPLIT}"),
            data_yaml_path=str(dest / "data.yaml"),
            force_masks=True,
        )
    )


# VOC


def _palette_map(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


def voc_pillow(dest: Path) -> Read:
    lines = (dest / "labelmap.txt").read_text(encoding="utf-8").splitlines()[1:]
    names = [line.split(":")[0] for line in lines]
    for name in (dest / f"ImageSets/Segmentation/{SPLIT}.txt").read_text().split():
        classes = _palette_map(dest / f"SegmentationClass/{name}.png")
        objects = _palette_map(dest / f"SegmentationObject/{name}.png")
        for number in range(1, int(objects.max(initial=0)) + 1):
            inside = objects == number
            (value,) = np.unique(classes[inside])
            yield name, names[value], inside


def voc_datumaro(dest: Path) -> Read:
    yield from _datumaro(dest, "voc_segmentation")


def _datumaro(dest: Path, form: str) -> Read:
    import datumaro

    data = datumaro.Dataset.import_from(str(dest), form)
    labels = data.categories()[datumaro.AnnotationType.label]
    for item in data:
        for a in sorted(item.annotations, key=lambda a: (a.group, a.id)):
            if a.type == datumaro.AnnotationType.mask:
                yield stem(item.id), labels[a.label].name, np.asarray(a.image)


# LabelMe


def labelme_told(dest: Path) -> Read:
    """LabelMe 6.3: _label_file.py and utils/shape.py: the mask is pasted at the first corner; the
    second corner is inside the box."""
    for path in sorted((dest / SPLIT).glob("*.json")):
        content = json.loads(path.read_text())
        assert (path.parent / content["imagePath"]).is_file()
        for shape in content["shapes"]:
            assert shape["shape_type"] == "mask"
            crop = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
            assert crop.dtype == np.bool_
            (x1, y1), (x2, y2) = np.asarray(shape["points"]).astype(int)
            mask = np.zeros((content["imageHeight"], content["imageWidth"]), np.bool_)
            mask[y1 : y2 + 1, x1 : x2 + 1] = crop
            yield path.stem, shape["label"], mask


def labelme_itself(dest: Path) -> Read:
    """Its own loader and rasteriser, a shape at a time."""
    import labelme.utils

    try:
        from labelme._label_file import LabelFile
    except ImportError:
        from labelme.label_file import LabelFile

    for path in sorted((dest / SPLIT).glob("*.json")):
        content = LabelFile(str(path))
        size = np.array(Image.open(path.parent / content.imagePath)).shape
        for shape in content.shapes:
            label, _ = labelme.utils.shapes_to_label(size, [shape], {shape["label"]: 1})
            yield path.stem, shape["label"], label == 1


# Label Studio


def _label_studio(dest: Path, decode: Callable[[list[int]], np.ndarray]) -> Read:
    for path in sorted((dest / "tasks").glob(f"{SPLIT}-*.json")):
        for task in json.loads(path.read_text()):
            for prediction in task["predictions"]:
                for result in prediction["result"]:
                    flat = np.asarray(decode(result["value"]["rle"]))
                    size = (result["original_height"], result["original_width"], 4)
                    pixels = flat.reshape(size)
                    assert set(np.unique(pixels)) <= {0, 255}
                    (name,) = result["value"]["brushlabels"]
                    yield stem(task["data"]["image"]), name, pixels[..., 3] > 0


def decode_brush(rle: list[int]) -> np.ndarray:
    """Label Studio's decoder (label_studio_sdk/converter/brush.py decode_rle), bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    at = 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    out = np.zeros(total, np.uint8)
    i = 0
    while i < total:
        is_run = take(1)
        end = i + 1 + take(sizes[take(2)])
        if is_run:
            out[i:end] = take(word)
            i = end
        else:
            while i < end:
                out[i] = take(word)
                i += 1
    return out


def labelstudio_told(dest: Path) -> Read:
    return _label_studio(dest, decode_brush)


def labelstudio_sdk(dest: Path) -> Read:
    """Its decoder; its validators on the config and on every prediction first."""
    from label_studio_sdk.converter import brush
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((dest / "config.xml").read_text(encoding="utf-8"))
    interface.validate()
    for path in sorted((dest / "tasks").glob("*.json")):
        for task in json.loads(path.read_text()):
            for prediction in task["predictions"]:
                problems = interface.validate_prediction(prediction, return_errors=True)
                assert not problems, problems
    yield from _label_studio(dest, brush.decode_rle)


# CVAT


def cvat_sdk(dest: Path) -> Read:
    from cvat_sdk import masks

    root = ElementTree.parse(dest / f"annotations_{SPLIT}.xml").getroot()
    for image in root.iter("image"):
        size = {n: int(image.get(n, "")) for n in ("width", "height")}
        for mask in image.iter("mask"):
            runs = [int(n) for n in mask.get("rle", "").split(",")]
            left, top, width, height = (
                int(mask.get(n, "")) for n in ("left", "top", "width", "height")
            )
            points = [*runs, left, top, left + width - 1, top + height - 1]
            bitmap = masks.decode_mask(
                points, image_width=size["width"], image_height=size["height"]
            )
            yield stem(image.get("name", "")), mask.get("label", ""), bitmap


def cvat_datumaro(dest: Path) -> Read:
    """Its reader wants the XML and the images in one folder, and CVAT's own names."""
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(dest / f"annotations_{SPLIT}.xml", Path(folder, "annotations.xml"))
        shutil.copytree(dest / f"images/{SPLIT}", Path(folder, "images"))
        yield from _datumaro(Path(folder), "cvat")


# PNG, Hugging Face


def _by_class(name: str, classes: np.ndarray, names: list[str]) -> Read:
    for i, label in enumerate(names, 1):
        if (classes == i).any():
            yield name, label, classes == i


def png_pillow(dest: Path) -> Read:
    names = [c["name"] for c in json.loads((dest / "classes.json").read_text())["classes"]]
    for path in sorted((dest / f"{SPLIT}/masks").glob("*.png")):
        with Image.open(path) as image:
            yield from _by_class(path.stem, np.array(image), names)


def png_imagefolder(dest: Path) -> Read:
    names = [c["name"] for c in json.loads((dest / "classes.json").read_text())["classes"]]
    for row in _datasets("imagefolder", dest):
        name = stem(row["image"].filename)
        yield from _by_class(name, np.array(row["label"]), names)


def hf_map(dest: Path) -> Read:
    data = _datasets(None, dest)
    names = data.features["instances"].feature["class_id"].names
    for row in data:
        assert row["image"].size == row["annotation"].size
        yield from _by_class(stem(row["file_name"]), np.array(row["annotation"]), names)


def hf_instances(dest: Path) -> Read:
    from pycocotools import mask as coco

    data = _datasets(None, dest)
    names = data.features["instances"].feature["class_id"].names
    for row in data:
        for instance in row["instances"]:
            mask = coco.decode({**instance["rle"]})
            yield stem(row["file_name"]), names[instance["class_id"]], mask


def _datasets(kind: str | None, dest: Path):
    import tempfile

    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        place = {"path": kind, "data_dir": str(dest)} if kind else {"path": str(dest)}
        return datasets.load_dataset(**place, split=SPLIT, cache_dir=cache, keep_in_memory=True)


Reader = tuple[str, str, Callable[[Path], Read], str]
# Folder of the export, reader, function, what is compared: "instances" one by one in their order,
# "classes" together, as a map has no instances, "parts" together, as an instance may be several.
TOLD: list[Reader] = [
    ("coco", "pycocotools", coco_pycocotools, "instances"),
    ("coco-list", "torchvision's loader", coco_torchvision, "instances"),
    ("yolo", "Ultralytics' parsing", yolo_ultralytics, "parts"),
    ("yolo", "supervision's parsing", yolo_rounded, "parts"),
    ("voc", "Pillow", voc_pillow, "instances"),
    ("labelme", "LabelMe's loader", labelme_told, "instances"),
    ("labelstudio", "Label Studio's decoder", labelstudio_told, "instances"),
    ("cvat", "cvat_sdk", cvat_sdk, "instances"),
    ("png", "Pillow", png_pillow, "classes"),
    ("png", "datasets imagefolder", png_imagefolder, "classes"),
    ("hf", "datasets, annotation", hf_map, "classes"),
    ("hf", "datasets, instances", hf_instances, "instances"),
]
LARGE: list[Reader] = [
    ("coco", "supervision", coco_supervision, "instances"),
    ("yolo", "supervision", yolo_supervision, "parts"),
    ("voc", "datumaro", voc_datumaro, "instances"),
    ("cvat", "datumaro", cvat_datumaro, "instances"),
    ("labelme", "labelme", labelme_itself, "instances"),
    ("labelstudio", "label_studio_sdk", labelstudio_sdk, "instances"),
]

Truth = dict[str, list[tuple[str, np.ndarray]]]


def compare(truth: Truth, found: Read, how: str) -> list[float]:
    """The IoU of each mask that went in with what came back, 0 for one that did not."""
    back: Truth = defaultdict(list)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        for name, label, mask in found:
            back[name].append((label, np.asarray(mask) > 0))
    assert back.keys() <= truth.keys(), "images that were not there"
    ious = []
    for name, masks in truth.items():
        ours, theirs = masks, back[name]
        if how != "instances":
            ours, theirs = _together(ours), _together(theirs)
        assert [label for label, _ in ours] == [label for label, _ in theirs], name
        ious += [
            float((a & b).sum() / (a | b).sum())
            for (_, a), (_, b) in zip(ours, theirs, strict=True)
        ]
    return ious


def _together(masks: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    found: dict[str, np.ndarray] = {}
    for label, mask in masks:
        found[label] = found[label] | mask if label in found else mask
    return sorted(found.items())
