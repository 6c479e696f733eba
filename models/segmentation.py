"""The whole program z → s → x in its two forms, with one set of parameters: collapsed and enumerated."""

from __future__ import annotations

from typing import Any, Literal

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

from .intensity import IntensityModel, IntensityParameters
from .intensity_prior import IntensityPrior, SharedIntensity
from .label_mixture import LabelMixture, sample_intensities
from .shape_prior import LabelPrior
from .voxels import EVERYWHERE, seen_by_any

Form = Literal["collapsed", "enumerated"]


class SegmentationModel(PyroModule):
    """z ~ N(0, I); s_j | z ~ Categorical(f_j(z)); x_j | s_j ~ Gaussians of the label's class.

    Args:
        shape_prior: p(z) p(s|z). intensity: p(x|s).
        likelihood_power: β, scales the voxel factors.
        form: `collapsed` has sites `z`, `scan`; `enumerated` has `z`, `labels`, `scan`.
        shared_intensity: θ for all scans, by gradient; used where the call gives none.
        intensity_prior: where θ comes from when scans are simulated without one.

    Attributes:
        region: bool, the grid: the voxels by which scans like these were normalised, see `normalise`; None: by all.
    """

    region: Tensor | None

    def __init__(
        self,
        shape_prior: LabelPrior,
        intensity: IntensityModel,
        likelihood_power: float = 1.0,
        form: Form = "collapsed",
        shared_intensity: SharedIntensity | None = None,
        intensity_prior: IntensityPrior | None = None,
    ) -> None:
        super().__init__()
        self.shape_prior, self.intensity = shape_prior, intensity
        self.likelihood_power, self.form = likelihood_power, form
        self.shared_intensity = shared_intensity
        self.intensity_prior = intensity_prior or IntensityPrior(intensity)
        self.region = None

    @property
    def max_plate_nesting(self) -> int:
        """What to give to an ELBO: 1 collapsed, 2 enumerated."""
        return 1 if self.form == "collapsed" else 2

    def forward(
        self,
        scan: Tensor | None = None,
        observed: Tensor | None = None,
        theta: IntensityParameters | None = None,
        num_scans: int = 1,
        part: slice | None = None,
    ) -> Tensor:
        """Run the program; without a scan it simulates.

        Args:
            scan: normalised intensities, (B, C, *grid), or None.
            observed: bool, (B, C or 1, *grid); None observes everything.
            theta: intensity parameters of these scans.
            num_scans: B, where neither scan nor observed is given.
            part: which of the observed voxels, in their order, stand for all of them; with a step, by which their
                log-probability is scaled up. Of the collapsed form; None takes every voxel.

        Returns:
            The scan, (B, C, *grid).

        Raises:
            ValueError: a scan without θ where no θ is shared; a part of the enumerated form.
        """
        shape = self.shape_prior
        batch = scan.shape[0] if scan is not None else observed.shape[0] if observed is not None else num_scans
        if observed is None:
            observed = torch.ones((batch, 1, *shape.grid), dtype=torch.bool, device=shape.log_location_prior.device)
        if theta is None:
            theta = self._theta(batch, scan is not None)
        if self.form == "collapsed":
            return self._collapsed(scan, observed, theta, batch, part)
        if part is not None:
            raise ValueError("the enumerated form takes every voxel: leave out `part`")
        return self._enumerated(scan, observed, theta, batch)

    def _theta(self, batch: int, has_scan: bool) -> IntensityParameters:
        if self.shared_intensity is not None:
            shared: IntensityParameters = self.shared_intensity()
            return shared
        if has_scan:
            raise ValueError("a scan needs θ: pass theta=IntensityParameters(...), or give the model a SharedIntensity")
        return self.intensity_prior.sample(batch)

    def _collapsed(
        self, scan: Tensor | None, observed: Tensor, theta: IntensityParameters, batch: int, part: slice | None
    ) -> Tensor:
        shape, power = self.shape_prior, self.likelihood_power * (1 if part is None else part.step)
        # what no scan observes has no part in the factor
        voxels = EVERYWHERE if scan is None and part is None else seen_by_any(observed.flatten(2), part)
        with pyro.plate("scans", batch, dim=-1):
            z = pyro.sample("z", shape.prior())
            scores = shape.flat_scores(z, voxels)
            if not isinstance(voxels, Tensor):
                scores = scores.unflatten(-1, shape.grid)
            mixture = LabelMixture(scores, shape.log_location_prior, theta, self.intensity, observed, voxels)
            with poutine.scale(scale=power):
                drawn: Tensor = pyro.sample("scan", mixture, obs=scan)
        return drawn

    def _enumerated(self, scan: Tensor | None, observed: Tensor, theta: IntensityParameters, batch: int) -> Tensor:
        shape, channels = self.shape_prior, self.intensity.channels
        observed = observed.expand(batch, channels, *shape.grid).flatten(2)
        flat = None if scan is None else torch.where(observed, scan.flatten(2), 0.0).permute(2, 0, 1)
        with pyro.plate("scans", batch, dim=-1):
            z = pyro.sample("z", shape.prior())
            logits = voxels_first(shape.log_label_probs(z).flatten(-len(shape.grid)))
            with poutine.scale(scale=self.likelihood_power), poutine.mask(mask=observed.any(1).T):
                with pyro.plate("voxels", logits.shape[-3], dim=-2):
                    labels = pyro.sample("labels", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                    voxel = _VoxelIntensity(labels, observed, theta, self.intensity)
                    drawn: Tensor = pyro.sample("scan", voxel, obs=flat)
        drawn = torch.where(observed, drawn.movedim(-3, -1), 0.0)
        return drawn.unflatten(-1, shape.grid)


def voxels_first(per_label: Tensor) -> Tensor:
    """(B, M, J) → (J, B, M), and with particles (P, 1, B, M, J) → (P, J, B, M): the shape of the voxel plate."""
    if per_label.dim() > 3:
        per_label = per_label.squeeze(-4)
    return per_label.movedim(-1, -3)


class _VoxelIntensity(dist.TorchDistribution):
    """p(x_j | s_j) for label positions of any shape that broadcasts to (..., J, B); event shape (C,)."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, labels: Tensor, observed: Tensor, theta: IntensityParameters, intensity: IntensityModel) -> None:
        self.labels, self.observed, self.theta, self.intensity = labels, observed, theta, intensity
        batch = torch.broadcast_shapes(labels.shape, (observed.shape[2], observed.shape[0]))
        super().__init__(batch_shape=batch, event_shape=torch.Size((intensity.channels,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _VoxelIntensity:
        """The same distribution with labels of a wider shape."""
        return _VoxelIntensity(self.labels.expand(batch_shape), self.observed, self.theta, self.intensity)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x_j | s_j), unobserved channels left out."""
        table = self.intensity.label_log_prob(value.permute(1, 2, 0), self.observed, self.theta)  # (B, M, J)
        batch, _, voxels = table.shape
        rows = torch.arange(voxels, device=table.device)[:, None]
        columns = torch.arange(batch, device=table.device)
        return table[columns, self.labels, rows]

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Intensities, (*sample_shape, ..., J, B, C)."""
        labels = self.labels.expand(sample_shape + self.batch_shape)
        return sample_intensities(labels.transpose(-1, -2), self.theta, self.intensity).movedim(-1, -3)
