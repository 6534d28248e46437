"""TIFF files of any layout, written from their samples: more of them than tifffile writes."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np

NONE, LZW, JPEG, DEFLATE, PACKBITS = 1, 5, 7, 8, 32773
_KINDS = {"u": 1, "i": 2, "f": 3}


@dataclass(frozen=True, kw_only=True)
class Tiff:
    """One page. Fields are named as TIFF's tags and have their values."""

    samples: np.ndarray
    """(H, W, S) of uint, int or float."""
    photometric: int = 1
    bits: int = 0
    """Of a sample, most significant ones first in a row; 0 for those of the array's type."""
    extra: tuple[int, ...] = ()
    planar: int = 1
    tile: int = 0
    """Side of a tile in pixels; 0 for strips of 8 rows."""
    order: str = "<"
    compression: int = NONE
    predictor: int = 1
    fill: int = 1
    tags: dict[int, list[int]] = field(default_factory=dict)
    """More tags, of type SHORT."""

    def encode(self) -> bytes:
        height, width, samples = self.samples.shape
        bits = self.bits or 8 * self.samples.dtype.itemsize
        pieces = [self._squeeze(block, bits) for block in self._blocks()]
        tags: dict[int, tuple[str, list[int]]] = {
            256: ("I", [width]),
            257: ("I", [height]),
            258: ("H", [bits] * samples),
            259: ("H", [self.compression]),
            262: ("H", [self.photometric]),
            266: ("H", [self.fill]),
            277: ("H", [samples]),
            284: ("H", [self.planar]),
            317: ("H", [self.predictor]),
            339: ("H", [_KINDS[self.samples.dtype.kind]] * samples),
        }
        if self.extra:
            tags[338] = ("H", list(self.extra))
        body, offsets = b"", []
        for piece in pieces:
            offsets.append(8 + len(body))
            body += piece + bytes(len(piece) % 2)
        if self.tile:
            tags |= {322: ("I", [self.tile]), 323: ("I", [self.tile])}
        else:
            tags[278] = ("I", [8])
        tags |= {324 if self.tile else 273: ("I", offsets)}
        tags |= {325 if self.tile else 279: ("I", [len(piece) for piece in pieces])}
        tags |= {tag: ("H", values) for tag, values in self.tags.items()}
        return file(tags, body, self.order)

    def _blocks(self) -> list[np.ndarray]:
        planes = [self.samples]
        if self.planar == 2:
            planes = np.split(self.samples, self.samples.shape[2], axis=2)
        if not self.tile:
            return [plane[y : y + 8] for plane in planes for y in range(0, plane.shape[0], 8)]
        side, blocks = self.tile, []
        for plane in planes:
            height, width, _ = plane.shape
            padded = np.pad(plane, ((0, -height % side), (0, -width % side), (0, 0)))
            for y in range(0, height, side):
                for x in range(0, width, side):
                    blocks.append(padded[y : y + side, x : x + side])
        return blocks

    def _squeeze(self, block: np.ndarray, bits: int) -> bytes:
        block = np.ascontiguousarray(block)
        if self.compression == JPEG:
            space = {1: None, 2: "RGB", 6: "YCBCR"}[self.photometric]
            grey = block[..., 0] if block.shape[2] == 1 else block
            return bytes(imagecodecs.jpeg_encode(grey, 95, outcolorspace=space, subsampling="444"))
        ordered = block.dtype.newbyteorder(self.order)
        if self.predictor == 2:
            raw = imagecodecs.delta_encode(block, axis=1).astype(ordered).tobytes()
        elif self.predictor == 3:
            raw = imagecodecs.floatpred_encode(block.astype(ordered), axis=1).tobytes()
        elif bits % 8 == 0:
            raw = block.astype(ordered).tobytes()
        else:
            rows = block.reshape(len(block), -1, 1).astype(">u2").view(np.uint8)
            raw = np.packbits(np.unpackbits(rows, axis=2)[..., -bits:].reshape(len(block), -1), 1)
            raw = raw.tobytes()
        row = len(raw) // len(block)
        squeezed = {
            NONE: lambda: raw,
            LZW: lambda: bytes(imagecodecs.lzw_encode(raw)),
            DEFLATE: lambda: zlib.compress(raw),
            PACKBITS: lambda: b"".join(
                imagecodecs.packbits_encode(raw[at : at + row]) for at in range(0, len(raw), row)
            ),
        }[self.compression]()
        return bytes(imagecodecs.bitorder_encode(squeezed)) if self.fill == 2 else squeezed


def file(tags: dict[int, tuple[str, list[int]]], body: bytes, order: str = "<") -> bytes:
    """One directory behind the body, which begins at byte 8; tags are (H or I, values)."""
    values = b""
    values_at = 8 + len(body) + 2 + 12 * len(tags) + 4
    directory = struct.pack(order + "H", len(tags))
    for tag, (kind, numbers) in sorted(tags.items()):
        packed: Any = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        directory += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(numbers))
        if len(packed) <= 4:
            directory += packed.ljust(4, b"\0")
        else:
            directory += struct.pack(order + "I", values_at + len(values))
            values += packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body))
    return head + body + directory + bytes(4) + values
