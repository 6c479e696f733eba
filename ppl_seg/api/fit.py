"""Stage 2: unlabelled scans teach q(z|x), θ and the background maps; the decoder stays as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_seg.api.labels import learn_label_network
from ppl_seg.api.load import load_model
from ppl_seg.api.model import Model
from ppl_seg.api.output import (
    ASLEEP,
    begin_training,
    claim_model_directory,
    finish_training,
    is_finished,
    say,
    say_device,
)
from ppl_seg.api.resources import available_memory, check_memory, fit_memory, memory_errors
from ppl_seg.api.trust import trust
from ppl_seg.data.alignment import check_alignment
from ppl_seg.data.channels import check_channel_alignment
from ppl_seg.data.cohort import Found, Selection, check_output_apart, find_scans
from ppl_seg.data.fields import check_view
from ppl_seg.data.loading import load_scan
from ppl_seg.data.masks import masks_of
from ppl_seg.errors import InputError
from ppl_seg.files import file_sha256
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.networks import build_scan_guide, freeze, mean_theta
from ppl_seg.inference.objectives import build_objective
from ppl_seg.inference.posterior import factor_of, start_theta
from ppl_seg.inference.recipes import Recipe, build_recipe, recipe_for_field
from ppl_seg.inference.tasks import ScanTask
from ppl_seg.inference.trainer import TrainingLog, TrainingOptions, fit, resolve_device
from ppl_seg.inference.training_options import LARGE_GRID
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.warped_atlas import WarpedAtlas
from ppl_seg.results.charts import training_figure
from ppl_seg.results.provenance import Stopwatch, run_record

FEWEST_SCANS = 2
STEPS_OF_LARGE_GRIDS, BATCH_OF_LARGE_GRIDS = 60, 4  # of either training: ten minutes instead of two hours
LABEL_BATCH_OF_LARGE_GRIDS = 2
WAY_OUT = "free some, use a larger machine, fewer scans, or a prior with larger --spacing"


def fit_scans(
    scans: str | Path | Sequence[str | Path],
    *,
    prior: Model | str | Path,
    out: str | Path | None = None,
    suffix: str | None = None,
    mask: str | Path = "auto",
    channels: str | Sequence[str] = (),
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    recipe: str = "default",
    objective: str | None = None,
    guide: str | None = None,
    intensity: str | None = None,
    likelihood_power: float | None = None,
    bias_field: str | None = None,
    align: str | None = None,
    channel_align: str = "rigid",
    view: str | None = None,
    steps: int | None = None,
    label_rounds: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32",
    trusted: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Model:
    """Fit q(z|x), θ and the background maps to unlabelled scans, then q(s|x) to what they infer.

    The encoder first learns on simulated scans (`sleep`), then on the real ones with the recipe's objective. The label
    network then learns, in rounds, the posterior label marginals that the program infers for each scan. A scan that
    can't be used is said and left out (`Model.scans_left_out`).

    Args:
        scans: files, folders, globs. prior: a model of `learn_prior`, or its directory. out: model directory to write.
        participants, sessions: labels of the only ones to take; () takes all.
        trusted: import paths `package.module:Name` that the prior may name.
        channel_align: rigid or none, for channels after the first. view: brain or head; None decides by the scans.
        recipe: by name; objective, guide, intensity, likelihood_power, bias_field, steps, label_rounds
            change it.

    Raises:
        InputError: bad options, too few scans of use, `out` in use. TrainingError: a bound that is not finite.
    """
    trust(guide, objective)
    chosen = build_recipe(
        recipe,
        objective=objective,
        guide=guide,
        intensity=intensity,
        likelihood_power=likelihood_power,
        bias_field=bias_field,
        steps=steps,
        label_rounds=label_rounds,
    )
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps}: expected at least 1")
    if chosen.label_rounds < 0:
        raise InputError(f"--label-rounds {chosen.label_rounds}: expected at least 0")
    if chosen.label_rounds and not chosen.label_guide:
        raise InputError(
            f"--label-rounds {chosen.label_rounds}: --recipe {chosen.name} hears no label guide; "
            "leave --label-rounds out, or choose --recipe default"
        )
    if chosen.shape == "location":
        raise InputError(
            f"--recipe {chosen.name}: has no latent shape to fit; choose default or notes, or segment with it from "
            "Python: load_model(prior).segment(scan, recipe=...)"
        )
    if steps is not None:
        chosen = replace(chosen, sleep_steps=min(chosen.sleep_steps, steps), label_steps=min(chosen.label_steps, steps))
    check_channel_alignment(channel_align)
    check_view(view)
    where, watch = resolve_device(device), Stopwatch()
    model = prior if isinstance(prior, Model) else load_model(prior, trusted)
    if not model.learned_asleep:
        model = model.without_label_network()  # another fit's is of its own scans
    if align is not None:
        check_alignment(align)
        model = replace(model, align=align)
    if out is not None and is_finished(out, resume):
        return load_model(out, trusted)
    found = find_scans(scans, suffix, channels, Selection(tuple(participants), tuple(sessions)))
    check_output_apart(found, out, () if isinstance(prior, Model) else (prior,))
    if out is not None:
        claim_model_directory(out, force, resume)
    if math.prod(model.grid.shape) > LARGE_GRID:
        # a label guide of ten whole brains, learned as long as the rest takes, made their segmentations worse
        chosen = replace(chosen, label_rounds=label_rounds or 0)
        chosen = replace(chosen, batch_size=BATCH_OF_LARGE_GRIDS, label_batch_size=LABEL_BATCH_OF_LARGE_GRIDS)
        if steps is None:
            chosen = replace(chosen, sleep_steps=STEPS_OF_LARGE_GRIDS, steps=STEPS_OF_LARGE_GRIDS)
    needed = fit_memory(model, chosen, len(found), len(found[0].paths))
    check_memory("fit", needed, available_memory(where), WAY_OUT)
    model, x, observed, used, shown = load_scans(model, found, mask, channel_align, view, chosen)
    warped = isinstance(model.shape_prior, WarpedAtlas)
    chosen = recipe_for_field(chosen, model.field_of_view, math.prod(model.grid.spacing), warped)
    model = replace(model, recipe=chosen, channels=x.shape[1])
    watch.lap("read and align")
    if out is not None:
        hashes = [file_sha256(path) for file in used for path in file.paths]
        begin_training(
            out,
            {
                "prior": model.hash,
                "recipe": chosen.to_dict(),
                "mask": file_sha256(mask) if Path(mask).is_file() else mask,
                "channel alignment": channel_align,
                "view": model.field_of_view,
                "scans": hashes,
            },
            resume,
        )
    training: dict[str, Any] = {
        "learning_rate": chosen.learning_rate,
        "seed": seed,
        "device": device,
        "precision": precision,
    }
    stage = _Stage(model, chosen, x.to(where), observed.to(where), shown, out, resume, progress, training)
    program, theta = stage.start()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scan_guide = build_scan_guide(model.shape_prior, chosen.guide, x.shape[1])
    if chosen.sleep_steps:
        stage.learn_asleep(scan_guide, theta)
    watch.lap("sleep")
    theta, log = stage.learn_awake(program, scan_guide, theta)
    watch.lap("fit")
    freeze(scan_guide.cpu())
    rounds: list[dict[str, float]] = []
    config = {**model.config, "scan_guide": {"options": {}}}
    about = {"scans": len(x), "left_out": len(found) - len(x), "seed": seed, "steps": chosen.steps}
    config["training"] = {**config["training"], "fit": about}
    fitted = replace(model, scan_guide=scan_guide, theta=theta.detach().to("cpu"), config=config)
    if chosen.label_rounds and chosen.label_steps:
        fitted, rounds = learn_label_network(fitted, stage.scans, stage.observed, training, out, resume, progress)
        watch.lap("labels")
    if out is not None:
        report: dict[str, Any] = {"scans": len(x), "left_out": len(found) - len(x)}
        report |= {"steps": log.steps, "seconds": log.seconds, **log.last_terms()}
        report |= {"label_rounds": rounds}
        report |= run_record(str(where)) | {"stages": watch.seconds}
        log_file = Path(out) / "training.csv"
        training_figure(log_file, Path(out) / "training.png", "Fit to the scans")  # before config.json
        fitted.save(out, {"training.csv": log_file.read_bytes(), "report.json": json.dumps(report, indent=2)})
        finish_training(out)
    say_device(device, where)
    return fitted


@dataclass(frozen=True)
class _Stage:
    """Stage 2 of one model: what its two trainings share."""

    model: Model
    recipe: Recipe
    scans: Tensor
    observed: Tensor
    view: str
    out: str | Path | None
    resume: bool
    progress: bool
    training: dict[str, Any]

    def program(self, recipe: Recipe, shared: IntensityParameters | None) -> SegmentationModel:
        """The program on the scans' device."""
        return self.model.build_program(recipe, self.scans.shape[1], shared, self.scans.device)

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
        if self.view == "head":  # as `Model.place` has normalised these
            brain = torch.from_numpy(self.model.atlas().brain > 0.5).to(self.scans.device)
            program.region = brain.view(program.shape_prior.grid)
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
        scans, channels = self.scans.shape[:2]
        with memory_errors("fit", fit_memory(self.model, self.recipe, scans, channels), WAY_OUT):
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
    model: Model,
    found: Sequence[Found],
    mask: str | Path,
    channel_align: str,
    view: str | None,
    recipe: Recipe,
) -> tuple[Model, Tensor, Tensor, list[Found], str]:
    """The model for these scans (`Model.for_scan`), and on its grid normalised intensities (n, C, *grid), observed.

    Also which scans these are, one that can't be read or aligned is said and left out, and what they show.
    """
    if len(found) < FEWEST_SCANS:
        raise InputError(
            f"{found[0].path}: a fit needs at least {FEWEST_SCANS} scans, better tens; found {len(found)}; "
            "for single scans use ppl-seg segment --model with the prior's folder"
        )
    masks = masks_of(found, mask)
    fitting, shown = model, ""
    placed: list[tuple[Tensor, Tensor]] = []
    used: list[Found] = []
    failures: list[str] = []
    for file, own_mask in zip(found, masks, strict=True):
        try:
            own = load_scan(file.paths, own_mask, channel_align)
            chosen, seen_as = model.for_scan(own, view)
            if used and seen_as != shown:
                raise InputError(
                    f"{file.path}: a {seen_as}, while {used[0].path} is a {shown}; fit scans of one kind, or say what "
                    "they are with --brain or --head"
                )
            _, scan, seen, _ = chosen.place(own, view=seen_as, recipe=recipe)  # of its own voxels nothing is kept
        except InputError as error:
            failures.append(str(error))
            say([f"{error}; left out"])
            continue
        say(own.image.warnings)
        fitting, shown = (fitting, shown) if used else (chosen, seen_as)
        placed.append((scan, seen))
        used.append(file)
    if len(used) < FEWEST_SCANS:
        raise InputError(f"{failures[0]}; {len(used)} of {len(found)} scans are left, a fit needs {FEWEST_SCANS}")
    say([f"{len(used)} scans on the prior's grid: {shown}s"])
    return fitting, torch.cat([scan for scan, _ in placed]), torch.cat([seen for _, seen in placed]), used, shown
