"""Name the format of a file by its first bytes: what is decoded, what is refused by name."""

from __future__ import annotations

import struct

# What image files begin with: the allow-list first, then formats that are refused by name.
# fmt: off
_IMAGES: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",), "PNG": (b"\x89PNG\r\n\x1a\n",), "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"),
    "PSD": (b"8BPS",), "EPS": (b"%!PS", b"\xc5\xd0\xd3\xc6"), "PDF": (b"%PDF",),
    "FITS": (b"SIMPLE  =",), "ICNS": (b"icns",), "MNG": (b"\x8aMNG\r\n",),
    "JNG": (b"\x8bJNG\r\n",), "JPEG 2000": (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "),
    "JPEG XR": (b"II\xbc",), "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "), "DDS": (b"DDS ",),
    "QOI": (b"qoif",), "EXR": (b"v/1\1",), "HDR": (b"#?RADIANCE", b"#?RGBE"),
    "XCF": (b"gimp xcf",), "WMF": (b"\xd7\xcd\xc6\x9a",), "SGI": (b"\1\xda\0", b"\1\xda\1"),
    "DJVU": (b"AT&TFORM",), "BPG": (b"BPG\xfb",), "Sun raster": (b"\x59\xa6\x6a\x95",),
    "PCX": tuple(b"\n" + bytes((version, 1)) for version in (0, 2, 3, 4, 5)),
    "DPX": (b"SDPX", b"XPDS"), "Cineon": (b"\x80\x2a\x5f\xd7",), "FLIF": (b"FLIF",),
    "KTX": (b"\xabKTX ",), "XPM": (b"/* XPM */",),
    "camera raw": (b"FUJIFILMCCD", b"IIRO", b"IIRS", b"IIU\0", b"\0MRM"),
    "PNM": tuple(f"P{kind}{space}".encode() for kind in range(1, 8) for space in " \t\r\n"),
}
_OTHERS: dict[str, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",), "ZIP": (b"PK\3\4",), "bzip2": (b"BZh",), "xz": (b"\xfd7zXZ\0",),
    "zstd": (b"\x28\xb5\x2f\xfd",), "7-zip": (b"7z\xbc\xaf",), "RAR": (b"Rar!",),
    "HDF5": (b"\x89HDF",), "NumPy": (b"\x93NUMPY",), "Parquet": (b"PAR1",),
    "Flash": (b"FWS", b"CWS"), "Matroska video": (b"\x1a\x45\xdf\xa3",), "Ogg": (b"OggS",),
    "MP3": (b"ID3",),
}
# fmt: on
_TEXTS = {
    "HTML": (b"<!doctype html", b"<html", b"<head", b"<body"),
    "XML": (b"<?xml", b"<"),
    "JSON": (b"{", b"["),
}
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)


def identify(data: bytes) -> str | None:
    """The image format of a file, by its first bytes; None if it begins like no image."""
    head = data[:4096]
    if head[4:8] == b"ftyp":
        return _iso_media(head[8:64])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if head[:4] == b"II*\0" and head[8:10] == b"CR":
        return "camera raw"
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[:4] == b"\1\0\0\0" and head[40:44] == b" EMF":
        return "EMF"
    if head[:4] == b"FORM" and head[8:12] in (b"ILBM", b"PBM "):
        return "ILBM"
    text = _text(head)
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return "SVG" if b"<svg" in text and b"<html" not in text else None
    named = next((form for form, first in _IMAGES.items() if head.startswith(first)), None)
    if named:
        return named
    if _is_icon(data):
        return "ICO" if head[2] == 1 else "CUR"
    return "TGA" if _is_tga(data) else None


def describe(data: bytes) -> str:
    """Name bytes other than an image, as far as they tell; never a byte of them."""
    head = data[:4096]
    if data.count(0) == len(data):
        return "nothing but zero bytes"
    if head[4:8] == b"ftyp":
        return "a video or another file of the MP4 family"
    if head[:4] == b"RIFF":
        return "a RIFF file that is not WebP"
    found = next((name for name, first in _OTHERS.items() if head.startswith(first)), None)
    text = _text(head)
    found = found or next((name for name, first in _TEXTS.items() if text.startswith(first)), None)
    if found:
        return f"{found}, no image"
    printable = bytes(range(32, 127)) + b"\t\r\n\f"
    if text and not text.translate(None, printable):
        return "plain text, no image"
    return "no image format begins like this"


def _text(head: bytes) -> bytes:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()


def _iso_media(brands: bytes) -> str | None:
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    if brands.startswith(b"crx "):
        return "camera raw"
    heif = (b"hei", b"hev", b"mif1", b"msf1")
    return "HEIC" if any(brand in brands for brand in heif) else None


def _is_icon(data: bytes) -> bool:
    """Whether the first picture of an icon's or cursor's directory lies inside the file."""
    if len(data) < 22:
        return False
    zero, kind, count = struct.unpack_from("<3H", data)
    length, offset = struct.unpack_from("<II", data, 14)
    return zero == 0 and kind in (1, 2) and 6 + 16 * count <= offset < len(data) and length > 0


def _is_tga(data: bytes) -> bool:
    """Whether a file has TGA's footer, or a possible header: its format has no mark."""
    if data[-18:] == b"TRUEVISION-XFILE.\0":
        return True
    if len(data) < 18:
        return False
    _, mapped, kind, _, entries, entry_bits = struct.unpack_from("<BBBHHB", data)
    _, _, width, height, bits, descriptor = struct.unpack_from("<4HBB", data, 8)
    if kind in (1, 9):
        possible = mapped == 1 and entries > 0 and entry_bits in (15, 16, 24, 32) and bits == 8
    else:
        depths = (15, 16, 24, 32) if kind in (2, 10) else (8, 16) if kind in (3, 11) else ()
        possible = mapped == 0 and entries == entry_bits == 0 and bits in depths
    return possible and width > 0 and height > 0 and descriptor < 64
