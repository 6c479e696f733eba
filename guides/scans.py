"""q(z | x): the amortised guide of stage 2."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from .families import Family


class ScanGuide(PyroModule):
    """q(z | x) from normalised scans and what of them is observed; the encoder sees 2 C channels.

    Args:
        encoder: (B, 2 C, *grid) → raw parameters. family: raw parameters → distribution.
    """

    def __init__(self, encoder: nn.Module, family: Family) -> None:
        super().__init__()
        self.scan_encoder, self.family = encoder, family

    def raw(self, scan: Tensor, observed: Tensor) -> Tensor:
        """Raw parameters, (B, P), of scans (B, C, *grid) with observed (B, C or 1, *grid)."""
        seen = observed.expand_as(scan)
        image = torch.cat([torch.where(seen, scan, 0.0), seen.to(scan.dtype)], 1)
        raw: Tensor = self.scan_encoder(image)
        return raw.to(torch.promote_types(scan.dtype, torch.float32))

    def posterior(self, scan: Tensor, observed: Tensor) -> dist.Distribution:
        """q(z | x)."""
        posterior: dist.Distribution = self.family(self.raw(scan, observed))
        return posterior

    def forward(self, scan: Tensor, observed: Tensor | None = None, theta: Any = None) -> Tensor:
        """Sample z (B, D)."""
        if observed is None:
            observed = torch.ones_like(scan[:, :1], dtype=torch.bool)
        with pyro.plate("scans", scan.shape[0], dim=-1):
            z: Tensor = pyro.sample("z", self.posterior(scan, observed))
        return z
