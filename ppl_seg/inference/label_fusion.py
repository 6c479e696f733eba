"""Local label fusion: a warped atlas' template for one scan, of the label maps that explain it, place by place.

Label maps are weighed by the scan around a place (Sabuncu et al., IEEE TMI 2010; Iglesias et al., Medical Image
Analysis 2013), each as it lies on the template, so that one deformation, the scan's own, brings all of them to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.intensity import IntensityParameters
from ..models.segmentation import SegmentationModel
from ..models.shape_prior import gaussian_blur
from ..models.warped_atlas import WarpedAtlas
from .expectation import flatten

DOUBT = 0.05  # that a voxel is labelled as the template has it, whatever the label map says


@torch.no_grad()
def map_weights(
    model: SegmentationModel,
    z: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    blur: float,
    power: float,
) -> Tensor:
    """How much each label map counts at each voxel of the template, (n, *grid); they sum to 1 over the maps.

    w_i(y) ∝ exp(power · Σ_u G(u − y) log p(x_u | map i)), G a Gaussian with G(0) = 1: as if the maps were equally
    likely a priori, and one of them drew all that lies around y. x_u is the scan where z has the template's u.

    Args:
        model: the program, on a warped atlas with label maps. z: (D,), the scan's deformation.
        scan, observed: (1, C, *grid). theta: of the scan, (1, ...).
        blur: sd of G, voxels. power: of the likelihood, whose voxels are not independent.
    """
    atlas = model.shape_prior
    assert isinstance(atlas, WarpedAtlas)
    flat, seen = flatten(scan, observed)
    log_prob = model.intensity.label_log_prob(flat, seen, theta)[0]
    likelihood = torch.where(seen[0].any(0), (log_prob - log_prob.amax(0)).exp(), 1.0).unflatten(-1, atlas.grid)
    likelihood = atlas.on_template(likelihood, z)
    usual = (likelihood * atlas.log_location_prior.exp()).sum(0)
    of_map = likelihood.gather(0, atlas.label_maps.long())
    evidence = ((1 - DOUBT) * of_map + DOUBT * usual).log()
    axes = sum(n > 1 for n in atlas.grid)
    summed = (2 * math.pi) ** (axes / 2) * blur**axes  # 1 / G(0) of the Gaussian that sums to 1
    weights: Tensor = (power * summed * gaussian_blur(evidence[None], blur)[0]).softmax(0)
    return weights
