"""Where θ comes from when it is not an argument: a prior to simulate from, and parameters that all scans share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .intensity import SD_FLOOR, IntensityModel, IntensityParameters


class IntensityPrior:
    """θ for simulated scans of any contrast, over the normalised range.

    Class means ~ U(0, 1) per channel; component means around them with sd `spread`; sds ~ log-uniform(low, high);
    weights ~ Dirichlet(1) within each class.
    """

    def __init__(
        self, intensity: IntensityModel, spread: float = 0.15, sd_range: tuple[float, float] = (0.03, 0.15)
    ) -> None:
        self.intensity, self.spread, self.sd_range = intensity, spread, sd_range

    def sample(self, num_scans: int, generator: torch.Generator | None = None) -> IntensityParameters:
        """Draw θ for a batch of scans; background weights are constant over the grid."""
        model = self.intensity
        device = model.class_of_label.device
        shape = (num_scans, model.num_components, model.channels)

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator, device=device)

        of_class = uniform(num_scans, len(model.components), model.channels)
        jitter = torch.randn(shape, generator=generator, device=device)
        mean = of_class[:, model.class_of_component] + self.spread * jitter
        low, high = (torch.tensor(v, device=device).log() for v in self.sd_range)
        sd = (low + (high - low) * uniform(*shape)).exp()
        gamma = -uniform(*shape[:2]).clamp(min=1e-6).log()  # Gamma(1, 1): normalised, a flat Dirichlet
        log_weight = torch.cat([(gamma[:, s] / gamma[:, s].sum(1, keepdim=True)).log() for s in model.slices], 1)
        return IntensityParameters(mean, sd, log_weight)


class SharedIntensity(nn.Module):
    """One θ for all scans, learned by gradient. Calling it gives `IntensityParameters` with B = 1."""

    log_weight_maps: Tensor | None

    def __init__(self, intensity: IntensityModel, initial: IntensityParameters) -> None:
        super().__init__()
        self.slices = intensity.slices
        self.mean = nn.Parameter(initial.mean[:1].detach().clone())
        self.log_sd = nn.Parameter(initial.sd[:1].detach().log())
        self.weight_logits = nn.Parameter(initial.log_weight[:1].detach().clone())
        self.register_buffer("log_weight_maps", initial.log_weight_maps, persistent=False)

    def forward(self) -> IntensityParameters:
        """θ at the present values."""
        log_weight = torch.cat([self.weight_logits[:, s].log_softmax(1) for s in self.slices], 1)
        return IntensityParameters(self.mean, self.log_sd.exp().clamp(min=SD_FLOOR), log_weight, self.log_weight_maps)
