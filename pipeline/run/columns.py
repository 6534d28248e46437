"""A user's columns beside the stages' own, on the way through a pipeline of theirs.

A stage sees the columns of its schema alone. The user's stand beside them under other names, and
each of its output's rows gets those of the row it came of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.errors import UsageError
from pipeline.run.guard import Stage, run_stage

_THEIRS = "user:"
_FAILURE = ("stage", "reason", "detail")
# Where a message names the shard.
_SHARD = "the dataset"


class PrepareRecords:
    """The decode stage: a user's table -> schema.PIXELS, the user's columns beside it.

    `prepare` is PrepareImages. Raises UsageError for missing columns, and for ones of another type
    or with the name of one of `results`.
    """

    def __init__(self, prepare: Stage, image: str, key: str | None, results: pa.Schema):
        self.prepare, self.image, self.key, self.results = prepare, image, key, results

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        check_columns(batch.column_names, self.image, self.key, self.results)
        records = make_records(batch[self.image], batch[self.key] if self.key else None)
        kept = kept_columns(batch.column_names, self.image, self.key)
        theirs = batch.select(kept).rename_columns([_THEIRS + name for name in kept])
        yield from run_beside(self.prepare, _side_by_side(records, theirs))


class InferBeside:
    """An actor of one of the stages with a model, the user's columns beside it."""

    def __init__(self, actor: type, *arguments: Any, **options: Any):
        self.stage = actor(*arguments, **options)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from run_beside(self.stage, batch)


class MakeResults:
    """The last stage: records from a model -> rows of one table, and a row for each failure.

    `make_rows` is a maker of write.rows, `name` the table, `results` its result_schema.
    """

    def __init__(self, make_rows: Any, name: str, results: pa.Schema):
        self.make_rows, self.name, self.results = make_rows, name, results

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for table in run_beside(self._rows, batch):
            table = table.drop_columns(["row"])
            yield table.rename_columns([n.removeprefix(_THEIRS) for n in table.column_names])

    def _rows(self, records: pa.Table) -> pa.Table:
        """`row` and the columns of `results`, in the order of the records."""
        parts = (self.make_rows(records)[self.name], _failures(records))
        columns = pa.schema([pa.field("row", pa.int64()), *self.results])
        rows = pa.concat_tables(
            pa.table([_column(part, field) for field in columns], schema=columns) for part in parts
        )
        return rows.take(pa.array(np.argsort(rows["row"].to_numpy(), kind="stable")))


def result_schema(table: pa.Schema, *, key: bool) -> pa.Schema:
    """The columns of results: those of an output's table and of a failure, each may be null."""
    left_out = {"shard", "row"} if key else {"shard", "row", "key"}
    kept = [field.with_nullable(True) for field in table if field.name not in left_out]
    return pa.schema([*kept, *((name, pa.string()) for name in _FAILURE)])


def kept_columns(names: Iterable[str], image: str, key: str | None) -> list[str]:
    """The user's columns beside the results; `key` stands there under its own name."""
    return [n for n in names if n != image and (n != "key" or key != "key")]


def check_columns(names: list[str], image: str, key: str | None, results: pa.Schema) -> None:
    """Raise UsageError for missing columns, and for ones with the name of a result."""
    for option, name in (("image", image), ("key", key)):
        if name is not None and name not in names:
            known = ", ".join(names)
            raise UsageError(f"{option}={name!r}: the dataset has no such column; it has {known}")
    taken = [name for name in kept_columns(names, image, key) if name in results.names]
    if taken:
        raise UsageError(
            f"the dataset has a column {taken[0]!r}, as the results have: rename it before, with "
            f"rename_columns({{{taken[0]!r}: ...}})"
        )


def make_records(image: pa.ChunkedArray, key: pa.ChunkedArray | None) -> pa.Table:
    """schema.RECORDS of a column of images and one of keys; `row` counts from 0.

    `image` as it is there: bytes, a struct with `bytes` as Hugging Face writes it, or a tensor.
    """
    if pa.types.is_struct(image.type) and image.type.get_field_index("bytes") >= 0:
        image = pc.struct_field(image, "bytes")
    if not (
        _is_binary(image.type)
        or isinstance(image.type, pa.BaseExtensionType)
        or pa.types.is_null(image.type)
    ):
        raise UsageError(
            f"the image column holds {image.type}: it must hold encoded bytes or uint8 arrays"
        )
    missing = image.is_null().to_numpy()
    failure = {"stage": "read", "reason": "no_image", "detail": "the image column is null"}
    given: dict[str, Any] = {
        "shard": [_SHARD] * len(image),
        "row": np.arange(len(image)),
        "key": [""] * len(image) if key is None else _as_text(key),
        "image": image,
        "retryable": np.zeros(len(image), bool),
        **{name: np.where(missing, value, "") for name, value in failure.items()},
    }
    empty = {pa.int64(): -1, pa.string(): ""}
    columns = {f.name: given.get(f.name, [empty.get(f.type)] * len(image)) for f in schema.RECORDS}
    return pa.table(
        {
            name: values if name == "image" else pa.array(values, schema.RECORDS.field(name).type)
            for name, values in columns.items()
        }
    )


def run_beside(stage: Stage, batch: pa.Table) -> Iterator[pa.Table]:
    """A stage's output for the columns of its own; beside it the user's, each row's of its `row`.

    The `row` of the output is a number in this batch.
    """
    beside = [name for name in batch.column_names if name.startswith(_THEIRS)]
    own, theirs = batch.drop_columns(beside), batch.select(beside)
    numbers = pa.array(np.arange(len(batch)), pa.int64())
    own = own.set_column(own.schema.get_field_index("row"), own.schema.field("row"), numbers)
    for output in run_stage(stage, own):
        yield _side_by_side(output, theirs.take(output["row"]))


def _side_by_side(own: pa.Table, theirs: pa.Table) -> pa.Table:
    names = [*own.column_names, *theirs.column_names]
    return pa.table([*own.columns, *theirs.columns], names=names)


def _failures(records: pa.Table) -> pa.Table:
    """`row`, `key`, `stage`, `reason` and `detail` of the failed records."""
    failed = records.filter(pc.not_equal(records["reason"], ""))
    return failed.select(["row", "key", *_FAILURE])


def _column(table: pa.Table, field: pa.Field) -> pa.Array | pa.ChunkedArray:
    """A column of a table; nulls if it has none."""
    if field.name in table.column_names:
        return table[field.name]
    return pa.nulls(len(table), field.type)


def _as_text(column: pa.ChunkedArray) -> list[str]:
    return ["" if value is None else str(value) for value in column.to_pylist()]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
