"""One scan's posterior (or a batch's): gradient steps on q(z), alternated with EM steps of θ."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from ..guides.families import Family, kl_to_prior
from ..guides.per_scan import PerScanGuide
from ..models.intensity import IntensityParameters
from ..models.likelihood import label_mixture_log_prob
from ..models.segmentation import SegmentationModel
from .expectation import Factor, flatten, initial_theta, update_theta, weight_maps
from .objectives import OBJECTIVES, build_objective
from .recipes import Recipe
from .training_options import LARGE_GRID

# of large grids a step takes a part of the voxels, in turn; neighbours say nearly the same
FEWEST_PARTS, LARGEST_PART = 4, 65_536  # the latter in voxels
_REACH = 4  # voxels along each axis within which two of a part are looked for


def factor_of(objective: str) -> Factor:
    """The label factor that an objective's E-step uses: f of jensen, r where it says nothing else."""
    factor: Factor = getattr(OBJECTIVES[objective], "factor", "posterior")
    return factor


@dataclass
class Posterior:
    """q(z) and θ of a batch of scans, with the bound at each gradient step (nats, mean over scans, one draw of z)."""

    q: dist.Distribution
    theta: IntensityParameters
    bounds: list[float] = field(default_factory=list)

    def sample(self, draws: int) -> Tensor:
        """z, (draws, B, D)."""
        with torch.no_grad():
            drawn: Tensor = self.q.sample((draws,))
        return drawn

    def bound(self, model: SegmentationModel, objective: str, scan: Tensor, observed: Tensor, draws: int = 8) -> float:
        """The objective's bound of the batch at this posterior, nats, from a few draws of z.

        On large grids each draw hears a part of the voxels, all of them together every voxel: a draw is off by about
        as much everywhere, so that this says nearly as much as all voxels under each.
        """

        def guide(*_: Any) -> None:
            with pyro.plate("scans", scan.shape[0], dim=-1):
                pyro.sample("z", self.q)

        elbo = build_objective(objective)
        parts = draws if parts_of(model, elbo, observed) > 1 else 1
        total = 0.0
        with torch.no_grad():  # a draw at a time: many label scores of a whole brain at once take gigabytes
            for draw in range(draws):
                total -= float(elbo.loss(_hearing(model, part_of(parts, draw)), guide, scan, observed, self.theta))
        return total / draws

    def kl(self, model: SegmentationModel) -> Tensor:
        """KL(q ‖ p), (B,)."""
        with torch.no_grad():
            return kl_to_prior(self.q, model.shape_prior.prior())


def parts_of(model: SegmentationModel, objective: Any, observed: Tensor) -> int:
    """How many parts of the observed voxels, (B, C, *grid), take turns in this program's objective; 1: it hears all."""
    grid = model.shape_prior.grid
    if math.prod(grid) <= LARGE_GRID or model.form != "collapsed" or not getattr(objective, "by_parts", True):
        return 1
    seen = int(observed.flatten(2).flatten(0, 1).any(0).sum())
    return evenly(grid, max(FEWEST_PARTS, -(-seen // LARGEST_PART)))


def part_of(parts: int, turn: int) -> slice | None:
    """The part whose turn it is, as the program takes it; None for all."""
    return slice(turn % parts, None, parts) if parts > 1 else None


def evenly(grid: tuple[int, ...], fewest: int) -> int:
    """The stride through a grid's voxels, `fewest` or up to half more, that leaves them farthest from each other.

    A stride that divides the last axis takes planes. Where some voxels are not observed, rows are shifted anyhow.
    """
    offsets = [offset for offset in itertools.product(range(-_REACH, _REACH + 1), repeat=len(grid)) if any(offset)]
    rows = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]

    def nearest(stride: int) -> int:
        taken = (offset for offset in offsets if sum(map(operator.mul, offset, rows)) % stride == 0)
        return min((sum(step * step for step in offset) for offset in taken), default=_REACH**2)

    return max(range(fewest, fewest * 3 // 2 + 1), key=nearest)


def _hearing(model: Any, part: slice | None) -> Any:
    return model if part is None else partial(model, part=part)


def start_theta(
    model: SegmentationModel, scan: Tensor, observed: Tensor, recipe: Recipe, maps: Tensor | None = None
) -> IntensityParameters:
    """θ by EM under the location prior: with the given maps (K0, J), or with maps learned from these scans."""
    location = model.shape_prior.log_location_prior.exp()
    theta = initial_theta(model.intensity, location, *model.intensity.own(scan, observed)).with_maps(maps)
    factor = factor_of(recipe.objective)
    learn = maps is None and recipe.maps is not None
    parts = 1 if learn else parts_of(model, build_objective(recipe.objective), observed)
    for iteration in range(steps := recipe.em_iterations * (2 if learn else 1)):
        part = part_of(parts, iteration) if iteration + 1 < steps else None
        theta, background = update_theta(model, None, scan, observed, theta, factor, recipe.pseudo, part)
        if learn and iteration >= recipe.em_iterations and recipe.maps is not None:
            theta = theta.with_maps(weight_maps(background, model.shape_prior.grid, recipe.maps))
    return theta


def best_start(
    model: SegmentationModel, codes: Tensor, scan: Tensor, observed: Tensor, theta: IntensityParameters
) -> Tensor:
    """Which of the latent codes (n, D), those of the prior's label maps, explains each scan best: (B, D).

    Gradient steps from z = 0 end in a local optimum where a shape is far from the mean. On large grids the codes are
    compared on every other voxel along each axis.
    """
    shape = model.shape_prior
    if not len(codes):
        return codes.new_zeros(len(scan), shape.latent_dim)
    step = 2 if math.prod(shape.grid) > LARGE_GRID else 1
    lattice = tuple(slice(None, None, step) for _ in shape.grid)
    here = (slice(None), *lattice)
    flat, seen = flatten(scan[(slice(None), *here)], observed[(slice(None), *here)])
    location = shape.log_location_prior[here].flatten(1)
    maps = theta.log_weight_maps
    if maps is not None:
        theta = theta.with_maps(maps.unflatten(1, shape.grid)[here].flatten(1))
    power = model.likelihood_power * math.prod(shape.grid) / location.shape[1]
    candidates = torch.cat([torch.zeros_like(codes[:1]), codes])
    scores = []
    with torch.no_grad():
        for z in candidates.split(shape.at_once):
            of_labels = shape.label_scores(z, lattice if step > 1 else None).flatten(2).unsqueeze(1)
            of_labels = of_labels.expand(-1, len(scan), -1, -1)
            log_prob = label_mixture_log_prob(of_labels, location, flat, seen, theta, model.intensity)
            scores.append(power * log_prob + shape.prior().log_prob(z).unsqueeze(1))
    return candidates[torch.cat(scores).argmax(0)]


def infer(
    model: SegmentationModel,
    family: Family,
    raw: Tensor,
    scan: Tensor,
    observed: Tensor,
    theta: IntensityParameters,
    recipe: Recipe,
    steps: int,
    learn_maps: bool = False,
) -> Posterior:
    """Fit q(z) and θ to the scans at hand.

    On large grids each step takes a part of the voxels, whose likelihood is scaled up: its expectation over the parts
    is the whole bound, where the objective is such a one. θ has its last step on all of them.

    Args:
        model: the program, decoder frozen, in the form the recipe's objective needs.
        family, raw: where q(z) starts, (B, P). scan, observed: (B, C, *grid). theta: where θ starts.
        recipe: objective, step size, pseudo-counts, how maps are learned. steps: gradient steps.
        learn_maps: learn the background maps from these scans.
    """
    guide = PerScanGuide(family, raw)
    bounds: list[float] = []
    objective = build_objective(recipe.objective)
    optimizer = torch.optim.Adam([guide.raw], lr=recipe.refine_rate, betas=(0.8, 0.95))
    factor = factor_of(recipe.objective)
    parts = 1 if learn_maps else parts_of(model, objective, observed)  # maps need every voxel
    with pyro.get_param_store().scope():
        for step in range(steps):
            for group in optimizer.param_groups:  # down to a tenth: the last steps settle
                group["lr"] = recipe.refine_rate * (1 - 0.9 * step / steps)
            optimizer.zero_grad()
            loss = objective.differentiable_loss(_hearing(model, part_of(parts, step)), guide, scan, observed, theta)
            loss.backward()
            optimizer.step()
            bounds.append(-float(loss.detach()) / len(scan))
            if recipe.intensity == "per-scan" and step % 2 == 1:
                with torch.no_grad():
                    z = guide.posterior().sample((2,))
                part = part_of(parts, step // 2) if step + 2 < steps else None  # at last, all
                theta, background = update_theta(model, z, scan, observed, theta, factor, recipe.pseudo, part)
                if learn_maps and recipe.maps is not None:
                    theta = theta.with_maps(weight_maps(background, model.shape_prior.grid, recipe.maps))
    with torch.no_grad():
        return Posterior(guide.posterior(), theta, bounds)
