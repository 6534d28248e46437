"""The columns of every table: what stages hand to each other, and what readers of the output see.

Sizes are (height, width) in pixels. Boxes are COCO's (x, y, width, height). RLE is COCO's
compressed run-length encoding, so that pycocotools decodes the column as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

# Raised whenever a column changes its name, type or meaning.
SCHEMA_VERSION = 1

# What the read stage hands on. One record per image (or image that could not be read) in the order
# of the shard, then exactly one end record per shard: row -1, `total` the number of records before
# it, `skipped` the number of samples without an image, and a reason when the shard could not be
# read to its end. No nulls, so that the numpy form of a batch keeps its types: -1 and "" stand for
# "none".
RECORDS = pa.schema(
    [
        ("shard", pa.string()),  # name of the shard: its path relative to the input
        ("row", pa.int64()),  # index in the shard, from 0; -1 on the end record
        ("key", pa.string()),  # the row's own name: data only, never part of a path
        ("member", pa.string()),  # where the bytes lie: tar member, file, or path named by Parquet
        ("image", pa.large_binary()),  # encoded bytes; empty when there is a reason
        ("text", pa.string()),  # what stands beside the image, where a job wants it
        ("total", pa.int64()),  # on the end record: records in this shard; -1 elsewhere
        ("version", pa.string()),  # of the shard: see read.shard.Shard
        ("skipped", pa.int64()),  # on the end record: samples without an image; 0 elsewhere
        ("stage", pa.string()),  # "" or where it failed
        ("reason", pa.string()),  # "" or one of errors.REASONS
        ("detail", pa.string()),
        ("retryable", pa.bool_()),
    ]
)

# What a record keeps on its whole way, whatever is done with its image.
_RECORD = [f for f in RECORDS if f.name != "image"]

# What is known of an image once it is decoded; zeros and "" for a record that failed.
_DECODED = [
    ("height", pa.int32()),  # of the upright image
    ("width", pa.int32()),
    ("format", pa.string()),  # JPEG, PNG, ...
    ("mode", pa.string()),  # Pillow's mode before conversion: RGB, L, CMYK, I;16, ...
    ("orientation", pa.int8()),  # the EXIF orientation that was applied; 1 when none
    ("size_bytes", pa.int64()),  # of the encoded image
]

# What the prepare stage hands on: `pixels` is the resized image, H x W x 3 uint8 as the model's
# processor says, row-major, or several looks at it, as prepare.windows has them; empty when there
# is a reason.
PIXELS = pa.schema([*_RECORD, *_DECODED, ("pixels", pa.large_binary())])

# What the segment stage hands on: one row per record and run of prompts. `logits` is float32,
# (prompts of the run) x logits_height x logits_width, row-major, starting at `first_prompt`.
LOGITS = pa.schema(
    [
        *_RECORD,
        *_DECODED,
        ("first_prompt", pa.int32()),
        ("logits_height", pa.int32()),
        ("logits_width", pa.int32()),
        ("logits", pa.large_binary()),
        ("vector", pa.large_binary()),  # with the first run, where embeddings are wanted too
    ]
)

# What it hands on where masks are finished on the device: per record what becomes rows of `masks`.
RUNS = pa.schema(
    [
        *_RECORD,
        *_DECODED,
        ("first_prompt", pa.int32()),
        ("mask_height", pa.int32()),
        ("mask_width", pa.int32()),
        ("counts", pa.list_(pa.list_(pa.int32()))),  # COCO's run lengths of each prompt's mask
        ("score_max", pa.list_(pa.float32())),
        ("score_mean", pa.list_(pa.float32())),  # null of an empty mask
        ("map_height", pa.int32()),
        ("map_width", pa.int32()),
        ("maps", pa.large_binary()),  # uint8 of each prompt's map, where they are kept
        ("vector", pa.large_binary()),
    ]
)

# What the reader of a run's kept maps hands on: `maps` are the uint8 maps of the wanted prompts,
# P x map_height x map_width, row-major; empty when there is a reason.
KEPT_MAPS = pa.schema(
    [
        *_RECORD,
        *_DECODED,
        ("map_height", pa.int32()),
        ("map_width", pa.int32()),
        ("maps", pa.large_binary()),
        ("vector", pa.large_binary()),  # the image's embedding, float32, where it is wanted
    ]
)

# What the embed stage hands on: vectors are float32, empty when there is a reason, and the text's
# also when no text was asked for.
VECTORS = pa.schema(
    [*_RECORD, *_DECODED, ("vector", pa.large_binary()), ("text_vector", pa.large_binary())]
)

# What the classify stage hands on: the best labels of an image, best first; empty lists when there
# is a reason. `label_id` is the index in the run's list of labels.
RANKED = pa.schema(
    [
        *_RECORD,
        *_DECODED,
        ("label_id", pa.list_(pa.int32())),
        ("probability", pa.list_(pa.float32())),
        ("logit", pa.list_(pa.float32())),
    ]
)

# What the last stage hands on: one row per shard and fragment, with what came out.
ACCOUNTS = pa.schema(
    [
        ("shard", pa.string()),
        ("images", pa.int64()),  # records that came out well
        ("outputs", pa.int64()),  # rows of the other tables
        ("size_bytes", pa.int64()),  # encoded bytes of the images that came out well
        ("errors", pa.int64()),  # records that failed; a shard's own failure is not among them
        ("reason", pa.string()),  # the most frequent one among the errors; "" without any
        ("total", pa.int64()),  # records of the shard, where its end record was seen; -1 elsewhere
        ("skipped", pa.int64()),  # samples without an image, beside `total`
        ("fragment", pa.string()),  # the name of the fragment; "" where there is none
        ("fault", pa.string()),  # what the storage did not give, and why; "" where it gave all
    ]
)

RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])


def _table(*fields: tuple[str, pa.DataType] | pa.Field) -> pa.Schema:
    """A schema of non-null fields, unless a pa.Field says otherwise."""
    return pa.schema(
        [f if isinstance(f, pa.Field) else pa.field(*f, nullable=False) for f in fields]
    )


_ID = (("shard", pa.string()), ("row", pa.int64()), ("key", pa.string()))

IMAGES = _table(*_ID, ("member", pa.string()), *_DECODED)

MASKS = _table(
    *_ID,
    ("prompt_id", pa.int32()),  # index in the run's list of prompts
    ("prompt", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("rle", RLE),
    ("bbox", pa.list_(pa.float32(), 4)),  # x, y, width, height; zeros when the mask is empty
    ("area", pa.int64()),  # pixels of the mask
    ("score_max", pa.float32()),  # largest probability in the image
    pa.field("score_mean", pa.float32()),  # mean probability inside the mask; null when it is empty
    ("threshold", pa.float32()),
)

PROBABILITIES = _table(
    *_ID,
    ("prompt_id", pa.int32()),
    ("prompt", pa.string()),
    ("size", pa.list_(pa.int32(), 2)),  # (height, width) of the map
    ("map", pa.binary()),  # row-major uint8, round(255 * probability)
)

ANNOTATIONS = _table(
    *_ID,
    ("instance", pa.int32()),  # from 0 in the image
    ("class_id", pa.int32()),  # from 0, in the ontology's order
    ("class", pa.string()),
    ("prompt_id", pa.int32()),  # the prompt of the run that won most of its pixels
    ("score", pa.float32()),  # mean probability inside
    ("presence", pa.float32()),  # largest probability of the class in the image
    ("rle", RLE),
    ("bbox", pa.list_(pa.float32(), 4)),  # x, y, width, height
    ("area", pa.int64()),  # pixels
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("threshold", pa.float32()),
)

ERRORS = _table(
    ("shard", pa.string()),
    pa.field("row", pa.int64()),  # null when the shard itself failed
    pa.field("key", pa.string()),
    ("stage", pa.string()),
    ("reason", pa.string()),
    ("detail", pa.string()),
    ("retryable", pa.bool_()),
)


def embeddings(dimension: int, dtype: str, facts: dict[str, str], *, text: bool) -> pa.Schema:
    """The embeddings table: one row per image, its vector a plain non-null fixed_size_list.

    `dtype` is "float32" or "float16"; with `text`, the text and its vector stand beside it. `facts`
    (model, weights_hash, normalized) go with the dimension into every file's key-value metadata,
    under "clipseg_ray.".
    """
    kind = pa.float32() if dtype == "float32" else pa.float16()
    vector = pa.list_(pa.field("element", kind, nullable=False), dimension)
    of_text = (("text", pa.string()), ("text_vector", vector)) if text else ()
    columns = _table(*_ID, ("vector", vector), *of_text)
    return _with_facts(columns, {"dimension": str(dimension), **facts})


def labels(facts: dict[str, str]) -> pa.Schema:
    """The labels table: the best labels of each image, a row for each.

    `facts` (model, weights_hash) go into every file's key-value metadata, under "clipseg_ray.".
    """
    columns = _table(
        *_ID,
        ("rank", pa.int32()),  # 0 is the best
        ("label_id", pa.int32()),  # index in the run's list of labels, or among the model's classes
        ("label", pa.string()),
        ("probability", pa.float32()),  # sums to 1 over all labels, unless a head says otherwise
        ("logit", pa.float32()),  # exp(logit_scale) times the cosine, or what the head gives
    )
    return _with_facts(columns, facts)


def _with_facts(columns: pa.Schema, facts: dict[str, str]) -> pa.Schema:
    return columns.with_metadata({f"clipseg_ray.{name}": value for name, value in facts.items()})


class Table(NamedTuple):
    """A table written by a job, beside `errors`."""

    schema: pa.Schema
    rows_per_image: int
    """0: any number."""
    per_prompt: bool = False
    """Whether an image has a row for each prompt."""
