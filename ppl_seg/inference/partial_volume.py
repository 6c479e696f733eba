"""Partial volume: a voxel that fluid and tissue share belongs to the one that it holds more of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..models.intensity import IntensityModel, IntensityParameters, PseudoCounts
from ..models.segmentation import SegmentationModel
from ..models.shape_prior import gaussian_blur
from ..models.voxels import EVERYWHERE, seen_by_any
from .expectation import expecting, flatten, label_responsibilities

BESIDE = 2.0  # mm, sd of the Gaussian through which fluid is near
SHARED = 2.0  # how often voxels are shared, for each voxel of the other kind nearby; half of them at most
SELDOM = 0.1  # weight of a Gaussian of fluid below which it may be of anything
WIDTH = 48**-0.5  # sd of a uniform from 0 to 1/2
PARTS = 4  # of the voxels: each step of EM takes one, in turn
SD_SHARE = 0.1  # weight of the usual sd: without its borders a class says itself how much its voxels differ


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
) -> IntensityParameters:
    """θ of one scan by EM in which `with_shared_voxels` takes the borders, so that no class learns from them.

    Cortex lies beside fluid everywhere, and in voxels of 2 mm half of it is mixed with it: where grey and white matter
    look alike, as in FLAIR, their means change places. f stays as it is, averaged over the draws.

    Args:
        model: the program, with or without a label factor. z: draws, (S, 1, D). scan, observed: (1, C, *grid).
        theta: where EM starts, (1, ...), with constant weights. fluid: its class. blur: sd, voxels of the grid.
        pseudo: the penalty of θ. steps: of EM; 12 are as good as 60.
    """
    intensity, grid = model.intensity, model.shape_prior.grid
    own = intensity.plain
    expected = expecting(model, observed, replace(pseudo, sd_share=SD_SHARE))
    everything = flatten(scan, observed)
    with torch.no_grad():
        log_f = label_responsibilities(model, z, scan, observed, theta, "prior")[0].log()
        log_f += (
            intensity.label_log_prob(*everything, theta) - own.label_log_prob(*intensity.own(*everything), theta)
        )[0]

        def responsibilities(at: IntensityModel, of: IntensityParameters, voxels: slice | Tensor) -> Tensor:
            flat, seen = (values[..., voxels] for values in intensity.own(*everything))
            return (log_f[:, voxels] + at.label_log_prob(flat, seen, of.at(voxels))[0]).softmax(0)

        shared, of_shared = own, theta
        for step in range(steps):
            if step % PARTS == 0:
                r = responsibilities(shared, of_shared, EVERYWHERE)
            shared, of_shared = with_shared_voxels(own, theta, r, fluid, grid, blur)
            voxels = seen_by_any(observed.flatten(2), slice(step % PARTS, None, PARTS))
            flat, seen = (values[..., voxels] for values in intensity.own(*everything))
            of_label = responsibilities(shared, of_shared, voxels)[None]
            of_component = shared.component_responsibilities(of_label, flat, seen, of_shared.at(voxels))
            pure = [s.start + k for s, size in zip(shared.slices, own.components, strict=True) for k in range(size)]
            power = PARTS * model.likelihood_power
            theta = own.m_step(of_component[:, pure], flat, seen, theta, expected, power)
    return theta


def with_shared_voxels(
    intensity: IntensityModel,
    theta: IntensityParameters,
    responsibilities: Tensor,
    fluid: int,
    grid: tuple[int, ...],
    blur: float,
) -> tuple[IntensityModel, IntensityParameters]:
    """p(x|s) of one scan in which fluid and every tissue have voxels that the other shares.

    A voxel that holds a share a of fluid has the mean a μ_F + (1 − a) μ_T, and is tissue where a < 1/2. So a class of
    tissue has one Gaussian more, with the mean and spread of a uniform a from 0 to 1/2, as often as there is fluid
    nearby, and fluid, where there is anything else nearby, one for a from 1/2 to 1. Of the Gaussians that fluid has,
    some learned from voxels of its border, each counts by how much of it lies beyond 1/2. Cf. Van Leemput et al., IEEE
    TMI 2003.

    Args:
        theta: of one scan. responsibilities: of labels, (M, J). fluid: its class. blur: sd, voxels of the grid.

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
    maps = theta.log_weights()[0].expand(-1, len(near_fluid)).clone()
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
    model = IntensityModel(intensity.classes, components, intensity.channels, intensity.observed_rates)
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
