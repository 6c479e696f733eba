"""The read-out a draw at a time over the whole scan: f, r and the evidence as the equations have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_seg.data.resampling import inside, resample


def read_out(
    model: Any,
    z: Tensor,
    theta: Any,
    scan: Tensor,
    observed: Tensor,
    matrix: np.ndarray,
    region: Tensor,
    log_u: Tensor | None = None,
    share: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages of r and of f over the draws, both (M, X, Y, Z), and log p(x | z) of each draw, (S,).

    With log u, (M, *grid), and its share w the pool of r and u, of f^(1 − w), normalised, as it is between voxels.
    """
    own, grid = tuple(scan.shape[1:]), (*model.shape_prior.grid, 1)[:3]
    to_grid = np.linalg.inv(matrix)
    something = (inside(to_grid, grid, own) & region).flatten()
    maps = theta.log_weight_maps
    if maps is not None:
        weights = resample(maps.exp().unflatten(1, grid), to_grid, own).flatten(1)
        weights = torch.where(inside(to_grid, grid, own).flatten(), weights, 1.0 / len(maps))
        theta = theta.with_maps(weights.log())
    flat, seen = torch.where(observed, scan, 0.0).flatten(1)[None], observed.flatten(1)[None]
    likelihood = model.intensity.label_log_prob(flat, seen, theta)[0].exp()
    anything = seen[0].any(0)
    if log_u is not None:
        said = resample(log_u.view(-1, *grid), to_grid, own).flatten(1)
        likelihood = likelihood ** (1 - share) * (share * said).exp()
    nothing = torch.eye(len(likelihood), dtype=scan.dtype)[:, :1]  # background
    r, f, evidence = [], [], []
    for draw in z:
        here = model.shape_prior.log_label_probs(draw).exp().view(-1, *grid)
        here = torch.where(something, resample(here, to_grid, own).flatten(1), nothing)
        joint = here * torch.where(something, likelihood, 1.0)
        if log_u is not None:
            tempered = model.shape_prior.log_label_probs(draw).mul(1 - share).softmax(0).view(-1, *grid)
            pool = resample(tempered, to_grid, own).flatten(1) * likelihood
            joint = torch.where(something & anything, pool, here)
        f.append(here)
        r.append(joint / joint.sum(0))
        evidence.append(joint.sum(0).log()[something & anything].sum())
    averages = [torch.stack(values).mean(0).unflatten(1, own) for values in (r, f)]
    return averages[0], averages[1], torch.stack(evidence)
