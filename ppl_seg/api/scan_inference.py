"""The posterior of one scan under a learned model: z by gradient steps, θ by EM, with all that speaks of labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pyro import distributions as dist
from torch import Tensor

from ppl_seg.api.learned_model import LearnedModel
from ppl_seg.data.alignment import Alignment
from ppl_seg.data.images import Image, check_same_grid, read_label_map
from ppl_seg.data.loading import labels_on_grid
from ppl_seg.errors import InputError
from ppl_seg.guides.families import Family, build_family
from ppl_seg.inference.expectation import MapOptions, label_responsibilities, localise, update_theta
from ppl_seg.inference.label_fusion import map_weights
from ppl_seg.inference.label_training import log_label_marginals
from ppl_seg.inference.partial_volume import BESIDE, OwnVoxels, learn_beside_shared, with_shared_voxels
from ppl_seg.inference.posterior import Posterior, best_start, factor_of, infer, start_theta
from ppl_seg.inference.recipes import Recipe
from ppl_seg.models.guided_intensity import GuidedIntensity, outside_log_factor, with_label_factor, with_log_factor
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.warped_atlas import WarpedAtlas

NEAR_BRAIN = 0.98  # probability of background below which a voxel outside a brain mask says something
DRAWS = 4  # of z, under which local weights are learned and shared voxels are found
FEW_DRAWS = 2  # of these, under which θ is learned beside shared voxels
MARGINAL_DRAWS = 16  # of z, over which a scan's label marginals are averaged on the grid
START_SCALE = 0.3  # sd of a scan's own q(z) before its first step: the gradient hears the data before the noise


@dataclass(frozen=True)
class Inference:
    """One scan's posterior on the grid.

    program, data: what z was inferred with, data (scan, observed); both with the label guide's factor where there is
    one that was learned awake. model: the program without it. Both have p(x|s) as it is read out, θ in the posterior is
    theirs. log_u: the label guide's word as it is read out, (M, *grid), or None. bound: of the program that z was
    inferred with, by the objective, nats; with the factor it is a lower bound of the bound without, see
    `models.guided_intensity`.
    kl: KL(q ‖ p). strength: that the bound chose for a warped atlas, or None.
    """

    posterior: Posterior
    program: SegmentationModel
    data: tuple[Tensor, Tensor]
    model: SegmentationModel
    log_u: Tensor | None
    bound: float
    kl: float
    strength: float | None = None

    def label_marginals(self, draws: int, power: float) -> Tensor:
        """Responsibilities of `program` averaged over draws of z, (1, M, *grid). power: of the likelihood."""
        z = self.posterior.sample(draws)
        r = label_responsibilities(self.program, z, *self.data, self.posterior.theta, power=power)
        return r.unflatten(-1, self.model.shape_prior.grid)


def infer_scan(
    learned: LearnedModel,
    recipe: Recipe,
    scan: Tensor,
    observed: Tensor,
    refine: int | None = None,
    encoded: dist.Distribution | None = None,
    amortised: bool = True,
    inside: Tensor | None = None,
    own_voxels: OwnVoxels | None = None,
) -> Inference:
    """q(z) and θ of one scan, (1, C, *grid), as `segment` infers them.

    A warped atlas is deformed with each of the recipe's strengths, and the inference with the highest bound is kept;
    where label maps are fused, z is inferred once more under the template that this one makes for the scan. An encoder
    speaks of the strength that it was fitted with, 1; where its z are not to be refined, it alone.

    Args:
        recipe: adapted to the field of view. refine: gradient steps; None takes the recipe's.
        encoded: q(z) in place of its inference. amortised: from the q(z|x) of a fit, and with its background maps where
            that is not refined, or θ is shared.
        inside: bool, (*grid), the image's field of view; None, all of the grid.
        own_voxels: from which θ is learned beside shared voxels; None, the grid's.

    Raises:
        InputError: the recipe shares θ among scans, and the model was fitted to none.
    """
    atlas, scans = learned.shape_prior, (scan, observed)
    log_u = _label_guide(learned, recipe, *scans)
    evidence = _evidence(learned, recipe, *scans, inside, None if learned.learned_asleep else log_u)
    as_encoded = learned.scan_guide is not None and amortised and refine == 0
    if not isinstance(atlas, WarpedAtlas) or recipe.shape != "prior" or encoded is not None or as_encoded:
        only = _infer_scan(learned, recipe, *scans, refine, encoded, amortised, log_u, evidence)
        return _to_read_out(learned, recipe, only, own_voxels)

    def infer_with(prior: WarpedAtlas, strength: float) -> Inference:
        there = amortised and strength == 1
        with_prior = replace(learned, shape_prior=prior)
        one = _infer_scan(with_prior, recipe, *scans, refine, encoded, there, log_u, evidence)
        return replace(one, strength=strength)

    tried = [infer_with(atlas.deformed_by(strength), strength) for strength in recipe.strengths]
    found = max(tried, key=lambda one: one.bound)
    own = _own_template(learned, recipe, found)
    if own is not None and found.strength is not None:
        found = infer_with(own, found.strength)
    if refine != 0:
        found = _once_more(learned, recipe, found, own_voxels)
    return _to_read_out(learned, recipe, found, own_voxels)


def _own_template(learned: LearnedModel, recipe: Recipe, found: Inference) -> WarpedAtlas | None:
    """The atlas with a template of the label maps that explain the scan, where the recipe asks for it, or None."""
    atlas = found.program.shape_prior
    if not recipe.fusion_power or not isinstance(atlas, WarpedAtlas) or not len(atlas.label_maps):
        return None
    blur, z = recipe.fusion_blur / min(learned.grid.spacing), found.posterior.q.mean[0]
    weights = map_weights(found.program, z, *found.data, found.posterior.theta, blur, recipe.fusion_power)
    return atlas.reweighted(weights)


def _once_more(learned: LearnedModel, recipe: Recipe, found: Inference, own_voxels: OwnVoxels | None) -> Inference:
    """z inferred on from where it is, where the recipe asks for it, with what it says of θ beside shared voxels.

    z and θ were inferred together by a program in which classes learn from voxels that they share with fluid. θ of the
    result has no such Gaussians; the bound is of the program that has.
    """
    fluid = _shared_fluid(learned, recipe)
    if fluid is None or not recipe.again_steps:
        return found
    program, data, plain = found.program, found.data, found.program.intensity
    z, blur = found.posterior.sample(DRAWS), BESIDE / min(learned.grid.spacing)
    theta = _learned_beside_shared(learned, recipe, found, z, fluid, own_voxels)
    r = label_responsibilities(program, z, *data, theta)[0]
    shared, beside = with_shared_voxels(plain.plain, theta, r, fluid, program.shape_prior.grid, blur)
    program.intensity = shared if plain is plain.plain else GuidedIntensity(shared)
    family = build_family(recipe.guide, program.shape_prior.latent_dim).to(z.device)
    raw = family.raw_at(found.posterior.q.mean, START_SCALE)
    fixed = replace(recipe, intensity="shared")  # θ stays
    posterior = infer(program, family, raw, *data, beside, fixed, recipe.again_steps)
    bound, kl = posterior.bound(program, recipe.objective, *data), float(posterior.kl(program)[0])
    program.intensity = plain
    return replace(found, posterior=replace(posterior, theta=theta), bound=bound, kl=kl)


def _learned_beside_shared(
    learned: LearnedModel, recipe: Recipe, found: Inference, z: Tensor, fluid: int, own_voxels: OwnVoxels | None
) -> IntensityParameters:
    """θ by EM beside shared voxels, at a few of the draws of z."""
    blur, steps = BESIDE / min(learned.grid.spacing), recipe.shared_steps
    data, theta = found.data, found.posterior.theta
    return learn_beside_shared(
        found.program, z[:FEW_DRAWS], *data, theta, fluid, blur, recipe.pseudo, steps, own_voxels
    )


def _shared_fluid(learned: LearnedModel, recipe: Recipe) -> int | None:
    """The class of fluid, where the recipe has it share voxels with tissue, or None."""
    of_scans_own = recipe.classes == "table" and recipe.intensity == "per-scan"
    return learned.table.fluid if recipe.partial_volume and of_scans_own else None


def _moved_borders(learned: LearnedModel, recipe: Recipe, found: Inference) -> Tensor | None:
    """log u, (M, *grid), that moves the borders of what is reported as the fit learned it, where it did so."""
    if learned.border_shift is None or found.log_u is None:
        return found.log_u
    r = found.label_marginals(MARGINAL_DRAWS, recipe.power_at(math.prod(learned.grid.spacing)))[0]
    return (found.log_u + learned.border_shift.to(r.device)(r)).log_softmax(0)


def _to_read_out(learned: LearnedModel, recipe: Recipe, found: Inference, own_voxels: OwnVoxels | None) -> Inference:
    """With moved borders, weights that depend on the place, and partial volume, as asked for; the bound is without."""
    found = replace(found, log_u=_moved_borders(learned, recipe, found))
    if recipe.intensity == "shared" or not (recipe.local_blur or recipe.partial_volume):
        return found
    program, data, theta = found.program, found.data, found.posterior.theta
    spacing, grid = learned.grid.spacing, program.shape_prior.grid
    shared = _shared_fluid(learned, recipe)
    z, power, beside = found.posterior.sample(DRAWS), recipe.power_at(math.prod(spacing)), BESIDE / min(spacing)
    if shared is not None and recipe.shared_steps:
        theta = _learned_beside_shared(learned, recipe, found, z, shared, own_voxels)
    if recipe.local_blur:
        fluid = learned.table.fluid if recipe.classes == "table" else None
        classes = set(range(len(program.intensity.components))) - {0, fluid}
        options = MapOptions(recipe.local_blur / min(spacing))
        theta = localise(program, z, *data, theta, classes, options, power)
    if shared is not None:
        r = label_responsibilities(program, z, *data, theta, power=power)[0]
        intensity, theta = with_shared_voxels(found.model.intensity, theta, r, shared, grid, beside)
        found.model.intensity = intensity
        if program is not found.model:
            program.intensity = GuidedIntensity(intensity)
    return replace(found, posterior=replace(found.posterior, theta=theta))


def _infer_scan(
    learned: LearnedModel,
    recipe: Recipe,
    scan: Tensor,
    observed: Tensor,
    refine: int | None,
    encoded: dist.Distribution | None,
    amortised: bool,
    log_u: Tensor | None,
    evidence: tuple[Tensor, Tensor] | None,
) -> Inference:
    """`infer_scan` with the prior as it is, and what speaks of labels beside intensities."""
    device = scan.device
    model = learned.program(recipe, scan.shape[1], device)
    fitted = learned.scan_guide is not None and recipe.shape == "prior"
    maps = learned.theta.log_weight_maps if fitted and amortised and learned.theta is not None else None
    # once z is refined with them, a scan's own background maps are better than those that all have in common; they
    # follow z from the second step on
    common = encoded is not None or (recipe.refine_steps if refine is None else refine) < 2
    maps = maps.to(device) if maps is not None and recipe.maps is not None and common else None
    learn = maps is None and recipe.maps is not None and recipe.intensity == "per-scan"
    program, data = model, (scan, observed)
    if evidence is not None:
        program = with_label_factor(learned.program(recipe, scan.shape[1], device))
        data = with_log_factor(scan, observed, *evidence)
    if recipe.intensity == "shared" and model.shared_intensity is not None:
        theta: IntensityParameters = model.shared_intensity()
    elif recipe.intensity == "shared":
        raise InputError("shared intensities come from a fit: segment with its model, or choose another recipe")
    else:
        theta = start_theta(program, *data, recipe, maps)
    if encoded is not None:
        posterior = Posterior(encoded, _theta_at(encoded, program, data, theta, recipe, recipe.em_iterations))
    else:
        family, raw, steps = _start(learned, recipe, refine, program, data, theta, amortised)
        if fitted and amortised and recipe.intensity == "per-scan":
            theta = _theta_at(family(raw), program, data, theta, recipe, recipe.em_iterations // 2)
        posterior = infer(program, family, raw, *data, theta, recipe, steps, learn)
    bound = posterior.bound(program, recipe.objective, *data)
    return Inference(posterior, program, data, model, log_u, bound, float(posterior.kl(program)[0]))


def _label_guide(learned: LearnedModel, recipe: Recipe, scan: Tensor, observed: Tensor) -> Tensor | None:
    """log u, (M, *grid), where there is a q(s|x) that the recipe asks for."""
    if learned.label_network is None or not recipe.label_guide or recipe.shape != "prior":
        return None
    location = learned.shape_prior.log_location_prior.to(scan.device)
    return log_label_marginals(learned.label_network.to(scan.device), location, scan, observed)[0]


def _evidence(
    learned: LearnedModel,
    recipe: Recipe,
    scan: Tensor,
    observed: Tensor,
    inside: Tensor | None,
    log_u: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """What else than intensities the inference hears: log factor (1, M, *grid), where it counts (1, 1, *grid).

    Outside a brain mask but near brains only the mask speaks.
    """
    location = learned.shape_prior.log_location_prior.to(scan.device)
    seen = observed.any(1, keepdim=True)
    total = torch.zeros_like(location)[None] if log_u is None else torch.where(seen, log_u, 0.0)
    rates = recipe.observed_rates(len(location), learned.table.outer_fluid)
    if not rates:
        return None if log_u is None else (total, seen)
    near = location[0].exp() < NEAR_BRAIN
    counts = seen | (near if inside is None else near & inside.to(near.device))
    return total + outside_log_factor(seen, rates), counts


def _start(
    learned: LearnedModel,
    recipe: Recipe,
    refine: int | None,
    program: SegmentationModel,
    data: tuple[Tensor, Tensor],
    theta: IntensityParameters,
    amortised: bool,
) -> tuple[Family, Tensor, int]:
    """A family, where its raw parameters start, and the number of gradient steps."""
    scan, observed = (part[:, : learned.channels] for part in data)
    if amortised and learned.scan_guide is not None and recipe.shape == "prior":
        guide = learned.scan_guide.to(scan.device)
        with torch.no_grad():
            raw = guide.raw(scan, observed)
        return guide.family, raw, recipe.refine_steps if refine is None else refine
    steps = recipe.per_scan_steps if refine is None or recipe.shape == "location" else refine
    family = build_family(recipe.guide, program.shape_prior.latent_dim).to(scan.device)
    raw = torch.zeros(len(scan), family.num_parameters, device=scan.device)
    if steps:
        raw = family.raw_at(best_start(program, learned.codes.to(scan.device), *data, theta), START_SCALE)
    return family, raw, steps


def _theta_at(
    q: dist.Distribution,
    program: SegmentationModel,
    data: tuple[Tensor, Tensor],
    theta: IntensityParameters,
    recipe: Recipe,
    iterations: int,
) -> IntensityParameters:
    """θ by EM at a few draws of q."""
    z = q.sample((4,))
    for _ in range(iterations):
        theta, _ = update_theta(program, z, *data, theta, factor_of(recipe.objective), recipe.pseudo)
    return theta


def encode_label_map(
    learned: LearnedModel, truth: str | Path, scan: Image, alignment: Alignment, device: torch.device
) -> dist.Distribution:
    """q(z|s) of a label map on the scan's grid. InputError where it is on another."""
    image = read_label_map(truth)
    check_same_grid([scan, image], "give a label map on the scan's grid")
    labels, inside = labels_on_grid(image, learned.table, {}, alignment.matrix, learned.grid.shape)
    guide = learned.label_guide.to(device)
    with torch.no_grad():
        encoded: dist.Distribution = guide.posterior(labels[None].to(device), inside[None].to(device))
    return encoded
