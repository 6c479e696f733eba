"""The two ways in which label maps teach a shape prior: a decoder by SVI, a warped atlas by variational EM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_seg.data.augmentation import deform
from ppl_seg.errors import InputError
from ppl_seg.guides.deformations import DeformationGuide
from ppl_seg.guides.families import build_family, covariance_of
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.inference.atlas import learn_atlas
from ppl_seg.inference.calibration import calibrate_prior
from ppl_seg.inference.networks import build_label_map_guide, freeze
from ppl_seg.inference.objectives import build_objective
from ppl_seg.inference.tasks import LabelMapTask
from ppl_seg.inference.trainer import TrainingOptions, fit, resolve_device
from ppl_seg.inference.training_log import TrainingLog
from ppl_seg.inference.training_options import LARGE_GRID
from ppl_seg.models.decoders import build_decoder
from ppl_seg.models.shape_prior import LabelPrior, ShapeModel, ShapePrior
from ppl_seg.models.warped_atlas import WarpedAtlas

LEARNING_RATE = 1.5e-3
CLIP_NORM = 0.01  # of the bound per voxel; a looser one let a spike collapse q(z|s) to the prior
LATENT_DIM = 64
CONTROL = 12.0  # mm between control points of a warped atlas; half of it reconstructs left-out maps no better
WARP_STEPS = 60  # of each label map
MOST_KEPT = 40  # label maps that stay with an atlas, to be weighed for each scan


@dataclass(frozen=True)
class Effort:
    """Steps, label maps a step, and the stride of the lattice on which a step's likelihood is taken."""

    steps: int
    batch_size: int
    stride: int


SMALL, LARGE = Effort(4000, 8, 1), Effort(1000, 4, 2)  # below and above LARGE_GRID


@dataclass(frozen=True)
class Lesson:
    """What there is to learn from: p_loc (M, *grid), maps (n, *grid) and what of them is observed (n, 1, *grid).

    held_out: (n,) bool, maps that only judge. spacing: mm. family: of q(z|s). objective: marginal or trace.
    """

    location: Tensor
    labels: Tensor
    observed: Tensor
    held_out: Tensor
    spacing: float
    family: str
    objective: str

    @property
    def grid(self) -> Sequence[int]:
        """The grid's shape."""
        return self.location.shape[1:]


@dataclass(frozen=True)
class Learned:
    """A shape prior and its q(z|s), frozen; means of q(z|s) to start from (n, D); options for config.json."""

    prior: LabelPrior
    guide: LabelMapGuide | DeformationGuide
    codes: Tensor
    log: TrainingLog
    options: dict[str, Any]
    training: dict[str, Any]


def learn_decoder(
    lesson: Lesson,
    name: str,
    latent_dim: int,
    options: TrainingOptions,
    out: str | Path | None,
    resume: bool,
    progress: bool,
) -> Learned:
    """A decoder, by its name, and a network q(z|s), by SVI on augmented label maps.

    options: with 0 steps, as many as is usual.

    Raises:
        InputError: a family of q(z|s) whose covariance, which p(z) takes over, is not known.
    """
    num_labels, where = len(lesson.location), resolve_device(options.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        decoder = build_decoder(name, latent_dim, num_labels, lesson.grid)
        prior = ShapePrior(lesson.location, decoder, latent_dim)
        guide = build_label_map_guide(lesson.family, latent_dim, num_labels, lesson.grid)
    try:
        covariance_of(guide.family(torch.zeros(1, guide.family.num_parameters)))
    except ValueError as error:
        raise InputError(f"--guide {lesson.family}: {error}") from error
    effort = LARGE if math.prod(lesson.grid) > LARGE_GRID else SMALL
    options = replace(options, steps=options.steps or effort.steps)
    options = replace(options, eval_every=max(1, options.steps // 20))
    labels, observed = lesson.labels.to(where), lesson.observed.to(where)
    augment = partial(deform, spacing=lesson.spacing)
    task = LabelMapTask(labels, observed, lesson.held_out, effort.batch_size, augment, effort.stride)
    elbo = build_objective(lesson.objective)
    model = ShapeModel(prior)
    log = fit(model, guide, elbo, task, options, directory=out, resume=resume, keep_checkpoint=True, progress=progress)
    freeze(prior.cpu())
    freeze(guide.cpu())
    kept = ~lesson.held_out
    calibrate_prior(prior, guide, lesson.labels[kept], lesson.observed[kept])
    with torch.no_grad():
        codes = torch.cat(
            [
                guide.posterior(a.long(), b).mean
                for a, b in zip(lesson.labels.split(8), lesson.observed.split(8), strict=True)
            ]
        )
    return Learned(prior, guide, codes, log, {}, options.identity())


def learn_warp(lesson: Lesson, options: TrainingOptions, out: str | Path | None, progress: bool) -> Learned:
    """A warped atlas, on the CPU; its q(z|s) needs no network, and scans start from the template itself."""
    control = max(1, round(CONTROL / lesson.spacing))
    kept, steps = ~lesson.held_out, options.steps or WARP_STEPS
    own = {"control": control, "label_maps": min(int(kept.sum()), MOST_KEPT)}
    atlas = WarpedAtlas(lesson.location, spacing=lesson.spacing, **own)
    family = build_family(lesson.family, atlas.latent_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        log = learn_atlas(atlas, family, lesson.labels[kept], lesson.observed[kept], steps, out, progress)
    freeze(atlas)
    codes = lesson.location.new_zeros(0, atlas.latent_dim)
    training = {"steps": steps, "seed": options.seed}
    return Learned(atlas, DeformationGuide(atlas, family), codes, log, own, training)
