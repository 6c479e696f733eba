"""Stage 1 of a warped atlas, by variational EM over label maps.

E: q(z|s) of each map by gradient. M, in closed form: the location prior from the maps carried back along their
deformations, the velocity's spectrum from the second moments under q. Alternating the two makes the template sharp
(Joshi et al., NeuroImage 2004; Ashburner and Friston, NeuroImage 2009).
"""

from __future__ import annotations

import math
import os
import time

import torch
from torch import Tensor

from ..guides.deformations import DeformationGuide
from ..guides.families import Family
from ..models.shape_prior import smoothed_frequency
from ..models.warped_atlas import BLUR, WarpedAtlas, corners_of
from .progress import progress_bar
from .training_log import LogWriter, TrainingLog

ROUNDS = 3


def learn_atlas(
    atlas: WarpedAtlas,
    family: Family,
    labels: Tensor,
    observed: Tensor,
    steps: int,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> TrainingLog:
    """Teach an atlas, in place, what label maps look like and how they differ.

    Args:
        atlas: with as many label maps as it shall keep, evenly taken.
        labels: positions, (n, *grid). observed: bool, (n, 1, *grid).
        steps: gradient steps of each map, over all rounds.
        directory: where training.csv goes, a row a round.
    """
    log = TrainingLog()
    writer, began = LogWriter(log, directory, 0), time.monotonic()
    guide = DeformationGuide(atlas, family, max(1, steps // ROUNDS))
    z = atlas.log_location_prior.new_zeros(len(labels), atlas.latent_dim)
    with progress_bar(ROUNDS * len(labels), 0, progress) as show, torch.no_grad():
        for number in range(ROUNDS):
            coefficients, variance, bounds = [], [], []
            for n in range(len(labels)):
                one = slice(n, n + 1)
                posterior, bound = guide.infer(labels[one].long(), observed[one], z[one])
                coefficients.append(atlas.coefficients(posterior.mean)[0])
                variance.append(posterior.variance.mean())
                bounds.append(float(bound))
                show(number * len(labels) + n + 1, {"bound_per_voxel": bounds[-1]})
            moved = torch.stack(coefficients)
            moved -= moved.mean(0)  # the template lies in the middle of its maps
            _learn_spectrum(atlas, moved, torch.stack(variance).mean())
            z = atlas.z_of(moved)
            _learn_template(atlas, z, labels, observed)
            writer.write(
                {
                    "step": (number + 1) * guide.steps,
                    "bound_per_voxel": sum(bounds) / len(bounds),
                    "seconds": time.monotonic() - began,
                }
            )
        kept = torch.linspace(0, len(labels) - 1, len(atlas.label_maps)).round().long()
        atlas.carry(labels[kept], z[kept])
    writer.close()
    return log


def _learn_spectrum(atlas: WarpedAtlas, coefficients: Tensor, variance: Tensor) -> None:
    """Second moments of the coefficients, of means (n, d, *control grid), alike for frequencies of one length."""
    shells = (atlas.frequency * 2 * max(atlas.grid)).round().long().flatten()
    moment = coefficients.square().mean((0, 1)) + atlas.velocity_sd.square() * variance
    sums = moment.new_zeros(int(shells.max()) + 1).index_add_(0, shells, moment.flatten())
    mean = sums / torch.bincount(shells).clamp(min=1)
    atlas.velocity_sd.copy_(mean[shells].sqrt().view_as(atlas.velocity_sd))


def _learn_template(atlas: WarpedAtlas, z: Tensor, labels: Tensor, observed: Tensor) -> None:
    """p_loc from the label maps, each voxel counted where its deformation z (n, D) leads to.

    At the means of q(z|s): over draws of it the template blurs, and left-out maps are explained worse.
    """
    count = math.prod(atlas.grid)
    counts = z.new_zeros(atlas.num_labels * count)
    for shape, label_map, seen in zip(z, labels, observed, strict=True):
        voxels = seen.flatten().nonzero()[:, 0]
        row = label_map.flatten()[voxels].long() * count
        for index, weight in corners_of(atlas.places(shape, voxels), atlas.grid):
            counts.index_add_(0, row + index, weight)
    frequency = smoothed_frequency(counts.view(atlas.num_labels, *atlas.grid), BLUR)
    atlas.log_location_prior.copy_(frequency.log())
