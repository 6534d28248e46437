"""Edges of masks, snapped to the edges in the image: He, Sun and Tang's guided filter (2013).

Near every pixel the probability is taken for a linear function of the image's colours, fitted by
least squares over a square around it. Its edges are then the image's. The fit is made on averages
of a few pixels, and its lines interpolated (He and Sun's fast guided filter, 2015).

Shapes: B looks, (h, w) their size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured on the synthetic scenes, see benchmarks/NOTES.md.
EPSILON = 1e-3  # of the fit: colours, 0 to 1, that vary by less than its root are one colour
STEP = 4  # pixels along a side, at most, that are averaged before the fit
LEAST = 1e-4  # the filtered probability, and 1 minus it: keeps logits finite


def refine(logits: Tensor, image: Tensor, radius: int) -> Tensor:
    """Logits (B, h, w) float32, following the edges of images (B, h, w, 3) uint8.

    `radius` in pixels, of the squares. NaN where `logits` are not finite.
    """
    step = math.gcd(STEP, radius, *logits.shape[1:])
    guide = image.permute(0, 3, 1, 2).float() / 255
    terms = torch.cat([guide, logits.sigmoid()[:, None]], 1)
    small = F.avg_pool2d(terms, step).double()
    lines = fit_lines(small[:, :3], small[:, 3:], radius // step).float()
    lines = F.interpolate(lines, size=logits.shape[1:], mode="bilinear", align_corners=False)
    refined = (lines[:, :3] * guide).sum(1) + lines[:, 3]
    refined = refined.clamp(LEAST, 1 - LEAST).logit()
    return torch.where(logits.isfinite(), refined, torch.nan)


def fit_lines(guide: Tensor, p: Tensor, radius: int) -> Tensor:
    """(B, 4, h, w) float64: a, b of the means of a guide + b = p over squares around each pixel.

    guide: (B, 3, h, w), p: (B, 1, h, w), both float64.
    """
    first, second = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]
    terms = torch.cat([guide, p, guide * p, guide[:, first] * guide[:, second]], 1)
    mean_i, mean_p, mean_ip, mean_ii = box_mean(terms, radius).split([3, 1, 3, 6], 1)
    rr, rg, rb, gg, gb, bb = (mean_ii - mean_i[:, first] * mean_i[:, second]).unbind(1)
    rr, gg, bb = rr + EPSILON, gg + EPSILON, bb + EPSILON
    # The inverse of the symmetric 3 x 3 covariance, by its cofactors.
    c_rr, c_rg, c_rb = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    c_gg, c_gb, c_bb = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
    determinant = rr * c_rr + rg * c_rg + rb * c_rb
    inverse = torch.stack([c_rr, c_rg, c_rb, c_rg, c_gg, c_gb, c_rb, c_gb, c_bb], 1)
    covariance = mean_ip - mean_i * mean_p
    a = (inverse.unflatten(1, (3, 3)) * covariance[:, None]).sum(2) / determinant[:, None]
    b = mean_p - (a * mean_i).sum(1, keepdim=True)
    return box_mean(torch.cat([a, b], 1), radius)


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Means over the squares around each pixel of (..., h, w), cut at the borders."""
    for dim in (-2, -1):
        length = x.shape[dim]
        at = torch.arange(length, device=x.device)
        low, high = (at - radius).clamp(min=0), (at + radius + 1).clamp(max=length)
        total = F.pad(x.cumsum(dim), (1, 0) if dim == -1 else (0, 0, 1, 0))
        count = (high - low).to(x.dtype)
        count = count if dim == -1 else count[:, None]
        x = (total.index_select(dim, high) - total.index_select(dim, low)) / count
    return x
