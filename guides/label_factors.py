"""The label factors of the enumerated guide: q(s | z) = f gives Jensen's bound, q(s | z, x) = r the exact one.

A network's q(s | x) = u gives the bound between them that is tight at u = r, see `label_network`.
"""

from __future__ import annotations

from typing import Literal

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..models.intensity import IntensityParameters
from ..models.segmentation import SegmentationModel, voxels_first
from .label_network import AnyContrastNetwork


class LabelFactorGuide(PyroModule):
    """A guide of z with a label factor beside it, enumerated over labels.

    Args:
        guide: samples `z`. model: the program whose f and p(x|s) make the factor.
        factor: `prior` for f, `posterior` for r, or a network (scan, observed) → scores for u ∝ p_loc exp(scores).
        detach: no gradient through the factor.
    """

    def __init__(
        self,
        guide: PyroModule,
        model: SegmentationModel,
        factor: Literal["prior", "posterior"] | nn.Module,
        detach: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(factor, nn.Module) and factor not in ("prior", "posterior"):
            raise ValueError(f"unknown label factor {factor!r}; choose 'prior' (f) or 'posterior' (r)")
        self.z_guide, self.model, self.factor, self.detach = guide, model, factor, detach

    def forward(self, scan: Tensor, observed: Tensor, theta: IntensityParameters) -> Tensor:
        """Sample z (B, D) and enumerate the labels of every voxel."""
        shape, intensity = self.model.shape_prior, self.model.intensity
        with poutine.block(hide=["scans"]):  # the plate is entered again below: one site of that name a trace
            z: Tensor = self.z_guide(scan, observed, theta)
        network = self.factor if isinstance(self.factor, nn.Module) else None
        location = shape.log_location_prior
        if isinstance(network, AnyContrastNetwork):
            location = network.location(location)
        logits = shape.log_label_probs(z) if network is None else network(scan, observed) + location
        logits = logits.flatten(-len(shape.grid))
        observed = observed.expand(-1, intensity.channels, *shape.grid).flatten(2)
        if self.factor == "posterior":
            flat = torch.where(observed, scan.flatten(2), 0.0)
            logits = logits + intensity.label_log_prob(flat, observed, theta)
        logits = voxels_first(logits.detach() if self.detach else logits)
        with pyro.plate("scans", scan.shape[0], dim=-1), poutine.scale(scale=self.model.likelihood_power):
            with poutine.mask(mask=observed.any(1).T), pyro.plate("voxels", logits.shape[-3], dim=-2):
                pyro.sample("labels", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        return z
