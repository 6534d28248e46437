"""Parquet shards, files or row groups of one.

Image bytes are in a binary column, or in a Hugging Face struct{bytes, path}.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import RowError
from pipeline.read.shard import IMAGE_LIMIT_BYTES, Sample, printable

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
KEY_COLUMNS = ("key", "__key__", "id", "image_id", "uid")

_BATCH_ROWS = 64
_BATCH_BYTES = 32 * 2**20


def find_image_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """`wanted`, or else the first of IMAGE_COLUMNS, where it holds image bytes; None otherwise."""
    for name in [wanted] if wanted else IMAGE_COLUMNS:
        if (index := schema.get_field_index(name)) >= 0 and _holds_bytes(schema.field(index).type):
            return name
    return None


def list_columns(schema: pa.Schema) -> str:
    """The columns with their types, for messages."""
    shown = [f"{field.name} ({str(field.type)[:60]})" for field in schema]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return (", ".join(shown[:20]) or "no columns at all") + more


def read_schema(uri: str) -> pa.Schema:
    """The Arrow schema in a file's footer; RowError where there is none to be read."""
    with storage.open_read(uri) as file, _damage():
        schema = _open(file).schema_arrow
        list_columns(schema)  # names may be damaged, too
        return schema


class RowGroup(NamedTuple):
    """What a footer says of a row group."""

    rows: int
    size_bytes: int
    """Of all columns, before compression."""


def read_row_groups(uri: str, version: str) -> list[RowGroup]:
    """The row groups in the footer of this version of a file.

    Raises StorageError, and RowError for a footer that is damaged or contradicts itself.
    """
    with storage.open_read(uri, version=version) as file, _damage():
        metadata = _open(file).metadata
        found = map(metadata.row_group, range(metadata.num_row_groups))
        groups = [RowGroup(group.num_rows, group.total_byte_size) for group in found]
    total = sum(group.rows for group in groups)
    if total != metadata.num_rows or any(min(group) < 0 for group in groups):
        raise RowError("read", "shard_corrupt", "the footer's row groups are not the file's rows")
    return groups


def read_parquet(
    file: BinaryIO,
    column: str = "",
    *,
    text: str = "",
    groups: range | None = None,
    limit_bytes: int = IMAGE_LIMIT_BYTES,
) -> Iterator[Sample]:
    """One sample per row; in memory are one page and at most 64 rows or 32 MB, by the footer.

    `column`: the image column; found by name when empty. `text`: the text column, if any.
    `groups`: the row groups to read, of which alone bytes are fetched; all when None. The key is
    the first of KEY_COLUMNS that holds text or whole numbers, else the path in a Hugging Face
    struct, else the row's number in the file.
    Raises RowError (shard_empty, shard_corrupt, column_missing).
    """
    with _damage():
        parquet = _open(file)
        whole = range(parquet.num_row_groups)
        if groups and groups.stop > len(whole):
            detail = f"{len(whole):,} row groups, of which number {groups.stop:,} is wanted"
            raise RowError("read", "shard_corrupt", detail)
        yield from _read_rows(parquet, groups or whole, column, text, limit_bytes)


def _read_rows(
    parquet: pq.ParquetFile, groups: range, column: str, text: str, limit_bytes: int
) -> Iterator[Sample]:
    schema = parquet.schema_arrow
    found = find_image_column(schema, column or None)
    if found is None:
        what = f"no column {column!r}" if column else "no column"
        raise RowError("read", "column_missing", f"{what} of bytes in {list_columns(schema)}")
    key_column = next((name for name in KEY_COLUMNS if _holds_keys(schema, name)), None)
    if text and not holds_text(schema, text):
        detail = f"no column {text!r} of text in {list_columns(schema)}"
        raise RowError("read", "column_missing", detail)
    columns = list(dict.fromkeys(name for name in (found, key_column, text) if name))
    row = first = _count_rows(parquet.metadata, range(groups.start))
    for batch in _batches(parquet, groups, columns):
        images, paths = _split_images(batch.column(found))
        keys = _texts(batch.column(key_column)) if key_column else paths
        texts = _texts(batch.column(text)) if text else paths
        for image, path, key, words in zip(images, paths, keys, texts, strict=True):
            name = str(row) if key is None else key
            yield _sample(name, path or "", image, limit_bytes).with_text(text, words)
            row += 1
    whole = len(groups) == parquet.num_row_groups
    said = parquet.metadata.num_rows if whole else _count_rows(parquet.metadata, groups)
    if row - first != said:
        detail = f"{row - first:,} rows where the footer says {said:,}"
        raise RowError("read", "shard_corrupt", detail)


def _count_rows(metadata: pq.FileMetaData, groups: range) -> int:
    return sum(metadata.row_group(group).num_rows for group in groups)


def _batches(
    parquet: pq.ParquetFile, groups: range, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """By row group, so that damage in one does not take back rows of another."""
    size = _batch_rows(parquet.metadata)
    for group in groups:
        yield from parquet.iter_batches(
            batch_size=size,
            row_groups=[group],
            columns=columns,
            use_threads=False,
        )


def _open(file: BinaryIO) -> pq.ParquetFile:
    """Columns are streamed by pages: without pre_buffer=False a whole row group is loaded."""
    if file.seek(0, 2) == 0:
        raise RowError("read", "shard_empty", "zero bytes")
    file.seek(0)
    try:
        return pq.ParquetFile(
            file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
        )
    except pa.ArrowException:
        raise
    # Ray registers extension types, whose code fails in its own ways on what only claims to be one.
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        detail = f"a column does not have the type it claims ({type(error).__name__})"
        raise RowError("read", "shard_corrupt", detail) from error


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """What pyarrow raises over damaged bytes; faults of storage are StorageErrors by now."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        text = (str(error).splitlines() or [""])[0]
        detail = f"damaged, cut short or not Parquet: {text}"
        raise RowError("read", "shard_corrupt", detail) from error


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows per batch that keep the widest row group's near _BATCH_BYTES, all columns counted.

    Not the image column alone: asking damaged metadata for a column ends the process (pyarrow 26).
    """
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    widest = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows > 0), default=1)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(widest, 1))))


def _split_images(column: pa.Array) -> tuple[list[bytes | None], list[str | None]]:
    """Bytes and paths; a null struct has neither."""
    if not pa.types.is_struct(column.type):
        return column.to_pylist(), [None] * len(column)
    names = [field.name for field in column.type]
    children = dict(zip(names, column.flatten(), strict=True))
    paths: list[str | None] = [None] * len(column)
    if "path" in children and _is_text(children["path"].type):
        paths = _texts(children["path"])
    return children["bytes"].to_pylist(), paths


def _texts(column: pa.Array) -> list[str | None]:
    """Text or whole numbers as text; bytes that are not UTF-8 are escaped."""
    values: list[Any] = (
        column.cast(pa.large_binary()).to_pylist() if _is_text(column.type) else column.to_pylist()
    )
    return [printable(v) if isinstance(v, bytes) else None if v is None else str(v) for v in values]


def _sample(key: str, path: str, image: bytes | None, limit_bytes: int) -> Sample:
    if image is None:
        detail = "only a path, no bytes" if path else "the image column is null"
        return Sample(key, path, reason="no_image", detail=detail)
    if len(image) > limit_bytes:
        detail = f"{len(image):,} bytes; at most {limit_bytes:,} are read"
        return Sample(key, path, reason="member_too_large", detail=detail)
    return Sample(key, path, image)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def holds_text(schema: pa.Schema, name: str) -> bool:
    """Whether a column is there and holds text."""
    index = schema.get_field_index(name)
    return index >= 0 and _is_text(schema.field(index).type)


def _holds_keys(schema: pa.Schema, name: str) -> bool:
    index = schema.get_field_index(name)
    if index < 0:
        return False
    kind = schema.field(index).type
    return _is_text(kind) or pa.types.is_integer(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
