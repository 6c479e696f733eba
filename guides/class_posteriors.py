"""p(class | x_j) by the scan's own intensities: what a network can be shown in place of a scan of any contrast.

A Gaussian for each intensity class, by EM under a blurred location prior (Van Leemput et al., IEEE TMI 1999). What
comes out is the same, up to noise, whether white matter is bright or dark, so that a network need not learn it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.shape_prior import gaussian_blur

ITERATIONS = 8
ENOUGH = 20_000  # voxels, by which the Gaussians are known as well as by all
FEWEST = 200  # observed voxels; fewer say nothing
PSEUDO = 20.0  # voxels that a class has from the whole scan, with an sd of 0.1 in normalised intensities
FLOOR = 0.03  # of a Gaussian's sd
LOWEST = 1e-3  # probability shared among all labels where the location prior has none


def blurred(log_location_prior: Tensor, sd: float) -> Tensor:
    """log p_loc (M, *grid) as of label maps that lie some voxels off, sd voxels."""
    p = gaussian_blur(log_location_prior.exp().unsqueeze(0), sd)[0]
    return ((1 - LOWEST) * p + LOWEST / len(p)).log()


def class_weights(log_location: Tensor, class_of_label: Tensor) -> Tensor:
    """p(class) at each voxel, (N, *grid), of log p(label), (M, *grid)."""
    location = log_location.exp()
    classes = int(class_of_label.max()) + 1
    return location.new_zeros(classes, *location.shape[1:]).index_add(0, class_of_label, location)


@torch.no_grad()
def class_posteriors(scan: Tensor, observed: Tensor, weights: Tensor) -> Tensor:
    """Of each scan by itself the posteriors of the N classes, without and with their prior, (B, 2N, *grid).

    0 where unobserved.

    Args:
        scan, observed: (B, 1, *grid). weights: p(class) at each voxel, positive, (N, *grid).
    """
    weights = weights.flatten(1)
    found = []
    for x, o in zip(scan.flatten(1), observed.flatten(1), strict=True):
        fits = class_log_likelihood(x, o, weights)
        found.append(torch.cat([fits.softmax(0), (fits + weights.log()).softmax(0)]) * o)
    return torch.stack(found).unflatten(-1, scan.shape[2:])


def class_log_likelihood(x: Tensor, observed: Tensor, weights: Tensor) -> Tensor:
    """log N(x_j; μ_n, σ_n²) + constant, (N, J), with μ and σ by EM; 0 where too few voxels are observed.

    Args:
        x, observed: (J,). weights: p(class) at each voxel, positive, (N, J).
    """
    places = observed.nonzero()[:, 0]
    if len(places) < FEWEST:
        return torch.zeros_like(weights)
    places = places[:: max(1, len(places) // ENOUGH)]
    seen, weight = x[places], weights[:, places]
    r = weight**2 / (weight**2).sum(0)  # the middle of each class first
    for iteration in range(ITERATIONS + 1):
        count = r.sum(1) + PSEUDO
        mean = ((r * seen).sum(1) + PSEUDO * seen.mean()) / count
        deviation = (seen - mean[:, None]) ** 2
        sd = (((r * deviation).sum(1) + PSEUDO * 0.01) / count).sqrt().clamp(min=FLOOR)
        if iteration < ITERATIONS:
            r = (weight.log() + _log_normal(seen, mean, sd)).softmax(0)
    return _log_normal(x, mean, sd)


def _log_normal(x: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    return -0.5 * ((x - mean[:, None]) / sd[:, None]) ** 2 - sd.log()[:, None]
