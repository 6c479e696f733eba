"""The distribution of a scan given z with the labels summed out: the `scan` site of the collapsed program."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from .draws import draw_categories
from .intensity import IntensityModel, IntensityParameters
from .likelihood import label_mixture_expected_log_prob, label_mixture_log_prob
from .normalisation import CLIP
from .voxels import EVERYWHERE, Voxels, take


class LabelMixture(TorchDistribution):
    """x_j ~ Σ_m f_jm p(x_j | m), independent over voxels given z and θ.

    Args:
        scores: log f − log p_loc up to a constant, (*S, B, M, *grid), or with `voxels` of those alone, (*S, B, M, n).
        log_location_prior: log p_loc, (M, *grid).
        theta: intensity parameters.
        intensity: the intensity model.
        observed: bool, (B, C or 1, *grid).
        voxels: flat indices of all voxels that are observed (and perhaps of others): no others count.

    batch_shape is (*S, B), event_shape (C, *grid).
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self,
        scores: Tensor,
        log_location_prior: Tensor,
        theta: IntensityParameters,
        intensity: IntensityModel,
        observed: Tensor,
        voxels: Voxels = EVERYWHERE,
    ) -> None:
        self.grid = tuple(log_location_prior.shape[1:])
        self.scores = scores if isinstance(voxels, Tensor) else scores.flatten(-len(self.grid))
        self.voxels = voxels
        self.log_location_prior = log_location_prior.flatten(1)
        self.theta, self.intensity = theta, intensity
        self.observed = observed.expand(-1, intensity.channels, *self.grid).flatten(2)
        super().__init__(
            batch_shape=self.scores.shape[:-2],
            event_shape=torch.Size((intensity.channels, *self.grid)),
            validate_args=False,
        )

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        """Real numbers; the event is (C, *grid)."""
        return constraints.independent(constraints.real, 1 + len(self.grid))

    def expand(self, batch_shape: Any, _instance: Any = None) -> LabelMixture:
        """The same distribution with scores of a wider batch shape."""
        scores = self.scores.expand(*batch_shape, *self.scores.shape[-2:])
        if not isinstance(self.voxels, Tensor):
            scores = scores.unflatten(-1, self.grid)
        location, observed = (part.unflatten(-1, self.grid) for part in (self.log_location_prior, self.observed))
        return LabelMixture(scores, location, self.theta, self.intensity, observed, self.voxels)

    def _arguments(self, scan: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, IntensityParameters, IntensityModel]:
        location, flat, observed = (
            take(x, self.voxels) for x in (self.log_location_prior, scan.flatten(2), self.observed)
        )
        flat = torch.where(observed, flat, 0.0)
        return self.scores, location, flat, observed, self.theta.at(self.voxels), self.intensity

    def log_prob(self, scan: Tensor) -> Tensor:
        """Exact log-likelihood of scans (B, C, *grid), (*S, B)."""
        return label_mixture_log_prob(*self._arguments(scan))

    def expected_log_prob(self, scan: Tensor) -> Tensor:
        """Σ_j o_j Σ_m f_jm log p(x_j | m), Jensen's lower bound of `log_prob`, (*S, B)."""
        return label_mixture_expected_log_prob(*self._arguments(scan))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Simulated scans, (*sample_shape, *S, B, C, *grid); unobserved voxels are 0.

        Raises:
            ValueError: the scores are of some voxels alone.
        """
        if isinstance(self.voxels, Tensor):
            raise ValueError("only the scores of some voxels are here; simulate without `voxels`")
        f = (self.scores + self.log_location_prior).softmax(-2)
        labels = draw_categories(f.expand(*sample_shape, *f.shape))
        scan = sample_intensities(labels, self.theta, self.intensity)
        scan = torch.where(self.observed, scan, 0.0)
        return scan.unflatten(-1, self.grid)


def sample_intensities(labels: Tensor, theta: IntensityParameters, intensity: IntensityModel) -> Tensor:
    """x ~ p(x | s) for label positions (..., B, J), as (..., B, C, J)."""
    weights = theta.log_weights().exp()
    component = torch.zeros_like(labels)
    classes = intensity.class_of_label[labels]
    for n, of_class in enumerate(intensity.slices):
        drawn = draw_categories(weights[:, of_class].expand(*labels.shape[:-1], -1, labels.shape[-1]))
        component = torch.where(classes == n, drawn + of_class.start, component)
    rows = torch.arange(labels.shape[-2], device=labels.device)[:, None] if theta.mean.shape[0] > 1 else 0
    mean, sd = theta.mean[rows, component], theta.sd[rows, component]
    x = mean + sd * torch.randn_like(mean)  # (..., B, J, C)
    if intensity.outliers:
        anything = torch.rand(labels.shape, device=labels.device) < intensity.outliers
        x = torch.where(anything.unsqueeze(-1), torch.empty_like(x).uniform_(*CLIP), x)
    return x.movedim(-1, -2)
