"""Data sets of CLIPSeg's paper, in their own layouts -> samples, as its code makes them.

phrasecut  (datasets/phrasecut.py; Wu et al. 2020)   image_data_split3000.json, refer_test.json,
           images/<image_id>.jpg
pascal-5i  (datasets/pfe_dataset.py and PFENet's util/dataset.py)   val.txt or
           ImageSets/Segmentation/val.txt, JPEGImages/, SegmentationClassAug/ or SegmentationClass/
coco-20i   (datasets/coco_wrapper.py and HSNet's data/coco.py)   val2014/, annotations/val2014/
           with a number a pixel, 1 + the index among COCO's 80 classes

Shapes: (H, W) an image; S the side of the model's input.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.annotations.class_lists import COCO, PASCAL
from pipeline.annotations.polygon_mask import polygon_mask
from pipeline.config.reproduce import ReproduceConfig
from pipeline.errors import UsageError, one_line

VOID = 255
_LIMIT_JSON_BYTES = 2**30
_LIMIT_PX = 10**8
_EPISODES = 1000  # of a fold of coco-20i
_LEAST_PX = 2 * 32 * 32  # of a class, lest an image of pascal-5i has too little of it


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One image and what is looked for in it."""

    image: Image.Image
    """RGB."""
    fit: Literal["stretch", "pad", "resize"]
    """How it comes to S x S: see annotations.predict_episode."""
    truth: np.ndarray
    """uint8 where it is scored: 1, 0, or VOID."""
    of_class: int
    text: str
    example: tuple[Image.Image, np.ndarray] | None = None
    """An image and where it shows the class: (H, W) bool."""


@dataclass(kw_only=True)
class Fold:
    """Samples evaluated together."""

    name: str
    episodes: Callable[[], Iterator[Episode]]
    total: int
    notes: list[str] = field(default_factory=list)
    """On what was left out; complete once the episodes are through."""


def open_folds(config: ReproduceConfig, side: int) -> list[Fold]:
    """The folds of a data set, for a model of inputs (side, side). Raises UsageError."""
    folder = Path(config.data)
    if not folder.is_dir():
        raise UsageError(f"--data {config.data}: no such folder")
    if config.data_set == "phrasecut":
        return [_phrasecut(folder, side, config.limit)]
    if config.data_set == "pascal-5i":
        pairs = _list_pascal(folder)
        return [_pascal(pairs, fold, config) for fold in config.folds]
    of_class = _list_coco(folder)
    return [_coco(of_class, fold, side, config) for fold in config.folds]


# ---- phrasecut


def _phrasecut(folder: Path, side: int, limit: int | None) -> Fold:
    folder = folder / "VGPhraseCut_v0" if (folder / "VGPhraseCut_v0").is_dir() else folder
    images = {i.get("image_id"): i for i in _read_list(folder / "image_data_split3000.json")}
    tasks = [
        task
        for task in _read_list(folder / "refer_test.json")
        if images.get(task.get("image_id"), {}).get("split") == "test" and _has_area(task)
    ]
    tasks = tasks[:limit]
    found = Fold(name="test", episodes=lambda: iter(()), total=len(tasks))

    def read() -> Iterator[Episode]:
        others = 0
        for number, task in enumerate(tasks):
            where = f"{folder / 'refer_test.json'}: task {one_line(str(task.get('task_id')), 60)}"
            known = images[task["image_id"]]
            image = _read_image(folder / "images" / f"{int(task['image_id'])}.jpg")
            size = (known.get("height"), known.get("width"))
            if size != (image.height, image.width):  # 17 images of Visual Genome
                others += 1
                continue
            truth = _phrase_mask(task, (image.height, image.width), where)
            yield Episode(
                image=image,
                fit="stretch",
                truth=nearest(truth.astype(np.uint8), side),
                of_class=number,
                text=str(task.get("phrase")),
            )
        if others:
            found.notes.append(f"{others:,} phrases are of images of another size than is listed")

    found.episodes = read
    return found


def _has_area(task: dict[str, Any]) -> bool:
    boxes = task.get("instance_boxes")
    try:
        return sum(float(box[2]) * float(box[3]) for box in boxes or []) > 0
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UsageError("refer_test.json: instance_boxes that are no [x, y, w, h]") from error


def _phrase_mask(task: dict[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    try:
        for polygons in task["Polygons"]:
            for polygon in polygons:
                mask |= polygon_mask(np.array(polygon, np.float64).reshape(-1, 2), size)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"{where}: Polygons that are no lists of [x, y]") from error
    return mask


# ---- pascal-5i

Pair = tuple[Path, Path]
"""An image and its mask."""


def _list_pascal(folder: Path) -> list[Pair]:
    masks = folder / "SegmentationClassAug"
    masks = masks if masks.is_dir() else folder / "SegmentationClass"
    lists = (folder / "val.txt", folder / "ImageSets" / "Segmentation" / "val.txt")
    file = next((each for each in lists if each.is_file()), None)
    if file is None:
        raise UsageError(f"{folder}: has neither val.txt nor ImageSets/Segmentation/val.txt")
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    stems = [Path(line.split()[0]).stem for line in lines if line.strip()]  # both kinds of list
    return [(folder / "JPEGImages" / f"{s}.jpg", masks / f"{s}.png") for s in stems]


def _pascal(pairs: list[Pair], fold: int, config: ReproduceConfig) -> Fold:
    wanted = range(5 * fold + 1, 5 * fold + 6)
    listed: list[Pair] = []
    of_class: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        areas = np.bincount(_read_mask(pair[1]).ravel(), minlength=256)
        large = [c for c in wanted if areas[c] >= _LEAST_PX]
        listed += [pair] if large else []
        for c in large:
            of_class[c].append(pair)
    listed = listed[: config.limit]

    def read() -> Iterator[Episode]:
        chance = random.Random(f"{config.seed} {fold}")
        for pair in listed:
            mask = _read_mask(pair[1])
            chosen = chance.choice([c for c in wanted if (mask == c).any()])
            example = _choose_other(chance, of_class[chosen], pair)
            truth = np.where(mask == VOID, VOID, mask == chosen).astype(np.uint8)
            yield Episode(
                image=_read_image(pair[0]),
                fit="pad",
                truth=_pad_void(truth),
                of_class=chosen,
                text=f"a photo of a {PASCAL[chosen - 1]}.",
                example=_read_example(example, chosen, config) if example else None,
            )

    return Fold(name=f"fold {fold}", episodes=read, total=len(listed))


def _pad_void(truth: np.ndarray) -> np.ndarray:
    """A square of the longer side, with void below or to the right."""
    side = max(truth.shape)
    padded = np.full((side, side), VOID, np.uint8)
    padded[: truth.shape[0], : truth.shape[1]] = truth
    return padded


# ---- coco-20i


def _list_coco(folder: Path) -> dict[int, list[Pair]]:
    """The images with each class (0 to 79). HSNet's own lists are pickles, and not read."""
    masks = folder / "annotations" / "val2014"
    files = sorted(masks.glob("*.png"))
    if not files:
        raise UsageError(f"{masks}: no .png in it, the masks of coco-20i")
    of_class: dict[int, list[Pair]] = defaultdict(list)
    for file in files:
        for value in np.unique(_read_mask(file)).tolist():
            if 1 <= value <= len(COCO):
                pair = (folder / "val2014" / f"{file.stem}.jpg", file)
                of_class[value - 1].append(pair)
    return of_class


def _coco(of_class: dict[int, list[Pair]], fold: int, side: int, config: ReproduceConfig) -> Fold:
    wanted = [fold + 4 * v for v in range(len(COCO) // 4)]
    there = [c for c in wanted if len(of_class.get(c, ())) > 1]
    if not there:
        raise UsageError(f"--data {config.data}: no class of fold {fold} is in two images")
    total = config.limit or _EPISODES

    def read() -> Iterator[Episode]:
        chance = random.Random(f"{config.seed} {fold}")
        for _ in range(total):
            chosen = chance.choice(there)
            pair = chance.choice(of_class[chosen])
            example = _choose_other(chance, of_class[chosen], pair)
            yield Episode(
                image=_read_image(pair[0]),
                fit="resize",
                truth=nearest((_read_mask(pair[1]) == chosen + 1).astype(np.uint8), side),
                of_class=chosen,
                text=COCO[chosen],
                example=_read_example(example, chosen + 1, config) if example else None,
            )

    lacking = len(wanted) - len(there)
    notes = [f"fold {fold}: {lacking} classes are not in two images"] if lacking else []
    return Fold(name=f"fold {fold}", episodes=read, total=total, notes=notes)


# ---- all


def _choose_other(chance: random.Random, pairs: list[Pair], pair: Pair) -> Pair | None:
    others = [each for each in pairs if each != pair]
    return chance.choice(others) if others else None


def _read_example(
    pair: Pair, value: int, config: ReproduceConfig
) -> tuple[Image.Image, np.ndarray] | None:
    if config.kind == "text":
        return None
    return _read_image(pair[0]), _read_mask(pair[1]) == value


def nearest(mask: np.ndarray, side: int) -> np.ndarray:
    """A mask at (side, side), as torch's interpolate(mode="nearest") has it."""
    rows, columns = (np.arange(side) * n // side for n in mask.shape)
    return mask[np.ix_(rows, columns)]


def _read_image(file: Path) -> Image.Image:
    """RGB, as it is stored: these data sets take no notice of EXIF."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > _LIMIT_PX:
                raise UsageError(f"{file}: {image.height:,} x {image.width:,} px is too large")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file}: cannot be read ({one_line(str(error), 120)})") from error


def _read_mask(file: Path) -> np.ndarray:
    """(H, W) uint8: a number a pixel."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            if image.width * image.height > _LIMIT_PX or image.mode not in ("L", "P"):
                raise UsageError(f"{file}: is no mask of 8 bits and one channel")
            return np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file}: cannot be read ({one_line(str(error), 120)})") from error


def _read_list(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            data = stream.read(_LIMIT_JSON_BYTES + 1)
        content = json.loads(data) if len(data) <= _LIMIT_JSON_BYTES else None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not valid JSON: {one_line(str(error), 120)}") from error
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise UsageError(f"{file}: not a list of objects, or larger than 1 GiB")
    return content
