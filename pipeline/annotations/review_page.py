"""The chosen images of a review -> a page: each with its classes over it, and why it was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image
from pycocotools import mask as coco

from pipeline.annotations.choose import ChosenImage, Mask
from pipeline.annotations.labelled import LabelledImage, read_classes, read_labels
from pipeline.annotations.review import Review
from pipeline.annotations.view import View, draw_page, draw_pictures
from pipeline.run.images import find_images
from pipeline.run.wanted_images import Place, read_wanted


def draw_review(labels: str, review: Review) -> tuple[str, list[str]]:
    """The HTML, and why images have no picture in it, once for each.

    Raises UsageError, JobError, StorageError.
    """
    classes = read_classes(labels)
    names = [each.name for each in classes]
    colors = {each.name: each.color for each in classes if each.color}
    images = {
        (image.shard, image.row): _chosen(image, names)
        for part, rows in review.chosen.items()
        for image in read_labels(labels, part, len(classes), rows)
    }

    def draw(place: Place, image: Image.Image) -> list[bytes] | str:
        return draw_pictures(images[place], image, colors)

    source = find_images(labels)
    pictures = read_wanted(source, set(images), draw)
    places = [(row["shard"], row["row"]) for row in review.rows]
    facts = {
        "images": f"{len(images):,} of {review.images:,}, the most doubtful first",
        "criteria": "share of pixels near the threshold; disagreement of a class's phrases; "
        "largest probability near the gate",
        "numbers": "size as height x width; p, largest probability; share of the image",
        "input": source.source,
        "labels": labels,
    }
    view = View(
        facts=facts,
        images=[images[place] for place in places],
        pictures=pictures,
        captions={},
        colors=colors,
        title="Images to review",
        lines={place: _why(row) for place, row in zip(places, review.rows, strict=True)},
    )
    return draw_page(view), [why for why in pictures.values() if isinstance(why, str)]


def _chosen(image: LabelledImage, names: list[str]) -> ChosenImage:
    """An image with a mask for each class, empty for an absent one."""
    size = (image.height, image.width)
    return ChosenImage(
        shard=image.shard,
        row=image.row,
        key=image.key,
        size=size,
        masks=[_mask(image, class_id, name, size) for class_id, name in enumerate(names)],
    )


def _mask(image: LabelledImage, class_id: int, name: str, size: tuple[int, int]) -> Mask:
    found = [each for each in image.instances if each.class_id == class_id]
    rle = coco.merge([each.rle for each in found]) if found else {"size": size, "counts": b""}
    return Mask(
        prompt_id=class_id,
        prompt=name,
        rle=rle,
        score=max((each.presence for each in found), default=0.0),
        share=float(coco.area(rle)) / (size[0] * size[1]) if found else 0.0,
    )


def _why(row: dict[str, Any]) -> str:
    return f"{row['rank']:,}. " + "; ".join(_reasons(row))


def _reasons(row: dict[str, Any]) -> Iterator[str]:
    if row["near_share"] > 0:
        share = f"{100 * row['near_share']:.1f} %"
        yield f"{share} of the pixels are near the threshold of {row['near_share_class']}"
    if row["disagreement"] > 0:
        of = row["disagreement_class"]
        yield f"the phrases of {of} disagree by {row['disagreement']:.2f}"
    if row["gate"] > 0:
        yield f"nearness of {row['gate_class']} to its gate {row['gate']:.2f}"
