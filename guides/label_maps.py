"""q(z | s): the guide of stage 1."""

from __future__ import annotations

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional

from .families import Family


class LabelMapGuide(PyroModule):
    """q(z | s) from one-hot label maps; unobserved voxels are zero in every channel.

    Args:
        encoder: (B, M, *grid) → raw parameters. family: raw parameters → distribution. num_labels: M.
    """

    def __init__(self, encoder: nn.Module, family: Family, num_labels: int) -> None:
        super().__init__()
        self.label_encoder, self.family, self.num_labels = encoder, family, num_labels

    def raw(self, labels: Tensor, observed: Tensor) -> Tensor:
        """Raw parameters, (B, P), of label positions (B, *grid) with observed (B, 1, *grid)."""
        weight = next(self.label_encoder.parameters())
        image = functional.one_hot(labels.long(), self.num_labels).movedim(-1, 1).to(weight.dtype)
        raw: Tensor = self.label_encoder(torch.where(observed, image, 0.0))
        return raw.to(torch.promote_types(weight.dtype, torch.float32))

    def posterior(self, labels: Tensor, observed: Tensor) -> dist.Distribution:
        """q(z | s)."""
        posterior: dist.Distribution = self.family(self.raw(labels, observed))
        return posterior

    def forward(self, labels: Tensor, observed: Tensor) -> Tensor:
        """Sample z (B, D)."""
        with pyro.plate("scans", labels.shape[0], dim=-1):
            z: Tensor = pyro.sample("z", self.posterior(labels, observed))
        return z
