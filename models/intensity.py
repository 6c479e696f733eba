"""p(x | s): K Gaussians a class, with constant weights or weight maps over the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .normalisation import CLIP
from .voxels import Voxels, take

SD_FLOOR = 1e-4  # of the normalised intensity range; keeps an emptied component's density finite
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class IntensityParameters:
    """θ: one value for all draws of a scan.

    mean, sd: (B or 1, Q, C), in normalised intensity; log_weight: (B or 1, Q), normalised within each class;
    log_weight_maps: (R, J) or None, log weights that depend on the place, normalised within each class in each voxel;
    they take the place of the constant weights of the first R components: those of the background, or all.
    """

    mean: Tensor
    sd: Tensor
    log_weight: Tensor
    log_weight_maps: Tensor | None = None

    def log_weights(self) -> Tensor:
        """Log weights of all components, (B or 1, Q, J or 1)."""
        constant, maps = self.log_weight.unsqueeze(-1), self.log_weight_maps
        if maps is None:
            return constant
        rest = constant[:, len(maps) :].expand(-1, -1, maps.shape[-1])
        return torch.cat([maps.expand(len(constant), -1, -1), rest], 1)

    def select(self, scans: Tensor | slice) -> IntensityParameters:
        """θ of some scans of the batch; the maps belong to all."""
        return replace(self, mean=self.mean[scans], sd=self.sd[scans], log_weight=self.log_weight[scans])

    def detach(self) -> IntensityParameters:
        """θ without its graph."""
        maps = self.log_weight_maps
        return IntensityParameters(
            self.mean.detach(), self.sd.detach(), self.log_weight.detach(), None if maps is None else maps.detach()
        )

    def to(self, device: torch.device | str) -> IntensityParameters:
        """θ on a device."""
        maps = self.log_weight_maps
        return IntensityParameters(
            self.mean.to(device),
            self.sd.to(device),
            self.log_weight.to(device),
            None if maps is None else maps.to(device),
        )

    def at(self, voxels: Voxels) -> IntensityParameters:
        """θ with its maps at some voxels alone."""
        maps = self.log_weight_maps
        return self if maps is None else self.with_maps(take(maps, voxels))

    def with_maps(self, log_weight_maps: Tensor | None) -> IntensityParameters:
        """θ with other weight maps, (R, J)."""
        return replace(self, log_weight_maps=log_weight_maps)


@dataclass(frozen=True)
class PseudoCounts:
    """The conjugate penalty log p(θ), up to a constant; not multiplied by the likelihood power.

    Σ_q weight · log w_q  −  Σ_qc [ mean_count/2 · (μ − mean)²/σ²  +  sd_count/2 · (log σ² + sd²/σ²) ]

    sd_share: what is added to sd_count by `expecting`, as a share of the observations expected of a component. Where an
        atlas' structure lies on another one's voxels, its own Gaussian stays as narrow as tissues are and leaves them.
    """

    weight: float = 0.0
    mean_count: float = 0.0
    mean: float | Tensor = 0.5
    sd_count: float | Tensor = 0.0
    sd: float | Tensor = 0.1
    sd_share: float = 0.0

    def expecting(self, observations: Tensor) -> PseudoCounts:
        """With sd_share turned into counts, of so many observations expected of each component, (B, Q)."""
        if not self.sd_share:
            return self
        return replace(self, sd_count=self.sd_count + self.sd_share * observations.unsqueeze(-1), sd_share=0.0)


class IntensityModel(nn.Module):
    """Gaussian mixtures per class: which labels share a class, how many components each class has.

    Args:
        class_of_label: class of each label, length M; classes are 0..N-1, and label 0 (background) has class 0.
        components: number of Gaussians of each class, length N.
        channels: C.
        observed_rates: how often each label is observed where it is, (M,), or () for always: below 1 behind a brain
            mask, which is itself an observation, for what lies around the brain. Without it an atlas shrinks until the
            background, which fits any brightness, or fluid covers the outermost cortex.
        outliers: how often a voxel of any class is as bright as anything, uniform over `normalise`'s range: lesions,
            vessels. They say nothing of the label, and θ hears nothing of them. Cf. Van Leemput et al., IEEE TMI 2001.

    Raises:
        ValueError: if classes are not 0..N-1, the background's class is not 0, rates are not one a label, or outliers
            are no share below 1.
    """

    class_of_label: Tensor
    class_of_component: Tensor

    def __init__(
        self,
        class_of_label: Sequence[int],
        components: Sequence[int],
        channels: int = 1,
        observed_rates: Sequence[float] = (),
        outliers: float = 0.0,
    ) -> None:
        super().__init__()
        if class_of_label[0] != 0 or set(class_of_label) != set(range(len(components))):
            raise ValueError(
                f"class_of_label must start with 0 and use every class 0..{len(components) - 1}; "
                f"found {list(class_of_label)}"
            )
        if min(components) < 1:
            raise ValueError(f"every class needs at least one component; found {list(components)}")
        self.classes, self.components = tuple(class_of_label), tuple(int(k) for k in components)
        if len(observed_rates) not in (0, len(class_of_label)):
            raise ValueError(f"expected {len(class_of_label)} observed_rates or none; found {len(observed_rates)}")
        if not 0 <= outliers < 1:
            raise ValueError(f"expected outliers of 0 or more, and less than 1; found {outliers:g}")
        self.channels, self.observed_rates, self.outliers = channels, tuple(observed_rates), outliers
        self.register_buffer("class_of_label", torch.tensor(list(class_of_label)), persistent=False)
        of_component = [n for n, k in enumerate(self.components) for _ in range(k)]
        self.register_buffer("class_of_component", torch.tensor(of_component), persistent=False)
        starts = [sum(self.components[:n]) for n in range(len(self.components))]
        self.slices = tuple(slice(start, start + k) for start, k in zip(starts, self.components, strict=True))

    @property
    def num_components(self) -> int:
        """Q."""
        return sum(self.components)

    @property
    def one_label_per_class(self) -> bool:
        """Whether labels and classes are the same thing."""
        return len(self.class_of_label) == len(self.components)

    @property
    def plain(self) -> IntensityModel:
        """The model of intensities alone: itself."""
        return self

    def own(self, scan: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """The channels, (B, C, ...), that are intensities: all of them."""
        return scan, observed

    def component_log_joint(self, scan: Tensor, observed: Tensor, theta: IntensityParameters) -> Tensor:
        """log w_q(j) + Σ_c o_cj log N(x_cj; μ_qc, σ²_qc), (B, Q, J), for scan and observed of (B, C, J)."""
        total = theta.log_weights()
        for c in range(self.channels):
            sd = theta.sd[:, :, c, None]
            standardised = (scan[:, None, c] - theta.mean[:, :, c, None]) / sd
            log_density = -0.5 * standardised.square() - sd.log() - _LOG_SQRT_2PI
            total = total + log_density * observed[:, None, c].to(log_density.dtype)
        return total

    def class_log_prob(self, scan: Tensor, observed: Tensor, theta: IntensityParameters) -> Tensor:
        """log p(x_j | class n), (B, N, J)."""
        joint = self.component_log_joint(scan, observed, theta)
        if self.outliers:  # they are a floor, above which nothing underflows
            gaussians = joint.exp()
            of_class = torch.stack([gaussians[:, s].sum(1) for s in self.slices], 1)
            return ((1 - self.outliers) * of_class + self._outlier(scan, observed)).log()
        classes = [
            joint[:, s].logsumexp(1) if k > 1 else joint[:, s.start]
            for s, k in zip(self.slices, self.components, strict=True)
        ]
        return torch.stack(classes, 1)

    def _outlier(self, scan: Tensor, observed: Tensor) -> Tensor:
        """How often a voxel is an outlier, and like this one in the channels that are observed, (B, 1, J)."""
        channels = self.own(scan, observed)[1].to(scan.dtype).sum(1, keepdim=True)
        return self.outliers * (CLIP[1] - CLIP[0]) ** -channels

    def label_log_prob(self, scan: Tensor, observed: Tensor, theta: IntensityParameters, power: float = 1.0) -> Tensor:
        """power · ℓ_jm = power · log p(x_j | s_j = m), (B, M, J), with the label's chance of being observed."""
        of_class = self.class_log_prob(scan, observed, theta)
        of_class = of_class if power == 1 else power * of_class
        of_label = of_class if self.one_label_per_class else of_class[:, self.class_of_label]
        if not self.observed_rates:
            return of_label
        seen = observed.any(1).to(of_label.dtype)
        rates = of_label.new_tensor(self.observed_rates).log()
        return of_label + power * rates[:, None] * seen[:, None]

    def class_sums(self, label_values: Tensor) -> Tensor:
        """Sum over the labels of each class: (B, M, J) → (B, N, J)."""
        if self.one_label_per_class:
            return label_values
        zeros = label_values.new_zeros(label_values.shape[0], len(self.components), label_values.shape[-1])
        return zeros.index_add(1, self.class_of_label, label_values)

    def component_shares(self, label_values: Tensor) -> Tensor:
        """What labels have in all, (B, M), in equal parts to the components of their classes: (B, Q)."""
        of_class = self.class_sums(label_values.unsqueeze(-1))[..., 0]
        size = torch.tensor(self.components, dtype=of_class.dtype, device=of_class.device)
        return (of_class / size)[:, self.class_of_component]

    def component_responsibilities(
        self, label_responsibilities: Tensor, scan: Tensor, observed: Tensor, theta: IntensityParameters
    ) -> Tensor:
        """Label responsibilities (B, M, J) times the component posterior within each class at the old θ, (B, Q, J).

        Outliers belong to no component.
        """
        of_class = self.class_sums(label_responsibilities)
        joint = self.component_log_joint(scan, observed, theta)
        beside = [(self._outlier(scan, observed) / (1 - self.outliers)).log()] if self.outliers else []
        parts = []
        for n, (s, k) in enumerate(zip(self.slices, self.components, strict=True)):
            own = torch.cat([joint[:, s], *beside], 1).softmax(1)[:, :k]  # 1 of a single component without outliers
            parts.append(of_class[:, n, None] * own)
        return torch.cat(parts, 1)

    def m_step(
        self,
        component_responsibilities: Tensor,
        scan: Tensor,
        observed: Tensor,
        previous: IntensityParameters,
        pseudo: PseudoCounts | None = None,
        power: float = 1.0,
    ) -> IntensityParameters:
        """The θ that maximises power · Σ_j o_j Σ_q r_qj log(w_q N(x_j; μ_q, σ²_q)) + log p(θ). Pure.

        Args:
            component_responsibilities: (B, Q, J) at the old θ, of the objective's own label factor.
            scan, observed: (B, C, J).
            previous: the old θ; a component that nothing belongs to keeps it, and so do the weight maps.
            pseudo: the conjugate penalty, sd_share as counts already (`PseudoCounts.expecting`).
            power: the likelihood power β.
        """
        pseudo = pseudo or PseudoCounts()
        tiny = torch.finfo(scan.dtype).tiny
        seen = observed.any(1, keepdim=True).to(scan.dtype)
        count = power * (component_responsibilities * seen).sum(-1)  # (B, Q)
        weighted = torch.stack([component_responsibilities * observed[:, None, c] for c in range(self.channels)], 2)
        n = power * weighted.sum(-1)  # (B, Q, C)
        first = power * (weighted * scan[:, None]).sum(-1)
        mean = (first + pseudo.mean_count * pseudo.mean) / (n + pseudo.mean_count).clamp(min=tiny)
        squares = power * (weighted * (scan[:, None] - mean[..., None]).square()).sum(-1)
        squares = squares + pseudo.mean_count * (mean - pseudo.mean) ** 2 + pseudo.sd_count * pseudo.sd**2
        sd = (squares / (n + pseudo.sd_count).clamp(min=tiny)).clamp(min=SD_FLOOR**2).sqrt()
        alpha = count + pseudo.weight
        log_weight = torch.cat(
            [
                (a / a.sum(1, keepdim=True).clamp(min=tiny)).clamp(min=tiny).log()
                for a in (alpha[:, s] for s in self.slices)
            ],
            1,
        )
        empty_class = torch.cat(
            [(count[:, s].sum(1, keepdim=True) <= 1e-8).expand_as(count[:, s]) for s in self.slices], 1
        )
        empty = n <= 1e-8
        return IntensityParameters(
            torch.where(empty, previous.mean, mean),
            torch.where(empty, previous.sd, sd),
            torch.where(empty_class, previous.log_weight, log_weight),
            previous.log_weight_maps,
        )

    def log_penalty(self, theta: IntensityParameters, pseudo: PseudoCounts) -> Tensor:
        """log p(θ) of `PseudoCounts`, (B,)."""
        maps = theta.log_weight_maps
        constant_weights = theta.log_weight if maps is None else theta.log_weight[:, len(maps) :]
        variance = theta.sd.square()
        location = pseudo.mean_count * (theta.mean - pseudo.mean) ** 2 / variance
        scale = pseudo.sd_count * (variance.log() + pseudo.sd**2 / variance)
        return pseudo.weight * constant_weights.sum(1) - 0.5 * (location + scale).sum((1, 2))
