"""COCO's run lengths of many masks at once -> strings, boxes and areas, as columns of a table.

The same as pycocotools' (maskApi.c: rleToString, rleToBbox, rleArea), without a call for each mask.
Needs no torch.

Shapes: N masks, K run lengths of all of them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_CHUNKS = 7  # of five bits: a difference of two int32
_AT_ONCE = 1 << 20  # run lengths; 60 bytes of memory for each


def mask_columns(counts: pa.ListArray, sizes: np.ndarray) -> dict[str, pa.Array]:
    """`rle`, `bbox` and `area` of schema.MASKS.

    counts: N lists of int32, at least one in each: the lengths of runs of 0 and of 1 in turn,
    column-major, the first of 0; sizes: (N, 2) heights and widths.
    """
    lengths = counts.flatten().to_numpy().astype(np.int64)
    if len(lengths) > _AT_ONCE and len(sizes) > 1:
        half = len(sizes) // 2
        parts = [
            mask_columns(counts[part], sizes[part]) for part in (slice(half), slice(half, None))
        ]
        return {name: pa.concat_arrays([part[name] for part in parts]) for name in parts[0]}
    offsets = counts.offsets.to_numpy()
    offsets = offsets - offsets[0]
    within = np.arange(len(lengths)) - np.repeat(offsets[:-1], np.diff(offsets))
    both = pa.ListArray.from_arrays(
        pa.array(np.arange(0, 2 * len(sizes) + 1, 2, dtype=np.int32)),
        pa.array(sizes.reshape(-1).astype(np.int32)),
    )
    strings = _strings(lengths, within, offsets)
    boxes, areas = _boxes(lengths, within, offsets, sizes[:, 0])
    box = pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1).astype(np.float32)), 4)
    rle = pa.StructArray.from_arrays([both, strings], names=["size", "counts"])
    return {"rle": rle, "bbox": box, "area": pa.array(areas)}


def _strings(lengths: np.ndarray, within: np.ndarray, offsets: np.ndarray) -> pa.StringArray:
    """COCO's compressed counts: from the fourth on differences to the last but one, in groups of
    five bits, the lowest first; `within` (K,) are places in the mask's own list."""
    values = lengths.copy()
    values[2:] -= np.where(within[2:] > 2, lengths[:-2], 0)
    groups = np.zeros((len(values), _CHUNKS), np.uint8)
    used = np.zeros((len(values), _CHUNKS), np.bool_)
    going = np.ones(len(values), np.bool_)
    for i in range(_CHUNKS):
        group = values & 31
        values >>= 5
        more = np.where(group & 16, values != -1, values != 0)
        groups[:, i] = group + 48 + 32 * more
        used[:, i] = going
        going = going & more
        if not going.any():
            break
    ends = np.concatenate([[0], used.sum(1).cumsum()])[offsets]
    data = groups[used]
    return pa.StringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(data)
    )


def _boxes(
    lengths: np.ndarray, within: np.ndarray, offsets: np.ndarray, heights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) x, y, width, height, zeros for an empty mask, and (N,) areas: int64."""
    boxes, areas = np.zeros((len(heights), 4), np.int64), np.zeros(len(heights), np.int64)
    of = np.repeat(np.arange(len(heights)), np.diff(offsets))
    runs = within % 2 == 1
    if not runs.any():
        return boxes, areas
    mask, inside = of[runs], lengths[runs]
    total = lengths.cumsum()
    before = np.concatenate([[0], total])[offsets[:-1]]
    last = total[runs] - before[mask] - 1
    height = heights[mask]
    (x0, y0), (x1, y1) = np.divmod(last - inside + 1, height), np.divmod(last, height)
    y0, y1 = np.where(x0 < x1, 0, y0), np.where(x0 < x1, height - 1, y1)
    first = np.flatnonzero(np.diff(mask, prepend=-1))
    filled = mask[first]
    left, top = np.minimum.reduceat(x0, first), np.minimum.reduceat(y0, first)
    right, bottom = np.maximum.reduceat(x1, first), np.maximum.reduceat(y1, first)
    boxes[filled] = np.stack([left, top, right - left + 1, bottom - top + 1], axis=1)
    areas[filled] = np.add.reduceat(inside, first)
    return boxes, areas
