"""q(z) fitted to the scans at hand: one vector of raw parameters a scan, no network."""

from __future__ import annotations

from typing import Any

import pyro
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from .families import Family


class PerScanGuide(PyroModule):
    """q(z) of a fixed batch of scans.

    Args:
        family: raw parameters → distribution. raw: where to start, (B, P): zeros for the prior, or an encoder's output.
    """

    def __init__(self, family: Family, raw: Tensor) -> None:
        super().__init__()
        self.family = family
        self.raw = nn.Parameter(raw.detach().clone())

    def posterior(self) -> dist.Distribution:
        """q(z), batch shape (B,)."""
        posterior: dist.Distribution = self.family(self.raw)
        return posterior

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Sample z (B, D); nothing of the scan is looked at."""
        with pyro.plate("scans", self.raw.shape[0], dim=-1):
            z: Tensor = pyro.sample("z", self.posterior())
        return z
