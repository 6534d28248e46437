"""Image preprocessing as the checkpoint asks for it: RGB photo -> uint8 pixels -> model input.

Two halves, because uint8 travels between processes and floats do not: `resize` runs on the CPU
workers beside the decoder, `normalize` on the model's device. Together they equal transformers'
CLIPImageProcessor and ViTImageProcessor (CLIPSeg's) with the PIL backend to 1e-6.

Shapes: B batch, H and W the height and width of the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.errors import CheckpointError
from pipeline.prepare.resize import Box, crop_center, resize_and_crop
from pipeline.storage.documents import read_json

if TYPE_CHECKING:  # 2 s and 200 MB in every process, and those that only resize need none of it
    import torch

CONFIG_FILE = "preprocessor_config.json"
# Processors saved by transformers 5 nest the same fields here; like there, it goes first.
NESTED_FILE = "processor_config.json"

# A guard against absurd configs; the largest image size in use is 1,024 or so.
MAX_SIDE_PX = 8192

CLIP_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
VIT_DEFAULTS: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": False,
}
COMMON_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """The options of preprocessor_config.json and the two halves of the work they describe.

    All sizes are (height, width) in pixels.
    """

    do_resize: bool
    size: tuple[int, int] | int
    """(height, width), aspect not kept; or the length of the shortest edge, aspect kept."""
    resample: int
    """Pillow's filter: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming."""
    do_center_crop: bool
    crop_size: tuple[int, int]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    do_convert_rgb: bool

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageProcessor:
        """Read the folder's processor_config.json (its `image_processor` entry, if any) or else its
        preprocessor_config.json. CheckpointError names the file and the field."""
        nested = Path(folder) / NESTED_FILE
        if nested.is_file():
            entry = read_json(nested).get("image_processor")
            if entry is not None:
                return cls.from_dict(entry, name=f"{nested}: image_processor")
        path = Path(folder) / CONFIG_FILE
        return cls.from_dict(read_json(path), name=str(path))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, name: str = CONFIG_FILE) -> ImageProcessor:
        """Build from the fields of the file `name`; absent and null ones take the defaults of the
        processor class named in the file. Raises CheckpointError naming file and field."""
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{name}: expected a JSON object, found {_show(config)}")
        kind = _kind(config, name)
        defaults = COMMON_DEFAULTS | (CLIP_DEFAULTS if kind == "CLIP" else VIT_DEFAULTS)
        given = {k: v for k, v in config.items() if v is not None}
        if given.get("do_pad"):
            raise CheckpointError(f"{name}: do_pad is not supported")
        field = _Fields(name, defaults | given)
        return cls(
            do_resize=field.boolean("do_resize"),
            # A bare int means the shortest edge to CLIP and a square to ViT.
            size=field.size("size", int_is_shortest_edge=kind == "CLIP"),
            resample=field.resample("resample"),
            do_center_crop=field.boolean("do_center_crop"),
            crop_size=field.box("crop_size"),
            do_rescale=field.boolean("do_rescale"),
            rescale_factor=field.number("rescale_factor"),
            do_normalize=field.boolean("do_normalize"),
            image_mean=field.triple("image_mean"),
            image_std=field.triple("image_std", positive=True),
            do_convert_rgb=field.boolean("do_convert_rgb"),
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every output. Raises CheckpointError if it varies with the input:
        without a crop, when images are not resized or only their shortest edge is fixed."""
        if self.do_center_crop:
            return self.crop_size
        if self.do_resize and isinstance(self.size, tuple):
            return self.size
        found = "do_resize is off" if not self.do_resize else "size fixes only the shortest edge"
        raise CheckpointError(
            f"{CONFIG_FILE}: {found} and do_center_crop is off, so images have no common size; "
            "set size to a height and a width, or turn do_center_crop on"
        )

    @property
    def least_size(self) -> tuple[int, int] | None:
        """The smallest (height, width) not enlarged by the resize; None without resizing."""
        if not self.do_resize:
            return None
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resize and crop an RGB image: (H, W, 3) uint8, 0..255.

        Pillow's resampling with its antialias; zeros around an image smaller than the crop. Other
        modes are converted (Pillow's way) if the config says do_convert_rgb, else refused with a
        ValueError: pipeline.prepare.decode_image makes RGB of every mode with more care.
        """
        return np.array(self.fit(image))

    def fit(
        self,
        image: Image.Image,
        whole: tuple[int, int] | None = None,
        box: Box | None = None,
    ) -> Image.Image:
        """As resize, still an image; `whole` and `box` of one decoded smaller: its own (height,
        width), and the place of its pixels in the image."""
        if image.mode != "RGB":
            if not self.do_convert_rgb:
                raise ValueError(f"expected an RGB image, found mode {image.mode}")
            image = image.convert("RGB")
        if self.do_resize:
            size = self._resized_size(*(whole or (image.height, image.width)))
            crop = self.crop_size if self.do_center_crop else size
            image = resize_and_crop(image, size, crop, self.resample, box)
        elif self.do_center_crop:
            image = crop_center(image, self.crop_size)
        return image

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 on any device -> (B, 3, H, W) float32 on the same device."""
        import torch

        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self.do_rescale:
            x.mul_(self.rescale_factor)
        if self.do_normalize:
            x.sub_(x.new_tensor(self.image_mean).view(3, 1, 1))
            x.div_(x.new_tensor(self.image_std).view(3, 1, 1))
        return x

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Both halves: B images of any sizes -> (B, 3, H, W) float32.

        ValueError for images coming out at different sizes: group_by_size is for these.
        """
        groups = self.group_by_size(images)
        if len(groups) != 1:
            sizes = ", ".join(f"{height} x {width}" for height, width in groups) or "no images"
            raise ValueError(f"a batch needs images that come out at one size, found {sizes}")
        return next(iter(groups.values()))[1]

    def group_by_size(
        self, images: Sequence[Image.Image]
    ) -> dict[tuple[int, int], tuple[list[int], torch.Tensor]]:
        """Both halves, one batch for every output size (H, W): indices of images, and their pixels.

        The value is the indices of B of the images, increasing, and their (B, 3, H, W) float32.
        """
        import torch

        rows: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
        for i, pixels in enumerate(map(self.resize, images)):
            rows.setdefault((pixels.shape[0], pixels.shape[1]), []).append((i, pixels))
        return {
            size: (
                [i for i, _ in group],
                self.normalize(torch.from_numpy(np.stack([pixels for _, pixels in group]))),
            )
            for size, group in rows.items()
        }

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short, long = sorted((height, width))
        long = int(self.size * long / short)
        return (long, self.size) if width <= height else (self.size, long)


def _kind(config: Mapping[str, Any], name: str) -> str:
    """'CLIP' or 'ViT', for its defaults and its meaning of an int `size`."""
    field = next(
        (f for f in ("image_processor_type", "feature_extractor_type") if config.get(f)), None
    )
    if field is None:
        return "CLIP" if "do_center_crop" in config else "ViT"
    pattern = r"(CLIP|ViT)(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?"
    match = re.fullmatch(pattern, str(config[field]))
    if match is None:
        raise CheckpointError(
            f"{name}: {field} is {_show(config[field])}; only CLIPImageProcessor and "
            "ViTImageProcessor (CLIPSeg's) are supported"
        )
    return match[1]


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Fields:
    """Checked access to the fields of one file; every error names the file and the field."""

    def __init__(self, name: str, values: Mapping[str, Any]):
        self.name, self.values = name, values

    def _wrong(self, field: str, rule: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: {field} must be {rule}, found {_show(self.values[field])}"
        )

    def boolean(self, field: str) -> bool:
        value = self.values[field]
        if not isinstance(value, bool):
            raise self._wrong(field, "true or false")
        return value

    def number(self, field: str) -> float:
        if not _is_number(self.values[field]):
            raise self._wrong(field, "a finite number")
        return float(self.values[field])

    def triple(self, field: str, *, positive: bool = False) -> tuple[float, float, float]:
        value = self.values[field]
        if _is_number(value):  # of all three channels
            value = [value] * 3
        if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)):
            raise self._wrong(field, "a list of 3 finite numbers")
        if len(value) != 3 or (positive and min(value) <= 0):
            raise self._wrong(field, "a list of 3 finite numbers" + " above 0" * positive)
        return (float(value[0]), float(value[1]), float(value[2]))

    def resample(self, field: str) -> int:
        value = self.values[field]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 5:
            raise self._wrong(field, "one of Pillow's filters, 0 to 5")
        return value

    def size(self, field: str, *, int_is_shortest_edge: bool) -> tuple[int, int] | int:
        value = self.values[field]
        if isinstance(value, Mapping) and set(_not_null(value)) == {"shortest_edge"}:
            value, int_is_shortest_edge = value["shortest_edge"], True
        if int_is_shortest_edge and _is_side(value):
            return int(value)
        return self.box(field)

    def box(self, field: str) -> tuple[int, int]:
        value = self.values[field]
        if isinstance(value, Mapping) and set(_not_null(value)) == {"height", "width"}:
            height, width = value["height"], value["width"]
        else:
            height = width = value
        if not _is_side(height) or not _is_side(width):
            known = "{height, width}, {shortest_edge}" if field == "size" else "{height, width}"
            raise self._wrong(field, f"{known} or an int, each 1 to {MAX_SIDE_PX} pixels")
        return (int(height), int(width))


def _not_null(value: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if v is not None}


def _is_number(value: object) -> bool:
    # The bound refuses NaN and infinity too, and ints too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE_PX
