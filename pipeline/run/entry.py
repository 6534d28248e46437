"""The stages of the jobs for Ray Data pipelines of others: a lazy Dataset in, a lazy one out.

Every row of the input is one image, as encoded bytes or as decoded pixels. The user's Ray and its
DataContext stay as they are; without one, Ray starts as it does for every Dataset.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

import pyarrow as pa
import ray
import ray.data

from pipeline.config.classify import ClassifyConfig
from pipeline.config.embed import EmbedConfig
from pipeline.config.fine import FineOptions
from pipeline.config.options import ImageOptions, Precision, WorkerOptions
from pipeline.config.segment import SegmentConfig
from pipeline.errors import UsageError
from pipeline.infer.classify import Classifier, ClassifyImages, open_classifier
from pipeline.infer.embed import EmbedImages, EmbedSpec, open_embedder
from pipeline.infer.segment import SegmentImages, SegmentSpec, open_segmenter
from pipeline.prepare.images import PrepareImages, fail_crashed_image
from pipeline.prepare.windows import Looks, PrepareLooks
from pipeline.run.columns import (
    InferBeside,
    MakeResults,
    PrepareRecords,
    check_columns,
    result_schema,
)
from pipeline.run.guard import Stage, guarded
from pipeline.run.package import check_workers
from pipeline.run.resources import share_cluster
from pipeline.write.rows import MakeEmbeddingRows, MakeLabelRows, MakeMaskRows

# CPUs that stay free for one task that reads and one that writes, which are the user's own.
SPARE_CPUS = 2.0
IMAGES_AT_ONCE = 32  # of a block, whose images are decoded and resized together

Device = Literal["auto", "cpu", "cuda"]
MaskSize = Literal["image", "model"]
Dtype = Literal["float32", "float16"]
T = TypeVar("T", bound=str)
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
    mask_size: MaskSize = SegmentConfig.mask_size,
    size: int | str | None = None,
    tile: bool = False,
    refine: bool = False,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    device: Device = "auto",
    actors: int | None = None,
    batch_size: int | None = None,
) -> ray.data.Dataset:
    """Segment every image with every prompt: one row per image and prompt.

    `image` names the column of encoded bytes, or of uint8 pixels (H, W, 3), (H, W) or (H, W, 4);
    `key`, if given, a column that becomes the text column `key`. The other columns stand beside
    every row made from theirs. Added columns: prompt_id, prompt, height, width, rle, bbox, area,
    score_max, score_mean, threshold, as in the table `masks`; stage, reason, detail. A failed image
    is one row with these three and nulls for the mask; they are null elsewhere.

    `size`, `tile` and `refine` as in FineOptions; `precision` as in SegmentConfig; `device`,
    `actors` and `batch_size` as in WorkerOptions. Loads the model once, to encode the prompts.
    Raises UsageError for unusable arguments, CheckpointError for an unusable model.
    """
    config = SegmentConfig(
        input="",
        output="",
        prompt=(prompts,) if isinstance(prompts, str) else tuple(prompts),
        model=model,
        threshold=threshold,
        mask_size=_one_of(MaskSize, "mask_size", mask_size),
        precision=_one_of(Precision, "precision", precision),
        fine=FineOptions(size=None if size is None else str(size), tile=tile, refine=refine),
        images=ImageOptions(max_pixels=max_pixels),
        workers=_workers(device, actors, batch_size),
    ).resolve()
    spec = open_segmenter(model, list(config.prompt), fine=config.fine, precision=precision)
    _warn(spec.notes)
    tables = config.tables(spec.checkpoint.dimension, spec.checkpoint.weights_hash)
    return _compose(
        images,
        config,
        columns=(image, key),
        infer=(SegmentImages, replace(spec, rule=config.rule)),
        results=(
            "masks",
            tables["masks"].schema,
            MakeMaskRows(config, tables, list(config.prompt), 0),
        ),
        looks=spec.looks,
    )


def embed(
    images: ray.data.Dataset,
    *,
    model: str = EmbedConfig.model,
    image: str = "image",
    key: str | None = None,
    normalize: bool = EmbedConfig.normalize,
    dtype: Dtype = EmbedConfig.dtype,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
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
        dtype=_one_of(Dtype, "dtype", dtype),
        precision=_one_of(Precision, "precision", precision),
        images=ImageOptions(max_pixels=max_pixels),
        workers=_workers(device, actors, batch_size),
    )
    spec = open_embedder(model, text=False, normalize=normalize, dtype=dtype, precision=precision)
    tables = config.tables(spec.checkpoint.dimension, spec.checkpoint.weights_hash)
    return _compose(
        images,
        config,
        columns=(image, key),
        infer=(EmbedImages, spec),
        results=(
            "embeddings",
            tables["embeddings"].schema,
            MakeEmbeddingRows(tables["embeddings"].schema),
        ),
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
    precision: Precision = "float32",
    device: Device = "auto",
    actors: int | None = None,
    batch_size: int | None = None,
) -> ray.data.Dataset:
    """Find the best labels of every image: one row per image and label, the best first.

    `labels` are needed unless the model has labels of its own; a template has {} in their place.
    Added columns: rank, label_id, label, probability, logit, as in the table `labels`. Failures,
    the other arguments and the errors as in `segment`.
    """
    config = ClassifyConfig(
        input="",
        output="",
        label=(labels,) if isinstance(labels, str) else tuple(labels),
        template=(templates,) if isinstance(templates, str) else tuple(templates),
        top=top,
        precision=_one_of(Precision, "precision", precision),
        images=ImageOptions(max_pixels=max_pixels),
        workers=_workers(device, actors, batch_size),
    )
    classifier = open_classifier(model, config)
    _warn(classifier.notes)
    tables = config.tables(classifier.facts(), classifier.top, images=True)
    return _compose(
        images,
        config,
        columns=(image, key),
        infer=(ClassifyImages, classifier),
        results=("labels", tables["labels"].schema, MakeLabelRows(tables, classifier.labels)),
    )


def _workers(device: Device, actors: int | None, batch_size: int | None) -> WorkerOptions:
    device = _one_of(Device, "device", device)
    return WorkerOptions(device=device, actors=actors, batch_size=batch_size)


def _one_of(known: Any, option: str, value: T) -> T:
    """The value. Raises UsageError unless it is one of a Literal's."""
    if value not in get_args(known):
        raise UsageError(f"{option}={value!r}: must be one of {', '.join(get_args(known))}")
    return value


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=3)


def _compose(
    images: ray.data.Dataset,
    config: SegmentConfig | EmbedConfig | ClassifyConfig,
    *,
    columns: tuple[str, str | None],
    infer: tuple[type, SegmentSpec | EmbedSpec | Classifier],
    results: tuple[str, pa.Schema, Callable[..., Any]],
    looks: Looks | None = None,
) -> ray.data.Dataset:
    """Decode and resize -> infer -> rows of the wanted table.

    `columns`: image and key; `infer`: the actor and what it is asked; `results`: the name of the
    table, its columns, the maker of its rows.
    """
    image, key = columns
    actor, spec = infer
    name, table, make_rows = results
    wanted = result_schema(table, key=key is not None)
    known = images.schema(fetch_if_missing=False)
    if known is not None:
        check_columns(known.names, image, key, wanted)
    if not ray.is_initialized():
        ray.init()  # as the dataset itself would when it runs
    check_workers()
    share = share_cluster(config.workers, spare=SPARE_CPUS)
    max_pixels, batch = config.images.max_pixels, share["actor"]["batch_size"]
    decode: Stage = PrepareImages(spec.checkpoint.processor, max_pixels)
    if looks:
        decode = PrepareLooks(looks, max_pixels)
        batch = config.workers.batch_size or min(batch, looks.images_at_once)
    prepare = PrepareRecords(guarded(decode, fail_crashed_image), image, key, wanted)
    return (
        images.map_batches(prepare, **share["task"] | {"batch_size": IMAGES_AT_ONCE})
        .map_batches(
            InferBeside,
            fn_constructor_args=(actor, spec, share["device"], share["threads"]),
            **share["actor"] | {"batch_size": batch},
        )
        .map_batches(guarded(MakeResults(make_rows, name, wanted)), **share["task"])
    )
