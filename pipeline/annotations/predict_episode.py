"""Samples of CLIPSeg's data sets -> probabilities, prepared as its code prepares them.

The three ways to the model's input of S x S, each from its own data set's code:

stretch   bilinear with aligned corners, without antialiasing (phrasecut)
pad       the longer side to S, both to multiples of 8, bilinear; black below or to the right;
          an image up to S stays (pascal-5i: PFENet's test_Resize)
resize    Pillow's bilinear, antialiased (coco-20i: torchvision's Resize)

Example images come through infer.visual_prompt, at another scale than there: see its docstring.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.annotations.episodes import Episode
from pipeline.errors import UsageError
from pipeline.infer.checkpoint import OpenModel
from pipeline.infer.device import Device
from pipeline.infer.visual_prompt import prepare_example
from pipeline.model.clipseg import CLIPSeg
from pipeline.prepare.processor import ImageProcessor


class Predict:
    """Probabilities of a sample by a checkpoint."""

    def __init__(self, model: str, device: str):
        """`device`: auto, cpu or cuda. Raises CheckpointError, UsageError."""
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.opened = OpenModel(model, CLIPSeg.from_folder, Device(kind))
        height, width = self.opened.processor.image_size
        if height != width:
            raise UsageError(f"--model {model}: its input of {height} x {width} is no square")
        self.side = height

    def __call__(self, episode: Episode) -> np.ndarray:
        """(H, W) float32, at the size of the truth: there bilinear, with aligned corners."""
        model, device = self.opened.model, self.opened.device
        pixels = fit_image(episode.image, episode.fit, self.opened.processor).to(device.torch)
        if episode.example is None:
            conditional = self.opened.encode_texts([episode.text]).to(device.torch)
        else:
            processor = self.opened.processor
            shown = prepare_example(*episode.example, processor, "crop_blur_highlight")
            (conditional,) = device.run(model.encode_image, [shown[None].to(device.torch)])

        def decode(x: Tensor) -> Tensor:
            logits = model.decode(model.activations(x), conditional, model.grid(x))
            share, size = logits.float().sigmoid(), episode.truth.shape
            return F.interpolate(share, size, mode="bilinear", align_corners=True)

        (found,) = device.run(decode, [pixels])
        return np.asarray(found[0, 0].cpu())


def fit_image(image: Image.Image, fit: str, processor: ImageProcessor) -> Tensor:
    """(1, 3, S, S) float32, normalised, of an RGB image, in one of the three ways."""
    side = processor.image_size[0]
    if fit == "resize":
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(image)).float()[None].permute(0, 3, 1, 2)
    if fit == "stretch":
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=True)
    if fit == "pad":
        height, width = _fit_inside(image.height, image.width, side)
        x = F.interpolate(x, (height, width), mode="bilinear")
        x = F.pad(x, (0, side - width, 0, side - height))
    return processor.normalize(x.permute(0, 2, 3, 1))


def _fit_inside(height: int, width: int, side: int) -> tuple[int, int]:
    """The size of an image shrunk to a longer side of at most `side`."""
    if max(height, width) <= side:
        return height, width
    ratio = side / max(height, width)
    short = int(min(height, width) * ratio) // 8 * 8
    long_ = side // 8 * 8
    return (long_, short) if height >= width else (short, long_)
