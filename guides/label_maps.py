"""q(z | s): the guide of stage 1."""

from __future__ import annotations

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional


class LabelMapGuide(PyroModule):
    """q(z | s) from one-hot label maps; unobserved voxels are zero in every channel.

    Args:
        encoder: (B, M, *grid) → raw parameters. family: raw parameters → distribution. num_labels: M.
    """

    def __init__(self, encoder: nn.Module, family: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.label_encoder, self.family, self.num_labels = encoder, family, num_labels

    def posterior(self, labels: Tensor, observed: Tensor) -> dist.Distribution:
        """q(z | s) of label positions (B, *grid) with observed (B, 1, *grid)."""
        one_hot = functional.one_hot(labels.long(), self.num_labels).movedim(-1, 1)
        return self.posterior_of_probabilities(one_hot, observed)

    def posterior_of_probabilities(self, probabilities: Tensor, observed: Tensor) -> dist.Distribution:
        """q(z | s) where s is given as label probabilities, (B, M, *grid)."""
        dtype = next(self.label_encoder.parameters()).dtype
        image = torch.where(observed, probabilities.to(dtype), 0.0)
        posterior: dist.Distribution = self.family(self.label_encoder(image).to(torch.promote_types(dtype, torch.float32)))
        return posterior

    def forward(self, labels: Tensor, observed: Tensor) -> Tensor:
        """Sample z (B, D)."""
        with pyro.plate("scans", labels.shape[0], dim=-1):
            z: Tensor = pyro.sample("z", self.posterior(labels, observed))
        return z
