"""Categorical draws over voxels, by inverting the running sum: much faster than torch.multinomial."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_categories(probabilities: Tensor) -> Tensor:
    """One category for every voxel: probabilities (..., M, J), normalised over M, to int64 (..., J)."""
    weights = probabilities.unbind(-2)
    uniform = torch.rand_like(weights[0])
    drawn = torch.zeros(uniform.shape, dtype=torch.int64, device=uniform.device)
    running = torch.zeros_like(uniform)
    for weight in weights[:-1]:
        running = running + weight
        drawn += uniform >= running
    return drawn
