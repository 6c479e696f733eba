"""One robust affine map per scan and channel, so that a·x + b (a > 0) gives the same segmentation."""

from __future__ import annotations

import torch
from torch import Tensor

LOWER, UPPER = 0.02, 0.98  # percentiles taken to 0 and 1
CLIP = (-0.5, 1.5)  # single bright vessels must not stretch a Gaussian


def normalise(scan: Tensor, observed: Tensor, region: Tensor | None = None) -> Tensor:
    """Take the 2nd percentile of the observed voxels to 0, the 98th to 1, clip to [-0.5, 1.5]; unobserved voxels are 0.

    Args:
        scan: intensities, (B, C, *grid); the content of unobserved voxels, NaN included, has no influence.
        observed: bool, (B, C or 1, *grid).
        region: bool, broadcasts to the scan: the observed voxels of which the percentiles are; None for all.

    Returns:
        Normalised intensities, (B, C, *grid). A constant scan becomes 0.
    """
    observed = observed.expand_as(scan)
    ranked = observed if region is None else observed & region
    flat = torch.where(ranked, scan, torch.full_like(scan, float("inf"))).flatten(2)
    ordered = flat.sort(-1).values
    count = ranked.flatten(2).sum(-1, keepdim=True)
    last = (count - 1).clamp(min=0)
    lower = ordered.gather(-1, (last * LOWER).round().long())
    upper = ordered.gather(-1, (last * UPPER).round().long())
    width = upper - lower
    usable = (count > 0) & (width > 0)
    width = torch.where(usable, width, torch.ones_like(width))
    lower = torch.where(usable, lower, torch.zeros_like(lower))
    shape = (*lower.shape[:2], *[1] * (scan.dim() - 2))
    scaled = ((scan - lower.view(shape)) / width.view(shape)).clamp(*CLIP)
    return torch.where(observed & usable.view(shape), scaled, torch.zeros_like(scan))
