"""q(z | s) of a warped atlas: each label map's own deformation, found by gradient; no network."""

from __future__ import annotations

from typing import Any, Self

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor

from ..models.decoders import Lattice, random_lattice
from ..models.warped_atlas import WarpedAtlas
from .families import Family, kl_to_prior

STEPS = 50
RATE = 0.15  # of Adam, down to a tenth
START_SCALE = 0.3  # sd before the first step
STRIDE = 2  # of the lattice of voxels, placed at random, on which a step's likelihood is taken


class DeformationGuide(PyroModule):
    """q(z | s) by gradient steps on the bound of stage 1; the interface of `LabelMapGuide`, without weights.

    Args:
        atlas: p(z) p(s|z). family: raw parameters → distribution. steps: of each label map.
    """

    def __init__(self, atlas: WarpedAtlas, family: Family, steps: int = STEPS) -> None:
        super().__init__()
        self.family, self.steps = family, steps
        self._atlas = (atlas,)  # in a tuple: its tensors are not the guide's to store

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        (atlas,) = self._atlas
        atlas._apply(*args, **kwargs)  # but where the guide goes (`to`), it goes
        moved: Self = super()._apply(*args, **kwargs)
        return moved

    def infer(self, labels: Tensor, observed: Tensor, start: Tensor | None = None) -> tuple[dist.Distribution, Tensor]:
        """q(z|s) and its bound per voxel, the mean of the last third of the steps, both of batch shape (B,).

        Args:
            labels: positions, (B, *grid). observed: bool, (B, 1, *grid). start: means of q(z|s) before the first step,
                (B, D); None starts from the template.
        """
        starts = [None] * len(labels) if start is None else list(start)
        found = [self._infer(s, o, z) for s, o, z in zip(labels, observed, starts, strict=True)]
        raw = torch.stack([one for one, _ in found])
        posterior: dist.Distribution = self.family(raw)
        return posterior, torch.stack([bound for _, bound in found])

    def _infer(self, labels: Tensor, observed: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        (atlas,) = self._atlas
        z = atlas.log_location_prior.new_zeros(atlas.latent_dim) if start is None else start
        raw = self.family.raw_at(z, START_SCALE).requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=RATE, betas=(0.8, 0.95))
        labels, observed = labels.flatten(), observed.flatten()
        index = torch.arange(len(labels), device=labels.device).view(atlas.grid)
        bounds = []
        with torch.enable_grad():
            for step in range(self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * (1 - 0.9 * step / self.steps)
                voxels = index[random_lattice(atlas.grid, STRIDE)].flatten()
                share = len(voxels) / len(labels)
                voxels = voxels[observed[voxels]]
                posterior = self.family(raw)
                log_prob = atlas.label_log_prob(posterior.rsample(), labels[voxels], voxels).sum() / share
                bound = (log_prob - kl_to_prior(posterior, atlas.prior())) / len(labels)
                optimizer.zero_grad()
                (-bound * len(labels)).backward()
                optimizer.step()
                bounds.append(bound.detach())
        return raw.detach(), torch.stack(bounds[-max(1, self.steps // 3) :]).mean()

    def posterior(self, labels: Tensor, observed: Tensor) -> dist.Distribution:
        """q(z | s)."""
        return self.infer(labels, observed)[0]

    def forward(self, labels: Tensor, observed: Tensor, lattice: Lattice | None = None) -> Tensor:
        """Sample z (B, D) from whole label maps."""
        with pyro.plate("scans", labels.shape[0], dim=-1):
            z: Tensor = pyro.sample("z", self.posterior(labels, observed))
        return z
