"""What a label guide says of a voxel, as further channels of the scan beside its intensities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .intensity import IntensityModel, IntensityParameters, PseudoCounts
from .segmentation import SegmentationModel

STRUCTURE_OUTSIDE = 0.02  # of a structure's voxels, what a brain mask leaves out


class GuidedIntensity(IntensityModel):
    """p(x_j | m) u_jm in place of p(x_j | m), where log u_jm are the scan's last M channels.

    With it the program's voxel factor is Σ_m f_jm p(x_j|m) u_jm: a product of what shape, intensity and the label guide
    say, whose responsibilities are t ∝ f p(x|m) u. Because u ≤ 1, the bound of this program is below the one that t as
    the guide's label factor has in the program without u, which is below the exact one:

        β Σ_j log Σ_m f p u  ≤  β Σ_j Σ_m t (log f + log p − log t)  ≤  β Σ_j log Σ_m f p.

    θ, and its M-step, are those of the intensities alone.

    Args:
        intensity: of the C channels without the guide's.
    """

    def __init__(self, intensity: IntensityModel) -> None:
        channels = intensity.channels + len(intensity.classes)
        super().__init__(intensity.classes, intensity.components, channels, outliers=intensity.outliers)
        self.intensity = intensity
        self.to(intensity.class_of_label.device)

    @property
    def plain(self) -> IntensityModel:
        """The model of intensities alone."""
        return self.intensity

    def own(self, scan: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that are intensities."""
        return scan[:, : self.intensity.channels], observed[:, : self.intensity.channels]

    def component_log_joint(self, scan: Tensor, observed: Tensor, theta: IntensityParameters) -> Tensor:
        """As the intensities alone have it."""
        return self.intensity.component_log_joint(*self.own(scan, observed), theta)

    def label_log_prob(self, scan: Tensor, observed: Tensor, theta: IntensityParameters, power: float = 1.0) -> Tensor:
        """power · ℓ_jm + log u_jm, (B, M, J), of a scan that is 0 where it is not observed."""
        first = self.intensity.channels
        return self.intensity.label_log_prob(*self.own(scan, observed), theta, power) + scan[:, first:]

    def m_step(
        self,
        component_responsibilities: Tensor,
        scan: Tensor,
        observed: Tensor,
        previous: IntensityParameters,
        pseudo: PseudoCounts | None = None,
        power: float = 1.0,
    ) -> IntensityParameters:
        """As the intensities alone have it."""
        own = self.own(scan, observed)
        return self.intensity.m_step(component_responsibilities, *own, previous, pseudo, power)


def with_label_factor(model: SegmentationModel) -> SegmentationModel:
    """The program with a label guide's factor, changed in place; it takes what `with_log_factor` gives."""
    model.intensity = GuidedIntensity(model.intensity)
    return model


def with_log_factor(
    scan: Tensor, observed: Tensor, log_factor: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scans and observed with the channels of a log factor, (B, M, *grid): both (B, C + M, *grid).

    counts: bool, (B, 1, *grid), where the factor counts; None takes the observed voxels.
    """
    seen = observed.expand_as(scan)
    counts = seen.any(1, keepdim=True) if counts is None else counts
    return torch.cat([scan, log_factor], 1), torch.cat([seen, counts.expand_as(log_factor)], 1)


def outside_log_factor(inside: Tensor, observed_rates: Sequence[float]) -> Tensor:
    """log p(outside the brain mask | label) where a mask leaves out, else 0, (B, M, *grid).

    Args:
        inside: bool, (B, 1, *grid), the mask. observed_rates: (M,), how often each label lies within it.
    """
    rates = 1 - torch.tensor(observed_rates, device=inside.device)
    rates = rates.clamp(min=STRUCTURE_OUTSIDE).view(-1, *[1] * (inside.dim() - 2))
    return torch.where(inside, 0.0, rates.log())
