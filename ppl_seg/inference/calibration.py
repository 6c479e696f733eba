"""The prior's density after training: N(0, I) is laid over the anatomies themselves.

Label maps are deformed at random while the decoder is learned, so that tens of maps become many. The latent space then
holds the augmented copies: the maps' own codes fill a small part of it, off its centre, and shapes that no anatomy has
are as likely as those that people have. So p(z) is moved to the codes' mean and covariance: their own, shrunk, and
that of each q(z|s) around its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..guides.families import covariance_of
from ..guides.label_maps import LabelMapGuide
from ..models.shape_prior import ShapePrior


def calibrate_prior(shape_prior: ShapePrior, guide: LabelMapGuide, labels: Tensor, observed: Tensor) -> None:
    """Set the prior's coordinates (and the guide's) from the aggregated posterior of label maps.

    Args:
        labels: positions, (n, *grid), not augmented. observed: bool, (n, 1, *grid).
    """
    means, covariances = [], []
    with torch.no_grad():
        for s, o in zip(labels.split(8), observed.split(8), strict=True):
            posterior = guide.posterior(s.long(), o)
            means.append(posterior.mean)
            covariances.append(covariance_of(posterior))
        codes = torch.cat(means).double()
        covariance = shrunk_covariance(codes) + torch.cat(covariances).double().mean(0)
        shape_prior.calibrate(codes.mean(0), covariance)
    guide.follow(shape_prior)


def shrunk_covariance(codes: Tensor) -> Tensor:
    """Covariance of (n, D) shrunk to a multiple of the identity (Ledoit and Wolf, J. Multivariate Analysis 2004)."""
    count, dimensions = codes.shape
    centred = codes - codes.mean(0)
    covariance = centred.T @ centred / count
    sphere = covariance.trace() / dimensions * torch.eye(dimensions, dtype=codes.dtype)
    distance = (covariance - sphere).square().sum()
    noise = (centred.square().sum(1).square().sum() / count - covariance.square().sum()) / count
    share = (noise / distance.clamp(min=torch.finfo(codes.dtype).tiny)).clamp(0, 1)
    return share * sphere + (1 - share) * covariance
