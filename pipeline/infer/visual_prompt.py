"""Example images as prompts, prepared as CLIPSeg was trained with them, and mixed with texts.

The original's preparation (its `crop_blur_highlight352`) works on the normalised image: dark means
near the mean colour. Of an example and its mask, at the scale of the model's input:

1. normalise; outside the mask, blur by 15 x 15 (sigma 3) and multiply by 0.1
2. crop to the mask's box, wider by a tenth of its width and height on each side
3. pad to a square with 0, and resize to the model's input, nearest neighbour

Shapes: P prompts, N examples, E projection, (H, W) the model's input. Sizes are (height, width).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from scipy import ndimage
from torch import Tensor

from pipeline import storage
from pipeline.config.prompt import Example, Prompt
from pipeline.errors import RowError, StorageError, UsageError
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.texts import Progress
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.images import decode_image
from pipeline.prepare.processor import ImageProcessor

_LIMIT_BYTES = 2**28
_LONG_SIDES = 4  # the longer side of an example is at most so many times the model's input
_GAUSSIAN = np.exp(-(np.arange(-7, 8) ** 2) / (2 * 3.0**2))
_KERNEL = (_GAUSSIAN / _GAUSSIAN.sum()).astype(np.float32)


class _Mode(NamedTuple):
    """How an example is prepared; `background` multiplies the pixels outside of the mask."""

    crop: bool
    blur: bool
    background: float


_MODES = {
    "crop_blur_highlight": _Mode(True, True, 0.1),
    "crop": _Mode(True, False, 1.0),
    "blur_highlight": _Mode(False, True, 0.1),
    "blur": _Mode(False, True, 1.0),
    "highlight": _Mode(False, False, 0.1),
    "image": _Mode(False, False, 1.0),
}


def prepare_example(
    image: Image.Image, mask: np.ndarray, processor: ImageProcessor, mode: str
) -> Tensor:
    """The visual prompt (3, H, W) float32, normalised, of an RGB image.

    mask: (h, w) bool of the image's size, with at least one pixel set; mode: one of
    config.prompt.VISUAL_MODES. The image is scaled to the model's input by its shorter side, as in
    the original's square crops.
    """
    how = _MODES[mode]
    target = processor.image_size
    scale = min(target) / min(image.size)
    scale = min(scale, _LONG_SIDES * max(target) / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height), Image.Resampling(processor.resample))
    x = processor.normalize(torch.from_numpy(np.array(small)[None]))[0].numpy()
    inside = mask[np.ix_(_nearest(mask.shape[0], height), _nearest(mask.shape[1], width))]
    if not inside.any():  # an example smaller than a pixel of the model's
        y, x0 = (np.argwhere(mask)[0] * scale).astype(int)
        inside[min(y, height - 1), min(x0, width - 1)] = True
    outside = _blur(x) if how.blur else x
    x = np.where(inside, x, np.float32(how.background) * outside)
    if how.crop:
        rows, columns = _widened(inside.any(1)), _widened(inside.any(0))
        x = x[:, rows, columns]
    return torch.from_numpy(_resize_nearest(_pad_to_square(x), target))


def encode_prompts(
    opened: OpenModel[CLIPSeg],
    prompts: Sequence[Prompt],
    max_pixels: int,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """Conditional embeddings (P, E) float32, not normalised.

    A prompt's is the weighted mean of its text (the mean of its texts, with weight 1) and of its
    examples. Raises UsageError for an unusable example, naming its file.
    """
    texts = list(dict.fromkeys(text for prompt in prompts for text in prompt.texts))
    found: dict[str, np.ndarray] = {}
    if texts:
        found = dict(zip(texts, opened.encode_texts(texts, on_progress).numpy(), strict=True))
    rows = []
    for prompt in prompts:
        parts = [np.mean([found[text] for text in prompt.texts], axis=0)] if prompt.texts else []
        weights = [1.0] * len(parts)
        for example in prompt.examples:
            parts.append(_encode_example(opened, example, max_pixels))
            weights.append(example.weight)
        rows.append(parts[0] if len(parts) == 1 else np.average(parts, axis=0, weights=weights))
    return np.stack(rows).astype(np.float32)


@torch.inference_mode()
def _encode_example(opened: OpenModel[CLIPSeg], example: Example, max_pixels: int) -> np.ndarray:
    """The embedding (E,) float32 of one example."""
    dimension = opened.model.config.projection_dim
    if example.embedding:
        vector = read_embedding(example.embedding, dimension)
    else:
        image, mask = open_example(example, max_pixels)
        pixels = prepare_example(image, mask, opened.processor, example.mode)
        vector = opened.model.encode_image(pixels[None])[0].numpy()
    if not np.isfinite(vector).all():
        raise UsageError(f"{example.file or example.embedding}: its embedding is not finite")
    return vector


def open_example(example: Example, max_pixels: int) -> tuple[Image.Image, np.ndarray]:
    """The upright RGB image of an example, and the pixels showing it: (h, w) bool.

    Raises UsageError, naming the file, for an unreadable one, a mask or box not fitting the image,
    and one without a pixel.
    """
    image = _decode(example.file, max_pixels)
    inside: np.ndarray = np.ones((image.height, image.width), np.bool_)
    if example.mask:
        mask = _decode(example.mask, max_pixels)
        if mask.size != image.size:
            raise UsageError(
                f"{example.mask}: {mask.height} x {mask.width} pixels, but the upright image "
                f"{example.file} has {image.height} x {image.width}"
            )
        inside = np.asarray(mask).max(axis=2) > 0
        if not inside.any():
            raise UsageError(f"{example.mask}: the mask is black everywhere; mark the example")
    elif example.box:
        x, y, width, height = example.box
        inside[:] = False
        rows = slice(math.floor(y), math.ceil(y + height))
        inside[rows, math.floor(x) : math.ceil(x + width)] = True
        if not inside.any():
            raise UsageError(
                f"{example.file}: the box {list(example.box)} lies outside the upright image of "
                f"{image.height} x {image.width} pixels"
            )
    return image, inside


def read_embedding(file: str, dimension: int) -> np.ndarray:
    """The mean (E,) float32 of the embeddings in a .npy or .safetensors file, (E,) or (N, E).

    Raises UsageError, naming the file, for another shape or type, or more than one tensor.
    """
    data = _read(file)
    try:
        if file.endswith(".npy"):
            array = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            tensors = load_safetensors(data)
            if len(tensors) != 1:
                raise UsageError(f"{file}: holds {len(tensors)} tensors; one is needed")
            array = next(iter(tensors.values()))
    except (
        ValueError,
        OSError,
        EOFError,
        MemoryError,
        SafetensorError,
        KeyError,
        SyntaxError,
    ) as error:
        raise UsageError(f"{file}: not readable ({str(error)[:200]})") from error
    shape = array.shape
    if not np.issubdtype(array.dtype, np.floating) or not 1 <= array.ndim <= 2 or not array.size:
        raise UsageError(f"{file}: needs floats (E,) or (N, E), found {array.dtype} {shape}")
    if shape[-1] != dimension:
        raise UsageError(f"{file}: embeddings of {shape[-1]} numbers, the model's have {dimension}")
    return np.atleast_2d(array).astype(np.float32).mean(axis=0)


def _read(file: str) -> bytes:
    try:
        data = storage.read_bytes(storage.check_uri(file), limit_bytes=_LIMIT_BYTES + 1)
    except StorageError as error:
        raise UsageError(f"{file}: cannot be read ({error})") from error
    if len(data) > _LIMIT_BYTES:
        raise UsageError(f"{file}: larger than {_LIMIT_BYTES:,} bytes")
    return data


def _decode(file: str, max_pixels: int) -> Image.Image:
    try:
        return decode_image(_read(file), max_pixels=max_pixels).image
    except RowError as error:
        raise UsageError(f"{file}: {error.reason} ({error.detail})") from error


def _nearest(cells: int, outputs: int) -> np.ndarray:
    """The cell of each output, as nearest-neighbour interpolation has it."""
    return np.arange(outputs) * cells // outputs


def _blur(x: np.ndarray) -> np.ndarray:
    """(3, h, w) blurred as cv2.GaussianBlur((15, 15), 3) does, borders mirrored."""
    for axis in (1, 2):
        x = ndimage.correlate1d(x, _KERNEL, axis=axis, mode="mirror")
    return x


def _widened(marked: np.ndarray) -> slice:
    """From the first to the last mark, wider by a tenth on each side."""
    first, last = np.flatnonzero(marked)[[0, -1]]
    context = 0.1 * (last + 1 - first)
    return slice(int(max(0, first - context)), int(min(len(marked), last + 1 + context)))


def _pad_to_square(x: np.ndarray) -> np.ndarray:
    height, width = x.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    margins = (0, 0), (top, side - height - top), (left, side - width - left)
    return np.pad(x, margins)


def _resize_nearest(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = _nearest(x.shape[1], size[0]), _nearest(x.shape[2], size[1])
    return np.ascontiguousarray(x[:, rows][:, :, columns])
