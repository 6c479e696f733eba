"""Stage 2: unlabelled scans teach q(z|x), θ and the background maps; the decoder stays as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_seg.api.model import Model, load_model
from ppl_seg.api.output import claim_model_directory, is_finished, say
from ppl_seg.data.cohort import find_scans
from ppl_seg.data.grids import check_alignment
from ppl_seg.data.loading import load_scan
from ppl_seg.data.masks import masks_of
from ppl_seg.errors import InputError
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.checkpoint import remove_checkpoint
from ppl_seg.inference.networks import build_scan_guide, build_segmentation_model, freeze, mean_theta
from ppl_seg.inference.objectives import build_objective
from ppl_seg.inference.posterior import factor_of, start_theta
from ppl_seg.inference.recipes import Recipe, build_recipe
from ppl_seg.inference.tasks import ScanTask
from ppl_seg.inference.trainer import TrainingLog, TrainingOptions, fit, resolve_device
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.results.charts import training_figure

FEWEST_SCANS = 2
ASLEEP = "asleep"  # folder of the first training's checkpoint


def fit_scans(
    scans: Sequence[str | Path],
    *,
    prior: Model | str | Path,
    out: str | Path | None = None,
    suffix: str | None = None,
    mask: str | Path = "auto",
    channels: Sequence[str] = (),
    recipe: str = "default",
    objective: str | None = None,
    guide: str | None = None,
    intensity: str | None = None,
    likelihood_power: float | None = None,
    align: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32",
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Model:
    """Fit q(z|x), θ and the background maps to unlabelled scans.

    The encoder first learns on simulated scans (`sleep`), then on the real ones with the recipe's objective.

    Args:
        scans: files, folders, globs. prior: a model of `learn_prior`, or its directory. out: model directory to write.
        recipe: by name; objective, guide, intensity, likelihood_power, steps change it.

    Raises:
        InputError: bad files or options, too few scans, `out` in use. TrainingError: a bound that is not finite.
    """
    chosen = build_recipe(
        recipe, objective=objective, guide=guide, intensity=intensity, likelihood_power=likelihood_power, steps=steps
    )
    if chosen.shape == "location":
        raise InputError(f"--recipe {chosen.name}: has no latent shape to fit; segment with it from the prior")
    if steps is not None:
        chosen = replace(chosen, sleep_steps=min(chosen.sleep_steps, steps))
    where = resolve_device(device)
    model = prior if isinstance(prior, Model) else load_model(prior)
    if align is not None:
        check_alignment(align)
        model = replace(model, align=align)
    if out is not None and is_finished(out, resume):
        return load_model(out)
    if out is not None:
        claim_model_directory(out, force, resume)
    model = replace(model, recipe=chosen, channels=max(1, len(channels)))
    x, observed = load_scans(model, scans, suffix, mask, channels)
    model = replace(model, channels=x.shape[1])
    training: dict[str, Any] = {
        "learning_rate": chosen.learning_rate,
        "seed": seed,
        "device": device,
        "precision": precision,
    }
    stage = _Stage(model, chosen, x.to(where), observed.to(where), out, resume, progress, training)
    program, theta = stage.start()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scan_guide = build_scan_guide(chosen.guide, model.shape_prior.latent_dim, x.shape[1], model.grid.shape)
    if chosen.sleep_steps:
        stage.learn_asleep(scan_guide, theta)
    theta, log = stage.learn_awake(program, scan_guide, theta)
    freeze(scan_guide.cpu())
    config = {**model.config, "scan_guide": {"options": {}}}
    config["training"] = {**config["training"], "fit": {"scans": len(x), "seed": seed, "steps": chosen.steps}}
    fitted = replace(model, scan_guide=scan_guide, theta=theta.detach().to("cpu"), config=config)
    if out is not None:
        report = {"scans": len(x), "steps": log.steps, "seconds": log.seconds, **log.last_terms()}
        log_file = Path(out) / "training.csv"
        fitted.save(out, {"training.csv": log_file.read_bytes(), "report.json": json.dumps(report, indent=2)})
        remove_checkpoint(out)
        shutil.rmtree(Path(out) / ASLEEP, ignore_errors=True)
        training_figure(log_file, Path(out) / "training.png", "Fit to the scans")
    return fitted


@dataclass(frozen=True)
class _Stage:
    """Stage 2 of one model: what its two trainings share."""

    model: Model
    recipe: Recipe
    scans: Tensor
    observed: Tensor
    out: str | Path | None
    resume: bool
    progress: bool
    training: dict[str, Any]

    def program(self, recipe: Recipe, shared: IntensityParameters | None) -> SegmentationModel:
        """The program on the scans' device."""
        classes, channels = self.model.table.class_of_label, self.scans.shape[1]
        built = build_segmentation_model(self.model.shape_prior, classes, channels, recipe, shared)
        return built.to(self.scans.device)

    def start(self) -> tuple[SegmentationModel, IntensityParameters]:
        """The program, and θ by EM under the location prior: per scan, or their mean where it is shared."""
        theta = start_theta(self.program(self.recipe, None), self.scans, self.observed, self.recipe)
        if self.recipe.intensity == "per-scan":
            return self.program(self.recipe, None), theta
        theta = mean_theta(theta)
        return self.program(self.recipe, theta), theta

    def learn_asleep(self, guide: ScanGuide, theta: IntensityParameters) -> None:
        """q(z|x) on scans simulated from the program at the scans' own θ and masks: the guide alone learns."""
        shared = theta if self.recipe.intensity == "shared" else None
        program = freeze(self.program(replace(self.recipe, objective="marginal"), shared))
        task = ScanTask(program, guide, self.scans, self.observed, theta, self.recipe.batch_size, factor=None)
        options = TrainingOptions(steps=self.recipe.sleep_steps, **self.training)
        folder = None if self.out is None else Path(self.out) / ASLEEP
        self._fit(program, guide, "sleep", task, options, folder)

    def learn_awake(
        self, program: SegmentationModel, guide: ScanGuide, theta: IntensityParameters
    ) -> tuple[IntensityParameters, TrainingLog]:
        """q(z|x), θ and the maps on the scans themselves: (θ, shared or the scans' mean, with the maps; the log)."""
        recipe = self.recipe
        factor = factor_of(recipe.objective) if recipe.intensity == "per-scan" else None
        task = ScanTask(
            program, guide, self.scans, self.observed, theta, recipe.batch_size, factor, recipe.pseudo, recipe.maps
        )
        options = TrainingOptions(steps=recipe.steps, **self.training)
        log = self._fit(program, guide, recipe.objective, task, options, self.out)
        shared = program.shared_intensity
        return (mean_theta(task.theta) if shared is None else shared()), log

    def _fit(
        self,
        program: SegmentationModel,
        guide: ScanGuide,
        objective: str,
        task: ScanTask,
        options: TrainingOptions,
        folder: str | Path | None,
    ) -> TrainingLog:
        elbo, resume, progress = build_objective(objective), self.resume, self.progress
        return fit(
            program,
            guide,
            elbo,
            task,
            options,
            directory=folder,
            resume=resume,
            keep_checkpoint=True,
            progress=progress,
        )


def load_scans(
    model: Model, inputs: Sequence[str | Path], suffix: str | None, mask: str | Path, channels: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Scans on the prior's grid: normalised intensities (n, C, *grid) and what is observed."""
    found = find_scans([str(given) for given in inputs], suffix, channels)
    if len(found) < FEWEST_SCANS:
        raise InputError(
            f"{found[0].path}: a fit needs at least {FEWEST_SCANS} scans, better tens; found {len(found)}; "
            "for single scans use ppl-seg segment --model with the prior's folder"
        )
    masks = masks_of([file.path for file in found], mask)
    placed = [model.place(load_scan(file.paths, own)) for file, own in zip(found, masks, strict=True)]
    say([f"{len(found)} scans on the prior's grid"])
    return torch.cat([scan for _, scan, _, _ in placed]), torch.cat([seen for _, _, seen, _ in placed])
