"""Partial volume: a voxel that fluid and tissue share belongs to the one that it holds more of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.intensity import IntensityModel, IntensityParameters, PseudoCounts
from ..models.interpolation import between
from ..models.segmentation import SegmentationModel
from ..models.shape_prior import gaussian_blur
from ..models.voxels import EVERYWHERE, Voxels, put
from .expectation import expecting, flatten, label_responsibilities

PARTS = 4  # of the grid's planes across its last axis: each step of EM takes one, in turn
BESIDE = 2.0  # mm, sd of the Gaussian through which fluid is near
SHARED = 2.0  # how often voxels are shared, for each voxel of the other kind nearby; half of them at most
SELDOM = 0.1  # weight of a Gaussian of fluid below which it may be of anything
WIDTH = 48**-0.5  # sd of a uniform from 0 to 1/2
SD_SHARE = 0.1  # weight of the usual sd: without its borders a class says itself how much its voxels differ


@dataclass(frozen=True)
class OwnVoxels:
    """Intensities of a scan's own voxels, in parts that each lie like the grid's voxels, moved by a part of one.

    scan, observed: (P, C, *grid). offsets: of each part, voxels of the grid along its axes.
    """

    scan: Tensor
    observed: Tensor
    offsets: Sequence[Sequence[float]]

    def part(self, step: int) -> tuple[Tensor, Tensor, Sequence[float]]:
        """One of them, in turn: scan and observed, (1, C, *grid), and its offset."""
        here = step % len(self.offsets)
        return self.scan[here, None], self.observed[here, None], self.offsets[here]


def learn_beside_shared(
    model: SegmentationModel,
    z: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    fluid: int,
    blur: float,
    pseudo: PseudoCounts,
    steps: int,
    own_voxels: OwnVoxels | None = None,
) -> IntensityParameters:
    """θ of one scan by EM in which `with_shared_voxels` takes the borders, so that no class learns from them.

    Cortex lies beside fluid everywhere, and in voxels of 2 mm half of it is mixed with it, and much of the rest with
    white matter: where grey and white matter look alike, as in FLAIR, their means change places. So it is learned from
    the scan's own voxels, a part of them each step. f stays as it is, averaged over the draws.

    Args:
        model: the program, with or without a label factor. z: draws, (S, 1, D). scan, observed: (1, C, *grid).
        theta: where EM starts, (1, ...), with constant weights. fluid: its class. blur: sd, voxels of the grid.
        pseudo: the penalty of θ. steps: of EM; after 16, from wherever it starts, θ is the same.
        own_voxels: of the scan, intensities alone; None takes the grid's.
    """
    intensity, grid = model.intensity, model.shape_prior.grid
    own = intensity.plain
    expected = expecting(model, observed, replace(pseudo, sd_share=SD_SHARE))
    of_classes = IntensityModel(range(len(own.components)), own.components, own.channels, outliers=own.outliers)
    of_classes.to(z.device)
    own_voxels = own_voxels or OwnVoxels(*intensity.own(scan, observed), ((0.0,) * len(grid),))
    with torch.no_grad():
        tiny = torch.finfo(scan.dtype).tiny
        f = label_responsibilities(model, z, scan, observed, theta, "prior")[0]
        if intensity is not own or own.observed_rates:  # what speaks of labels beside intensities
            everything = flatten(scan, observed)
            alone = own.class_log_prob(*intensity.own(*everything), theta)[0, own.class_of_label]
            f = (f.log() + intensity.label_log_prob(*everything, theta)[0] - alone).exp()
        f = own.class_sums(f[None])
        f = f[0].unflatten(-1, grid)
        voxels, parts = torch.arange(f[0].numel(), device=f.device).view(grid), min(PARTS, grid[-1])
        for step in range(steps):
            *own_part, offset = own_voxels.part(step)
            part, observed_part = (values.to(z.device) for values in own_part)
            if step == 0:
                log_f = between(f, offset).flatten(1).clamp(min=tiny).log()
                r = (log_f + of_classes.label_log_prob(*flatten(part, observed_part), theta)[0]).softmax(0)
            planes = slice(step % parts, None, parts)
            some = voxels[..., planes].flatten()
            flat, seen = flatten(part, observed_part, some)
            log_f = between(f, offset, planes).flatten(1).clamp(min=tiny).log()
            shared, of_shared = with_shared_voxels(of_classes, theta, r, fluid, grid, blur, some)
            new = (log_f + shared.label_log_prob(flat, seen, of_shared)[0]).softmax(0)
            put(r, some, new)
            of_component = shared.component_responsibilities(new[None], flat, seen, of_shared)
            pure = [s.start + k for s, size in zip(shared.slices, own.components, strict=True) for k in range(size)]
            theta = own.m_step(of_component[:, pure], flat, seen, theta, expected, parts * model.likelihood_power)
    return theta


def with_shared_voxels(
    intensity: IntensityModel,
    theta: IntensityParameters,
    responsibilities: Tensor,
    fluid: int,
    grid: tuple[int, ...],
    blur: float,
    voxels: Voxels = EVERYWHERE,
) -> tuple[IntensityModel, IntensityParameters]:
    """p(x|s) of one scan in which fluid and every tissue have voxels that the other shares.

    A voxel that holds a share a of fluid has the mean a μ_F + (1 − a) μ_T, and is tissue where a < 1/2. So a class of
    tissue has one Gaussian more, with the mean and spread of a uniform a from 0 to 1/2, as often as there is fluid
    nearby, and fluid, where there is anything else nearby, one for a from 1/2 to 1. Of the Gaussians that fluid has,
    some learned from voxels of its border, each counts by how much of it lies beyond 1/2. Cf. Van Leemput et al., IEEE
    TMI 2003.

    Args:
        theta: of one scan. responsibilities: of labels, (M, J). fluid: its class. blur: sd, voxels of the grid.
        voxels: of the maps that are wanted, flat.

    Returns:
        Model and θ, with weight maps of all components. As they were, where nothing lies beside fluid.
    """
    of_class = intensity.class_sums(responsibilities[None])[0]
    near_fluid = gaussian_blur(of_class[fluid].view(1, 1, *grid), blur).flatten()
    volumes = of_class @ near_fluid
    volumes[[0, fluid]] = 0.0
    if not float(volumes.sum()) > 0:
        return intensity, theta
    weight = theta.log_weight[0].exp()
    averages = torch.stack([weight[s] @ theta.mean[0, s] for s in intensity.slices])  # (N, C)
    tissue, of_fluid = volumes @ averages / volumes.sum(), intensity.slices[fluid]
    pure, mostly = _pure_fluid(theta.mean[0, of_fluid], theta.sd[0, of_fluid], weight[of_fluid], tissue)
    near_fluid = near_fluid[voxels]
    maps = theta.at(voxels).log_weights()[0].expand(-1, len(near_fluid)).clone()
    maps[of_fluid] = (maps[of_fluid] + mostly.log()[:, None]).log_softmax(0)
    found = []
    for n, s in enumerate(intensity.slices):
        gaussians = (theta.mean[0, s], theta.sd[0, s], maps[s])
        if n == fluid:
            gaussians = _and_shared(*gaussians, pure, tissue, 1 - near_fluid)
        elif n:  # background is of any brightness as it is
            gaussians = _and_shared(*gaussians, averages[n], pure, near_fluid)
        found.append(gaussians)
    mean, sd, log_weight = (torch.cat(parts) for parts in zip(*found, strict=True))
    components = [len(gaussians[0]) for gaussians in found]
    rates, outliers = intensity.observed_rates, intensity.outliers
    model = IntensityModel(intensity.classes, components, intensity.channels, rates, outliers)
    constant = log_weight.exp().mean(1).log()
    return model.to(mean.device), IntensityParameters(mean[None], sd[None], constant[None], log_weight)


def _and_shared(
    mean: Tensor, sd: Tensor, log_weight: Tensor, own: Tensor, other: Tensor, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A class' Gaussians, mean and sd (K, C), log weights (K, J), and one of voxels that hold some of another.

    Args:
        own, other: what a voxel of either alone is like, (C,). near: how much of the other lies around a place, (J,).
    """
    often = (SHARED * near).clamp(1e-4, 0.5)
    spread = torch.maximum(WIDTH * (other - own).abs(), sd.amin(0))
    weights = torch.cat([log_weight + torch.log1p(-often), often.log()[None]])
    return torch.cat([mean, (own + (other - own) / 4)[None]]), torch.cat([sd, spread[None]]), weights


def _pure_fluid(mean: Tensor, sd: Tensor, weight: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian of fluid that is farthest from the tissue (C,) beside it; what of each holds more fluid.

    Args:
        mean, sd: (K, C). weight: (K,).

    Returns:
        Its mean, (C,); the share of each Gaussian beyond half way from tissue to there, (K,).
    """
    away = mean - tissue
    pure = mean[(away.norm(dim=-1) * (weight > SELDOM)).argmax()]
    tiny = torch.finfo(mean.dtype).tiny
    distance = (pure - tissue).norm().clamp(min=tiny)
    direction = (pure - tissue) / distance
    beyond = (away @ direction - distance / 2) / (sd * direction).norm(dim=-1).clamp(min=tiny)
    return pure, torch.special.ndtr(beyond).clamp(min=1e-6)
