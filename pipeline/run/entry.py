"""The stages of the jobs for Ray Data pipelines of others: a lazy Dataset in, a lazy one out.

Every row of the input is one image, as encoded bytes or as decoded pixels. The user's Ray and its
DataContext stay as they are: nothing is started, run or set here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import ray
import ray.data

from pipeline.config.classify import ClassifyConfig
from pipeline.config.embed import EmbedConfig
from pipeline.config.options import ImageOptions, WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.infer.classify import ClassifyImages, open_classifier
from pipeline.infer.embed import EmbedImages, open_embedder
from pipeline.infer.segment import SegmentImages, open_segmenter
from pipeline.prepare.images import PrepareImages, fail_crashed_image
from pipeline.prepare.processor import ImageProcessor
from pipeline.run.columns import (
    InferBeside,
    MakeResults,
    PrepareRecords,
    check_columns,
    result_schema,
)
from pipeline.run.guard import guarded
from pipeline.run.package import check_workers
from pipeline.run.resources import share_cluster
from pipeline.schema import Table
from pipeline.write.rows import MakeEmbeddingRows, MakeLabelRows, MakeMaskRows

# CPUs that stay free for one task that reads and one that writes, which are the user's own.
SPARE_CPUS = 2.0
IMAGES_AT_ONCE = 32  # of a block, whose images are decoded and resized together

Device = Literal["auto", "cpu", "cuda"]
MAX_PIXELS = ImageOptions.max_pixels


# More arguments than a function should have: they are what help(segment) has to tell.
def segment(
    images: ray.data.Dataset,
    *,
    prompts: Sequence[str],
    model: str = SegmentConfig.model,
    image: str = "image",
    key: str | None = None,
    threshold: float = SegmentConfig.threshold,
    mask_size: Literal["image", "model"] = SegmentConfig.mask_size,
    max_pixels: int = MAX_PIXELS,
    device: Device = "auto",
    actors: int | None = None,
    batch_size: int | None = None,
) -> ray.data.Dataset:
    """Segment every image with every prompt: one row per image and prompt.

    `image` names the column of encoded bytes, or of uint8 pixels (H, W, 3), (H, W) or (H, W, 4);
    `key`, if given, a column that becomes the text column `key`. The other columns stand beside
    every row that comes of theirs. Columns that are added: prompt_id, prompt, height, width, rle,
    bbox, area, score_max, score_mean, threshold, as in the table `masks`; stage, reason, detail. An
    image that fails is one row with these three and nulls for the mask; they are null elsewhere.

    `device`, `actors` and `batch_size` as in WorkerOptions. Loads the model once, to encode the
    prompts. Raises UsageError for arguments, CheckpointError for a model, that cannot be used.
    """
    config = SegmentConfig(
        input="",
        output="",
        prompt=(prompts,) if isinstance(prompts, str) else tuple(prompts),
        model=model,
        threshold=threshold,
        mask_size=mask_size,
        images=ImageOptions(max_pixels=max_pixels),
        workers=WorkerOptions(device=device, actors=actors, batch_size=batch_size),
    ).resolve()
    spec = open_segmenter(model, list(config.prompt))
    _warn(spec.notes)
    tables = config.tables(spec.checkpoint.dimension, spec.checkpoint.weights_hash)
    return _compose(
        images,
        (image, key),
        (config.images, config.workers),
        (SegmentImages, spec, spec.checkpoint.processor),
        ("masks", tables, MakeMaskRows(config, tables, list(config.prompt), 0)),
    )


def embed(
    images: ray.data.Dataset,
    *,
    model: str = EmbedConfig.model,
    image: str = "image",
    key: str | None = None,
    normalize: bool = EmbedConfig.normalize,
    dtype: Literal["float32", "float16"] = EmbedConfig.dtype,
    max_pixels: int = MAX_PIXELS,
    device: Device = "auto",
    actors: int | None = None,
    batch_size: int | None = None,
) -> ray.data.Dataset:
    """Embed every image: one row per image, with `vector` as in the table `embeddings`.

    Columns, failures, the other arguments and the errors as in `segment`.
    """
    config = EmbedConfig(
        input="",
        output="",
        model=model,
        normalize=normalize,
        dtype=dtype,
        images=ImageOptions(max_pixels=max_pixels),
        workers=WorkerOptions(device=device, actors=actors, batch_size=batch_size),
    )
    spec = open_embedder(model, text=False, normalize=normalize, dtype=dtype)
    tables = config.tables(spec.checkpoint.dimension, spec.checkpoint.weights_hash)
    return _compose(
        images,
        (image, key),
        (config.images, config.workers),
        (EmbedImages, spec, spec.checkpoint.processor),
        ("embeddings", tables, MakeEmbeddingRows(tables["embeddings"].schema)),
    )


def classify(
    images: ray.data.Dataset,
    *,
    labels: Sequence[str] = (),
    templates: Sequence[str] = (),
    top: int = ClassifyConfig.top,
    model: str = EmbedConfig.model,
    image: str = "image",
    key: str | None = None,
    max_pixels: int = MAX_PIXELS,
    device: Device = "auto",
    actors: int | None = None,
    batch_size: int | None = None,
) -> ray.data.Dataset:
    """Tell the labels that fit every image best: one row per image and label, the best first.

    `labels` are needed unless the model has labels of its own; a template has {} in their place.
    Columns that are added: rank, label_id, label, probability, logit, as in the table `labels`.
    Failures, the other arguments and the errors as in `segment`.
    """
    config = ClassifyConfig(
        input="",
        output="",
        label=(labels,) if isinstance(labels, str) else tuple(labels),
        template=(templates,) if isinstance(templates, str) else tuple(templates),
        top=top,
        images=ImageOptions(max_pixels=max_pixels),
        workers=WorkerOptions(device=device, actors=actors, batch_size=batch_size),
    )
    classifier = open_classifier(model, config)
    _warn(classifier.notes)
    tables = config.tables(classifier.facts(), classifier.top, images=True)
    return _compose(
        images,
        (image, key),
        (config.images, config.workers),
        (ClassifyImages, classifier, classifier.checkpoint.processor),
        ("labels", tables, MakeLabelRows(tables, classifier.labels)),
    )


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=3)


def _compose(
    images: ray.data.Dataset,
    columns: tuple[str, str | None],
    options: tuple[ImageOptions, WorkerOptions],
    actor: tuple[type, Any, ImageProcessor],
    results: tuple[str, dict[str, Table], Callable[..., Any]],
) -> ray.data.Dataset:
    """Decode and resize -> infer -> rows of the table that is asked for.

    `columns`: image and key; `actor`: its class, what it is asked, how images get to its size;
    `results`: the name of the table, the tables of the job, the maker of their rows.
    """
    image, key = columns
    actor_class, spec, processor = actor
    name, tables, make_rows = results
    wanted = result_schema(tables[name].schema, key=key is not None)
    known = images.schema(fetch_if_missing=False)
    if known is not None:
        check_columns(known.names, image, key, wanted)
    if not ray.is_initialized():
        ray.init()  # as the dataset itself would when it runs
    check_workers()
    share = share_cluster(options[1], spare=SPARE_CPUS)
    decode = guarded(PrepareImages(processor, options[0].max_pixels), fail_crashed_image)
    prepare = PrepareRecords(decode, image, key, wanted)
    return (
        images.map_batches(prepare, **share["task"] | {"batch_size": IMAGES_AT_ONCE})
        .map_batches(
            InferBeside,
            fn_constructor_args=(actor_class, spec, share["device"], share["threads"]),
            **share["actor"],
        )
        .map_batches(guarded(MakeResults(make_rows, name, wanted)), **share["task"])
    )
