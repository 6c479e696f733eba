"""q(z | s): the guide of stage 1."""

from __future__ import annotations

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..models.decoders import Lattice
from ..models.shape_prior import ShapePrior
from .families import Family, covariance_of


class LabelMapGuide(PyroModule):
    """q(z | s) from one-hot label maps; unobserved voxels are zero in every channel.

    The encoder speaks of the decoder's own coordinates u; `follow` makes it answer in those of a calibrated prior,
    u = m + L z, where q is a full normal.

    Args:
        encoder: (B, M, *grid) → raw parameters. family: raw parameters → distribution. num_labels: M.
    """

    latent_loc: Tensor
    latent_scale_tril: Tensor

    def __init__(self, encoder: nn.Module, family: Family, num_labels: int) -> None:
        super().__init__()
        self.label_encoder, self.family, self.num_labels = encoder, family, num_labels
        self.register_buffer("latent_loc", torch.zeros(family.latent_dim))
        self.register_buffer("latent_scale_tril", torch.eye(family.latent_dim))
        self.calibrated = False

    def follow(self, shape_prior: ShapePrior) -> None:
        """Take over the coordinates of a calibrated prior."""
        self.latent_loc.copy_(shape_prior.latent_loc)
        self.latent_scale_tril.copy_(shape_prior.latent_scale_tril)
        self.calibrated = True

    def raw(self, labels: Tensor, observed: Tensor) -> Tensor:
        """Raw parameters, (B, P), of label positions (B, *grid) with observed (B, 1, *grid)."""
        weight = next(self.label_encoder.parameters())
        seen = observed[:, 0]
        one_hot = weight.new_zeros(labels.shape[0], self.num_labels, *labels.shape[1:])
        known = torch.where(seen, labels.long(), 0)  # what stands in unobserved voxels is no label
        one_hot.scatter_(1, known.unsqueeze(1), seen.to(weight.dtype).unsqueeze(1))
        raw: Tensor = self.label_encoder(one_hot)
        return raw.to(torch.promote_types(weight.dtype, torch.float32))

    def posterior(self, labels: Tensor, observed: Tensor) -> dist.Distribution:
        """q(z | s)."""
        posterior: dist.Distribution = self.family(self.raw(labels, observed))
        return self._standardised(posterior) if self.calibrated else posterior

    def _standardised(self, posterior: dist.Distribution) -> dist.Distribution:
        """q(z) from q(u): N(L⁻¹(a − m), L⁻¹ Σ L⁻ᵀ)."""
        covariance = covariance_of(posterior)
        scale_tril = self.latent_scale_tril.double()
        centred = (posterior.mean - self.latent_loc).double().unsqueeze(-1)
        loc = torch.linalg.solve_triangular(scale_tril, centred, upper=False).squeeze(-1)
        root = torch.linalg.solve_triangular(scale_tril, torch.linalg.cholesky(covariance.double()), upper=False)
        # L⁻¹ chol(Σ) is lower triangular with a positive diagonal: it is the Cholesky factor
        return dist.MultivariateNormal(loc.to(posterior.mean.dtype), scale_tril=root.to(posterior.mean.dtype))

    def forward(self, labels: Tensor, observed: Tensor, lattice: Lattice | None = None) -> Tensor:
        """Sample z (B, D) from whole label maps; the lattice is the program's."""
        with pyro.plate("scans", labels.shape[0], dim=-1):
            z: Tensor = pyro.sample("z", self.posterior(labels, observed))
        return z
