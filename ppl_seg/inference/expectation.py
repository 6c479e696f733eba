"""The expectation–maximisation side of stage 2: θ per scan, and weight maps of the background or of all classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..models.intensity import IntensityModel, IntensityParameters, PseudoCounts
from ..models.segmentation import SegmentationModel
from ..models.shape_prior import gaussian_blur
from ..models.voxels import EVERYWHERE, Voxels, put, seen_by_any, take

Factor = Literal["prior", "posterior"]
LOCALISING_STEPS = 3  # of EM; six give the same


@dataclass(frozen=True)
class MapOptions:
    """How weight maps are learned.

    blur: sd of the Gaussian, voxels of the prior's grid. pseudo_count: how many scans' worth of the global mean is
        added.
    """

    blur: float = 1.5
    pseudo_count: float = 0.1


def flatten(scan: Tensor, observed: Tensor, voxels: Voxels = EVERYWHERE) -> tuple[Tensor, Tensor]:
    """(B, C, *grid) → (B, C, J) at some voxels, with the mask for every channel and unobserved intensities 0."""
    seen = take(observed.expand_as(scan).flatten(2), voxels)
    return torch.where(seen, take(scan.flatten(2), voxels), 0.0), seen


def label_responsibilities(
    model: SegmentationModel,
    z: Tensor | None,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    factor: Factor = "posterior",
    voxels: Voxels = EVERYWHERE,
    power: float = 1.0,
) -> Tensor:
    """Responsibilities averaged over draws of z, detached, (B, M, J): r (`posterior`) or f (`prior`).

    Args:
        model: the program. z: draws, (S, B, D); None stands for f = p_loc. scan, observed: (B, C, *grid).
        theta: at the old values. voxels: which, flat; J is their number. power: of p(x|s) within r.
    """
    theta = theta.at(voxels)
    location = take(model.shape_prior.log_location_prior.flatten(1), voxels)
    with torch.no_grad():
        joint = location
        if factor == "posterior":
            joint = location + model.intensity.label_log_prob(*flatten(scan, observed, voxels), theta, power)
        if z is None:
            return joint.softmax(-2).expand(scan.shape[0], -1, -1)
        total: Tensor | float = 0.0
        for some in z.split(model.shape_prior.at_once):
            for scores in model.shape_prior.flat_scores(some, voxels):
                total = total + (scores + joint).softmax(-2)
        return torch.as_tensor(total) / len(z)


def expecting(model: SegmentationModel, observed: Tensor, pseudo: PseudoCounts | None) -> PseudoCounts | None:
    """Pseudo-counts for scans, observed (B, C or 1, *grid): p_loc says how much of each class is expected there."""
    if pseudo is None or not pseudo.sd_share:
        return pseudo
    seen = model.intensity.own(observed, observed)[1].flatten(2).any(1).to(model.shape_prior.log_location_prior.dtype)
    volumes = seen @ model.shape_prior.log_location_prior.exp().flatten(1).mT  # (B, M)
    return pseudo.expecting(model.likelihood_power * model.intensity.component_shares(volumes))


def update_theta(
    model: SegmentationModel,
    z: Tensor | None,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    factor: Factor = "posterior",
    pseudo: PseudoCounts | None = None,
    part: slice | None = None,
) -> tuple[IntensityParameters, Tensor]:
    """One E- and M-step of θ at fixed maps; arguments as `label_responsibilities`.

    part: which of the observed voxels stand for all of them, as the program takes it.

    Returns:
        The new θ, and the observed background responsibilities by component summed over scans, (K0, J), for
        `weight_maps`.
    """
    power, components = model.likelihood_power * (1 if part is None else part.step), model.intensity.components[0]
    background = scan.new_zeros(components, scan[0, 0].numel())
    updated = []
    with torch.no_grad():
        for b in range(scan.shape[0]):  # one scan at a time stays in cache
            one = slice(b, b + 1)
            old = theta.select(one) if theta.mean.shape[0] > 1 else theta
            voxels = seen_by_any(observed[one].flatten(2), part)  # the others count for nothing
            flat, seen = flatten(scan[one], observed[one], voxels)
            draws = None if z is None else z[:, one]
            of_label = label_responsibilities(model, draws, scan[one], observed[one], old, factor, voxels)
            of_component = model.intensity.component_responsibilities(of_label, flat, seen, old.at(voxels))
            counts = expecting(model, observed[one], pseudo)
            updated.append(model.intensity.m_step(of_component, flat, seen, old, counts, power))
            background[:, voxels] += of_component[0, :components]
    new = IntensityParameters(
        torch.cat([u.mean for u in updated]),
        torch.cat([u.sd for u in updated]),
        torch.cat([u.log_weight for u in updated]),
        theta.log_weight_maps,
    )
    return new, background


def localise(
    model: SegmentationModel,
    z: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    classes: Iterable[int],
    options: MapOptions,
    power: float = 1.0,
) -> IntensityParameters:
    """θ of one scan with weight maps for the components of some classes, (Q, J), by approximate EM.

    The bright part of a structure lies together, and so does the dark one. Weights that are the same everywhere make
    its border where it is bright a question of brightness alone. The Gaussians, and the other classes' weights, stay
    as they are.

    Args:
        z: draws, (S, 1, D). scan, observed: (1, C, *grid). theta: (1, ...). power: κ, of p(x|s) in responsibilities.
        classes: which. Background and fluid are of many kinds, and would take what they lie next to.
    """
    voxels = seen_by_any(observed.flatten(2))
    flat, seen = flatten(scan, observed, voxels)
    grid, size, chosen = model.shape_prior.grid, scan[0, 0].numel(), [model.intensity.slices[n] for n in classes]
    for _ in range(LOCALISING_STEPS):
        of_label = label_responsibilities(model, z, scan, observed, theta, "posterior", voxels, power)
        found = model.intensity.component_responsibilities(of_label, flat, seen, theta.at(voxels))[0]
        maps = theta.log_weights()[0].expand(-1, size).clone()
        for of_class in chosen:
            statistics = maps.new_zeros(maps[of_class].shape)
            put(statistics, voxels, found[of_class])
            maps[of_class] = weight_maps(statistics, grid, options)
        theta = theta.with_maps(maps)
    return theta


def weight_maps(statistics: Tensor, grid: tuple[int, ...], options: MapOptions) -> Tensor:
    """Log weight maps from observed responsibilities of one class by component, both (K, J).

    w_k(j) ∝ (G ∗ R_k)(j) + pseudo_count · mean_j R_k / Σ_k mean_j R_k: approximate EM; the blur is what keeps maps
    of one scan from collapsing to one-hot.
    """
    blurred = gaussian_blur(statistics.view(1, -1, *grid), options.blur).flatten(2)[0]
    share = statistics.sum(1, keepdim=True)
    share = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
    weights = blurred + options.pseudo_count * share + 1e-6
    return (weights / weights.sum(0, keepdim=True)).log()


def initial_theta(
    intensity: IntensityModel, location_prior: Tensor, scan: Tensor, observed: Tensor
) -> IntensityParameters:
    """Where EM starts: each class' moments under p_loc, its components spread in rising order.

    Args:
        location_prior: p_loc, (M, *grid). scan, observed: (B, C, *grid).
    """
    flat, seen = flatten(scan, observed)
    weights = intensity.class_sums(location_prior.flatten(1).unsqueeze(0).to(flat.dtype))[0]  # (N, J)
    means, sds, log_weights = [], [], []
    for n, k in enumerate(intensity.components):
        w = weights[n] * seen  # (B, C, J)
        total = w.sum(-1).clamp(min=1e-6)
        mean = (w * flat).sum(-1) / total
        sd = ((w * (flat - mean[..., None]).square()).sum(-1) / total).sqrt().clamp(min=0.02)
        steps = torch.linspace(-1.5, 1.5, k, dtype=flat.dtype, device=flat.device) if k > 1 else flat.new_zeros(1)
        means.append(mean[:, None] + steps[None, :, None] * sd[:, None])
        sds.append((sd / k**0.5)[:, None].expand(-1, k, -1))
        log_weights.append(flat.new_full((flat.shape[0], k), 1.0 / k).log())
    return IntensityParameters(torch.cat(means, 1), torch.cat(sds, 1), torch.cat(log_weights, 1))


def expectation_maximisation(
    model: SegmentationModel,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    z: Tensor | None,
    iterations: int,
    factor: Factor = "posterior",
    pseudo: PseudoCounts | None = None,
    maps: MapOptions | None = None,
) -> IntensityParameters:
    """EM of θ, and of the maps where options are given, at fixed draws of z (S, B, D)."""
    for _ in range(iterations):
        theta, statistics = update_theta(model, z, scan, observed, theta, factor, pseudo)
        if maps is not None:
            theta = theta.with_maps(weight_maps(statistics, model.shape_prior.grid, maps))
    return theta
