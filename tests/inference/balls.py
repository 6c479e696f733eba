"""A population of balls, with scans of them."""

from __future__ import annotations

import torch
from torch import Tensor

GRID, LABELS = (10, 9, 8), 3


def population(scans: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Balls at random places, bright with noise: scans, observed, their probabilities, and log p_loc of such balls."""
    random = torch.Generator().manual_seed(1)
    axes = torch.stack(torch.meshgrid(*[torch.arange(n) for n in GRID], indexing="ij"), -1).float()

    def balls(number: int) -> Tensor:
        centre = 4.0 + torch.randn(number, 1, 1, 1, 3, generator=random)
        inside = torch.sigmoid(4 * (3.0 - (axes - centre).norm(dim=-1)))
        left = torch.sigmoid(4 * (centre[..., 0] - axes[..., 0]))
        return torch.stack([1 - inside, inside * left, inside * (1 - left)], 1)

    probabilities, many = balls(scans), balls(400)
    scan = 1 - probabilities[:, :1] + 0.1 * torch.randn(scans, 1, *GRID, generator=random)
    observed = torch.ones(scans, 1, *GRID, dtype=torch.bool)
    observed[:, :, :, :, -1] = False
    return scan, observed, probabilities, many.mean(0).clamp(min=1e-3).log().log_softmax(0)
