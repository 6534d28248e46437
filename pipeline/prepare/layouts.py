"""Name the valid layouts beyond Pillow, decoded wrongly or not at all: unsupported is not broken.

Pillow says the same of a damaged header and of one it knows nothing about. Here the header is read
again, shortly: fields with defined values alone, in a file with all it promises, are a layout.
"""

from __future__ import annotations

import struct
from functools import cache
from io import BytesIO

from PIL import Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

# TIFF tags.
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 256, 257, 258, 259, 262, 277, 284
TILE_WIDTH, TILE_LENGTH, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT = 322, 323, 332, 338, 339
# Where the strips or the tiles lie, and their lengths in bytes.
_PIECES = ((273, 279), (324, 325))

# Of the places of strips: numbers of Python's take 9 times the memory of those in a file.
_MOST_OFFSET_BYTES = 1 << 20
_INTEGERS = (3, 4)  # types of tags: SHORT, LONG
# fmt: off
_COMPRESSIONS = {
    1: "", 2: "CCITT", 3: "CCITT group 3", 4: "CCITT group 4", 5: "LZW", 6: "old-style JPEG",
    7: "JPEG", 8: "deflate", 9: "JBIG", 10: "JBIG", 32766: "NeXT", 32771: "", 32773: "PackBits",
    32809: "ThunderScan", 32895: "CT", 32908: "PixarFilm", 32909: "PixarLog", 32946: "deflate",
    33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 33007: "JPEG", 34661: "JBIG",
    34676: "SGI log", 34677: "SGI log 24", 34712: "JPEG 2000", 34887: "LERC", 34892: "lossy JPEG",
    34925: "LZMA", 34933: "PNG", 34934: "JPEG XR", 50000: "zstd", 50001: "WebP", 50002: "JPEG XL",
}
_PHOTOMETRICS = {  # with the number of colours
    0: ("white is zero", 1), 1: ("grey", 1), 2: ("RGB", 3), 3: ("palette", 1), 4: ("mask", 1),
    5: ("CMYK", 4), 6: ("YCbCr", 3), 8: ("CIELAB", 3), 9: ("ICCLAB", 3), 10: ("ITULAB", 3),
    32803: ("colour filter array", 1), 32844: ("LogL", 1), 32845: ("LogLuv", 3),
    34892: ("linear raw", 3),
}
_DEPTHS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 64, 128)
_SAMPLE_FORMATS = {1: "", 2: " signed", 3: " float", 4: " undefined", 5: " complex", 6: " complex"}
_JPEG_FRAMES = {
    0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive", 0xC3: "lossless",
    0xC5: "hierarchical", 0xC6: "hierarchical progressive", 0xC7: "hierarchical lossless",
    0xC9: "arithmetic", 0xCA: "arithmetic progressive", 0xCB: "arithmetic lossless",
    0xCD: "arithmetic hierarchical", 0xCE: "arithmetic hierarchical progressive",
    0xCF: "arithmetic hierarchical lossless", 0xF7: "JPEG-LS",
}
# fmt: on
_JPEG_DECODED = (0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA)
_JPEG_MAX_SIDE_PX = 65500  # libjpeg's


def missing_layout(form: str, data: bytes) -> str:
    """The layout of an image beyond Pillow; "" for one it knows: then the image
    is damaged. Empty, too, if the header makes no sense or the file breaks off."""
    readers = {"JPEG": _jpeg, "TIFF": _tiff, "BMP": _bmp, "PNG": _png}
    try:
        return readers[form](data) if form in readers else ""
    # Whatever a broken header makes of this, it is broken.
    except Exception:
        return ""


def wrong_tiff_layout(image: TiffImageFile) -> str:
    """The layout of an open TIFF if Pillow 13 decodes such files to wrong pixels, or not at all.

    Separate planes of grey with alpha, palette with alpha and CIELAB give wrong pixels (held
    against tifffile); the others end in an error without a reason.
    """
    tags = image.tag_v2
    extra = _numbers(tags, EXTRA_SAMPLES, ())
    codec = str(image.info.get("compression"))
    wrong = (
        (tags.get(PLANAR) == 2 and image.mode in ("LA", "La", "PA", "LAB"))
        or (tags.get(PLANAR) == 2 and len(extra) > 1 and any(extra))
        or (tags.get(PHOTOMETRIC) == 5 and tags.get(INK_SET, 1) != 1)
        or (codec == "jpeg" and set(_numbers(tags, BITS, (1,))) != {8})
        or (codec in ("webp", "zstd", "lzma") and not _libtiff_has(codec))
    )
    return _describe_tiff(tags) if wrong else ""


def is_whole_tiff(tags: ImageFileDirectory_v2, size_bytes: int) -> bool:
    """Whether all strips or tiles lie inside the file."""
    for starts, lengths in _PIECES:
        if starts in tags and len(tags._tagdata[starts]) <= _MOST_OFFSET_BYTES:
            pieces = zip(_numbers(tags, starts, ()), _numbers(tags, lengths, ()), strict=True)
            return all(start > 0 and start + length <= size_bytes for start, length in pieces)
    return False


@cache
def _libtiff_has(codec: str) -> bool:
    """Whether Pillow's libtiff was built with it: wheels differ."""
    try:
        Image.new("RGB", (16, 16)).save(BytesIO(), "TIFF", compression=codec)
    except OSError:
        return False
    return True


def _numbers(tags: ImageFileDirectory_v2, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = tags.get(tag, default)
    return tuple(map(int, value if isinstance(value, (tuple, bytes)) else (value,)))


def _describe_tiff(tags: ImageFileDirectory_v2) -> str:
    """KeyError or ValueError for tags in an impossible combination.

    A flipped bit in a directory takes away a tag, changes its type, or gives it a value at odds
    with the others; a consistent one cannot be told from another layout.
    """
    if any(tags.tagtype[tag] not in _INTEGERS for tag in (COMPRESSION, PHOTOMETRIC)):
        raise ValueError("tags of other types")
    [samples] = _numbers(tags, SAMPLES, (1,))
    [bits] = set(_numbers(tags, BITS, (1,) if samples == 1 else ()))
    [kind] = set(_numbers(tags, SAMPLE_FORMAT, (1,)))
    photometric, colours = _PHOTOMETRICS[_numbers(tags, PHOTOMETRIC, ())[0]]
    compression = _COMPRESSIONS[_numbers(tags, COMPRESSION, ())[0]]
    inks = _numbers(tags, INK_SET, (1,)) != (1,)
    if bits not in _DEPTHS or (
        samples != colours + len(_numbers(tags, EXTRA_SAMPLES, ())) and not inks
    ):
        raise ValueError("tags that do not agree")
    planes = ", separate planes" if tags.get(PLANAR) == 2 else ""
    inside = f", {compression} inside" if compression else ""
    depth = f"{bits}-bit{_SAMPLE_FORMATS[kind]}"
    return f"TIFF of {photometric}, samples: {samples} x {depth}{planes}{inside}"


def _tiff(data: bytes) -> str:
    if data.startswith(b"MM\0+\0\x08\0\0"):
        return "TIFF: a big-endian BigTIFF"
    header = data[: 16 if data[2] == 43 else 8]
    tags = ImageFileDirectory_v2(header)
    file = BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    layout = _describe_tiff(tags)
    sides = _numbers(tags, WIDTH, (0,)) + _numbers(tags, LENGTH, (0,))
    return layout if min(sides) > 0 and is_whole_tiff(tags, len(data)) and _lacks(data) else ""


def _lacks(data: bytes) -> bool:
    """Whether Pillow finds a TIFF's layout in none of its tables, rather than fail otherwise."""
    try:
        TiffImageFile(BytesIO(data))
    except SyntaxError as error:
        return str(error) == "unknown pixel mode" or isinstance(error.__cause__, KeyError)
    return False


def _jpeg(data: bytes) -> str:
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker in _JPEG_FRAMES:
            break
        elif marker in (0xD9, 0xDA):
            return ""
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    length, bits, height, width, components = struct.unpack_from(">HBHHB", data, at + 2)
    depths = {0xC0: (8,), 0xC1: (8, 12), 0xC2: (8, 12), 0xC9: (8, 12), 0xCA: (8, 12)}
    whole = data.rfind(b"\xff\xd9") > at
    if length != 8 + 3 * components or bits not in depths.get(marker, range(2, 17)) or not whole:
        return ""
    frame = _JPEG_FRAMES[marker]
    if marker not in _JPEG_DECODED or bits != 8:
        return f"JPEG, {frame}, {bits} bits"
    if components not in (1, 3, 4):
        return f"JPEG of {components} components"
    if height == 0:
        return "JPEG whose height stands behind its data"
    if max(height, width) > _JPEG_MAX_SIDE_PX:
        return f"JPEG of {height} x {width} px, the decoder's limit is {_JPEG_MAX_SIDE_PX}"
    return ""


def _bmp(data: bytes) -> str:
    size_bytes, start, header = struct.unpack_from("<I4xII", data, 2)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<4H", data, 18)
        compression = 0
    else:
        width, height, _, bits = struct.unpack_from("<iiHH", data, 18)
        compression = struct.unpack_from("<I", data, 30)[0] if header > 16 else 0
    raw = compression in (0, 3, 6) and (header, compression, bits) != (64, 3, 1)
    rows = start + (width * bits + 31) // 32 * 4 * abs(height) if raw else size_bytes
    if width < 1 or height == 0 or max(size_bytes, rows) > len(data):
        return ""
    if header == 16:
        return f"BMP with the short header of OS/2 2, {bits} bits"
    if compression in (3, 4) and header == 64:
        return "BMP of OS/2, Huffman coded" if bits == 1 else "BMP of OS/2, run-length of 24 bits"
    if compression in (4, 5):
        return f"BMP with a {'JPEG' if compression == 4 else 'PNG'} inside"
    if compression in (3, 6) and bits in (16, 32):
        masks = struct.unpack_from("<III", data, 54)
        if _are_fields(masks, bits):
            return f"BMP with bitfields {' '.join(f'{mask:x}' for mask in masks)} of {bits} bits"
    if compression in (1, 2) and data.rstrip(b"\0").endswith(b"\0\1"):
        return f"BMP, run-length of {bits} bits, of two colours or with pixels left out"
    if compression == 0 and bits in (2, 4, 64):
        return f"BMP of {bits} bits" + " with a grey palette" * (bits == 4)
    return ""


def _are_fields(masks: tuple[int, ...], bits: int) -> bool:
    """Whether each mask is one run of bits, and no two overlap."""
    runs = all(mask and bin(mask)[2:].rstrip("0").count("0") == 0 for mask in masks)
    return runs and sum(masks) == masks[0] | masks[1] | masks[2] and sum(masks) < 1 << bits


def _png(data: bytes) -> str:
    return "PNG as Xcode writes it (CgBI)" if data[12:16] == b"CgBI" else ""


def avif_size(data: bytes) -> tuple[int, int]:
    """The largest (height, width) in an AVIF's boxes; (0, 0) without any.

    libavif opens no image above 2^28 px, without saying why.
    """
    largest, at = (0, 0), data.find(b"ispe")
    while 0 <= at <= min(len(data) - 16, 1 << 16):
        width, height = struct.unpack_from(">II", data, at + 8)
        largest = max(largest, (height, width), key=lambda size: size[0] * size[1])
        at = data.find(b"ispe", at + 4)
    return largest


def correct_raw_mode(image: Image.Image, data: bytes) -> None:
    """Mend how Pillow 13 reads the samples of two kinds of file; held against tifffile, OpenCV."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return
    tile = image.tile[0]
    args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    raw_mode = args[0]
    if image.format == "TIFF" and raw_mode in ("I;16BS", "I;32BS", "F;32BF"):
        # libtiff has put the bytes into this machine's order.
        raw_mode = raw_mode.replace("B", "N")
    elif image.format == "BMP" and raw_mode in ("1", "L") and data[28] == 4:
        raise ValueError("4 bits of grey")
    elif image.format == "BMP" and raw_mode == "1" and data[28] == 8:
        # Black and white as the only colours, of a byte a pixel.
        raw_mode = "1;8"
    else:
        return
    image.tile = [tile._replace(args=(raw_mode, *args[1:]))]
