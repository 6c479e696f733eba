"""What a prior knows of label maps it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from ..guides.deformations import DeformationGuide
from ..guides.label_maps import LabelMapGuide
from ..models.shape_prior import LabelPrior, ShapeModel
from .objectives import build_objective
from .training_log import TrainingLog

ACTIVE = 0.05  # nats: a latent dimension whose mean KL is above says something


def prior_report(
    shape_prior: LabelPrior,
    guide: LabelMapGuide | DeformationGuide,
    labels: Tensor,
    observed: Tensor,
    held_out: Tensor,
    names: Sequence[str],
    log: TrainingLog,
) -> dict[str, Any]:
    """Bound, reconstruction Dice, KL per latent dimension and how many are active, for report.json.

    Args:
        labels: (n, *grid) positions. observed: (n, 1, *grid). held_out: (n,) bool; where none is, all maps are used.
        names: of the labels, background first.
    """
    judged = held_out if bool(held_out.any()) else torch.ones_like(held_out)
    objective, model = build_objective("marginal"), ShapeModel(shape_prior)
    bound, size = 0.0, 0
    overlap = torch.zeros(len(names), 2, dtype=torch.float64)
    divergence = []
    for some in judged.nonzero()[:, 0].split(shape_prior.at_once):
        s, o = labels[some].long(), observed[some]
        with torch.no_grad():
            posterior = guide.posterior(s, o)
            bound -= float(objective.loss(model, partial(_sample, posterior), s, o))
            variance, mean = posterior.variance, posterior.mean
            divergence.append(0.5 * (variance + mean**2 - 1 - variance.log()))
            found = shape_prior.label_logits(mean).argmax(1)
        size += s.numel()
        for m in range(len(names)):
            a, b = (found == m) & o[:, 0], (s == m) & o[:, 0]
            overlap[m] += torch.tensor([2.0 * (a & b).sum(), a.sum() + b.sum()])
    per_dimension = torch.cat(divergence).mean(0)
    dice = (overlap[:, 0] / overlap[:, 1].clamp(min=1)).tolist()
    return {
        "judged_on": "held-out label maps"
        if bool(held_out.any())
        else "the training label maps (too few to hold any out)",
        "label_maps": int(judged.sum()),
        "bound_per_voxel": bound / size,
        "reconstruction_dice": dict(zip(names[1:], dice[1:], strict=True)),
        "mean_reconstruction_dice": sum(dice[1:]) / len(dice[1:]),
        "kl_per_dimension": per_dimension.tolist(),
        "active_dimensions": int((per_dimension > ACTIVE).sum()),
        "steps": log.steps,
        "best_step": log.best_step,
        "seconds": log.seconds,
    }


def _sample(posterior: dist.Distribution, labels: Tensor, *_: Any) -> None:
    """The guide that has this posterior of these label maps."""
    with pyro.plate("scans", len(labels), dim=-1):
        pyro.sample("z", posterior)
