"""Parquet columns by type: find the images, read the images, keys and texts of a cell.

Types are seen through: categories (dictionaries) are their values, and bytes without an annotation
may be text. Images are bytes, lists of uint8, base64 text, `data:` URLs, paths, Hugging Face
struct{bytes, path}, or lists of those.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import pyarrow as pa

from pipeline.read.shard import format_phrases, is_image, printable, split_wanted

IMAGE_COLUMNS = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "images", "image_bytes", "bytes"),
    "content",
)
KEY_COLUMNS = ("key", "__key__", "id", "image_id", "uid")
_URL_COLUMNS = re.compile(r"(.*[_.])?(url|urls|uri|link)|.*url", re.IGNORECASE)
_URL = re.compile(r"(?!s3://)[A-Za-z][A-Za-z0-9+.-]*://")
_NESTED = 4  # levels of structs in which a column is looked for


class Cell(NamedTuple):
    """One image of a cell: its bytes, or a path or URL in their place."""

    image: bytes | None = None
    path: str = ""
    """Of its file, as the cell has it."""
    url: str = ""
    place: str = ""
    """In a list: `images[1]`."""


# ------------------------------------------------------------------------------- find


def find_image_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """Find the column of images: `wanted`, or else the first of IMAGE_COLUMNS; None without any.

    Columns of bytes come first, then such fields of structs (`sample.image`), then columns of text
    (base64, `data:` URLs, paths) or of nulls alone.
    """
    if wanted:
        kind = column_type(schema, wanted)
        return wanted if kind is not None and _rank(kind) else None
    names = [name for name in IMAGE_COLUMNS if column_type(schema, name) is not None]
    ranks = {name: _rank(column_type(schema, name)) for name in names}
    strong = [name for name in names if ranks[name] == 2]
    if not strong:
        inner = [name for field in schema for name in _fields(field, "", _NESTED)]
        order = {name: i for i, name in enumerate(IMAGE_COLUMNS)}
        strong = sorted(inner, key=lambda name: order[name.rpartition(".")[2]])
    weak = [name for name in names if ranks[name] == 1 and name not in ("bytes", "content")]
    return next(iter(strong + weak), None)


def column_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    """The type of a column, or of a field of structs by its path `sample.image`; None without."""
    index = schema.get_field_index(name)
    if index >= 0:
        return schema.field(index).type
    top, *inner = name.split(".")
    index = schema.get_field_index(top)
    if index < 0 or not inner:
        return None
    kind = schema.field(index).type
    for part in inner:
        index = kind.get_field_index(part) if pa.types.is_struct(kind) else -1
        if index < 0:
            return None
        kind = kind.field(index).type
    return kind


def take_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """The values of a column, or of a field of structs; null where a struct is."""
    index = batch.schema.get_field_index(name)
    if index >= 0:
        return batch.column(index)
    top, *inner = name.split(".")
    column = batch.column(batch.schema.get_field_index(top))
    for part in inner:
        column = column.flatten()[column.type.get_field_index(part)]
    return column


def _fields(field: pa.Field, above: str, levels: int) -> list[str]:
    """The paths of fields below a column with image bytes and a usual name."""
    if not levels or not pa.types.is_struct(field.type) or _rank(field.type):
        return []
    found = []
    for inner in field.type:
        path = f"{above}{field.name}."
        if inner.name in IMAGE_COLUMNS and _rank(inner.type) == 2:
            found.append(path + inner.name)
        found += _fields(inner, path, levels - 1)
    return found


def _rank(kind: pa.DataType) -> int:
    """2 for a type with the bytes of images, 1 for one with their text or paths, 0 for others."""
    kind = _plain(kind)
    if _is_bytes(kind) or _is_uint8s(kind):
        return 2
    if _is_list(kind):
        inner = kind.value_type
        return 0 if _is_list(inner) and not _is_uint8s(inner) else _rank(inner)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        if index < 0:
            return 0
        inner = _plain(kind.field(index).type)
        has_path = kind.get_field_index("path") >= 0
        null = pa.types.is_null(inner)
        return 2 if _is_bytes(inner) or _is_uint8s(inner) or (null and has_path) else 0
    return 1 if _is_string(kind) or pa.types.is_null(kind) else 0


def holds_text(schema: pa.Schema, name: str) -> bool:
    """Whether a column exists and holds text, bytes that may be text, or lists of phrases."""
    name, phrases = split_wanted(name)
    kind = column_type(schema, name)
    if phrases and kind is not None and _is_list(kind):
        kind = kind.value_type
    return kind is not None and (_is_string(_plain(kind)) or _is_bytes(_plain(kind)))


def holds_keys(schema: pa.Schema, name: str) -> bool:
    """Whether a column is there and holds text, bytes or whole numbers."""
    kind = column_type(schema, name)
    return kind is not None and (holds_text(schema, name) or pa.types.is_integer(_plain(kind)))


def holds_lists(schema: pa.Schema, name: str) -> bool:
    """Whether a row of a column may hold several images."""
    kind = column_type(schema, name)
    return kind is None or (_is_list(_plain(kind)) and not _is_uint8s(_plain(kind)))


def list_columns(schema: pa.Schema) -> str:
    """The columns with their types, for messages."""
    shown = [f"{field.name} ({str(field.type)[:60]})" for field in schema]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return (", ".join(shown[:20]) or "no columns at all") + more


def list_urls(schema: pa.Schema) -> list[str]:
    """The columns of text with a name typical of URLs."""
    return [f.name for f in schema if _URL_COLUMNS.fullmatch(f.name) and _is_string(_plain(f.type))]


# ------------------------------------------------------------------------------- read


def read_text(value: pa.Scalar) -> str | None:
    """A text, key or whole number as text; bytes outside UTF-8 are escaped."""
    found = _value(value)
    if found is None:
        return None
    return printable(found) if isinstance(found, bytes) else str(found)


def read_phrases(value: pa.Scalar) -> str | None:
    """A text or a list of texts, as shard.format_phrases has it."""
    if value.is_valid and _is_list(value.type):
        return format_phrases([_value(item) for item in value.values])
    return format_phrases(_value(value))


def read_cells(value: pa.Scalar, name: str) -> list[Cell]:
    """The images of one cell of the column `name`; one without an image for an empty cell."""
    kind = _plain(value.type)
    if value.is_valid and isinstance(value, pa.DictionaryScalar):
        value = value.value
    if not value.is_valid:
        return [Cell()]
    if not _is_list(kind) or _is_uint8s(kind):
        return [_read_cell(value)]
    cells = [
        _read_cell(item)._replace(place=f"{name}[{index}]")
        for index, item in enumerate(value.values)
    ]
    return cells or [Cell()]


def _read_cell(value: pa.Scalar) -> Cell:
    found: Any = _value(value)
    if found is None:
        return Cell()
    if not isinstance(found, dict):
        return _decode(found, text=_is_string(_plain(value.type)))
    path = printable(found["path"]) if isinstance(found.get("path"), (bytes, str)) else ""
    if found.get("bytes") is None:
        return Cell(url=path) if _URL.match(path) else Cell(path=path)
    return Cell(image=found["bytes"], path=path)


def _value(value: pa.Scalar) -> Any:
    """As as_py() has it, but text as bytes (it may not be UTF-8) and lists of uint8 as bytes."""
    if not value.is_valid:
        return None
    kind = value.type
    if pa.types.is_dictionary(kind):
        return _value(value.value)
    if _is_bytes(kind) or _is_string(kind):
        return value.as_buffer().to_pybytes()
    if _is_uint8s(kind):
        values = value.values
        return values.to_numpy(zero_copy_only=False).tobytes() if not values.null_count else None
    if pa.types.is_struct(kind):
        wanted = [name for name in ("bytes", "path") if kind.get_field_index(name) >= 0]
        return {name: _value(value[name]) for name in wanted}
    return value.as_py()


def _decode(data: bytes, *, text: bool) -> Cell:
    """Bytes as they are, unless they are a `data:` URL or base64; other text is a URL or a path."""
    if data[:5].lower() == b"data:":
        return Cell(image=_decode_data_url(data))
    start = b"".join(data[:64].split())
    if is_image(_from_base64(start[: len(start) // 4 * 4]) or b""):
        return Cell(image=_from_base64(data) or data)
    if not text:
        return Cell(image=data)
    path = printable(data)
    return Cell(url=path) if _URL.match(path) else Cell(path=path)


def _decode_data_url(data: bytes) -> bytes:
    """The content of a data URL (RFC 2397), or a broken URL as it is, for decoding to refuse."""
    header, comma, body = data.partition(b",")
    if not comma:
        return data
    content = unquote_to_bytes(body) if b"%" in body else body
    if not header.lower().endswith(b";base64"):
        return content
    return _from_base64(content) or data


def _from_base64(data: bytes) -> bytes | None:
    """Bytes of base64 in either alphabet, padded or not, in lines or one; None for the rest."""
    found = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(found + b"=" * (-len(found) % 4), validate=True)
    except binascii.Error:
        return None


# ------------------------------------------------------------------------------ types


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary; others as they are."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    variable = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return variable or pa.types.is_fixed_size_binary(kind) or kind == pa.binary_view()


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _is_list(kind: pa.DataType) -> bool:
    fixed = pa.types.is_fixed_size_list(kind)
    return fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_uint8s(kind: pa.DataType) -> bool:
    return _is_list(kind) and pa.types.is_uint8(kind.value_type)
