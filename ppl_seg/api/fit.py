"""Stage 2: unlabelled scans teach q(z|x), θ and the background maps; the decoder stays as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
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
from ppl_seg.inference.checkpoint import remove_checkpoint
from ppl_seg.inference.networks import build_scan_guide, build_segmentation_model, freeze, mean_theta
from ppl_seg.inference.objectives import build_objective
from ppl_seg.inference.posterior import factor_of, start_theta
from ppl_seg.inference.recipes import build_recipe
from ppl_seg.inference.tasks import ScanTask
from ppl_seg.inference.trainer import TrainingOptions, fit, resolve_device

FEWEST_SCANS = 2


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
    x, observed = x.to(where), observed.to(where)
    program = build_segmentation_model(model.shape_prior, model.table.class_of_label, x.shape[1], chosen).to(where)
    theta = start_theta(program, x, observed, chosen)
    if chosen.intensity == "shared":
        theta = mean_theta(theta)
        program = build_segmentation_model(model.shape_prior, model.table.class_of_label, x.shape[1], chosen, theta).to(
            where
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scan_guide = build_scan_guide(chosen.guide, model.shape_prior.latent_dim, x.shape[1], model.grid.shape)
    shared: dict[str, Any] = {
        "learning_rate": chosen.learning_rate,
        "seed": seed,
        "device": device,
        "precision": precision,
    }
    asleep = None if out is None else Path(out) / "sleep"
    if chosen.sleep_steps:
        simulated = ScanTask(program, scan_guide, x, observed, theta, chosen.batch_size, factor=None)
        freeze_parameters = [p for p in program.parameters() if p.requires_grad]
        for parameter in freeze_parameters:  # simulated scans teach the guide alone
            parameter.requires_grad_(False)
        collapsed = build_segmentation_model(
            model.shape_prior,
            model.table.class_of_label,
            x.shape[1],
            replace(chosen, objective="marginal"),
            theta if chosen.intensity == "shared" else None,
        ).to(where)
        freeze(collapsed)
        fit(
            collapsed,
            scan_guide,
            build_objective("sleep"),
            simulated,
            TrainingOptions(steps=chosen.sleep_steps, **shared),
            directory=asleep,
            resume=resume,
            keep_checkpoint=True,
            progress=progress,
        )
        for parameter in freeze_parameters:
            parameter.requires_grad_(True)
    per_scan = chosen.intensity == "per-scan"
    task = ScanTask(
        program,
        scan_guide,
        x,
        observed,
        theta,
        chosen.batch_size,
        factor=factor_of(chosen.objective) if per_scan else None,
        pseudo=chosen.pseudo,
        maps=chosen.maps,
    )
    log = fit(
        program,
        scan_guide,
        build_objective(chosen.objective),
        task,
        TrainingOptions(steps=chosen.steps, **shared),
        directory=out,
        resume=resume,
        keep_checkpoint=True,
        progress=progress,
    )
    freeze(scan_guide.cpu())
    learned = program.shared_intensity() if program.shared_intensity is not None else mean_theta(task.theta)
    config = {**model.config, "scan_guide": {"options": {}}}
    config["training"] = {**config["training"], "fit": {"scans": len(x), "seed": seed, "steps": chosen.steps}}
    fitted = replace(model, scan_guide=scan_guide, theta=learned.detach().to("cpu"), config=config)
    if out is not None:
        report = {"scans": len(x), "steps": log.steps, "seconds": log.seconds, **log.last_terms()}
        fitted.save(
            out,
            {"training.csv": (Path(out) / "training.csv").read_bytes(), "report.json": json.dumps(report, indent=2)},
        )
        remove_checkpoint(out)
        if asleep is not None and asleep.is_dir():
            remove_checkpoint(asleep)
            for left in asleep.iterdir():
                left.unlink()
            asleep.rmdir()
        from ppl_seg.results.charts import training_figure

        training_figure(Path(out) / "training.csv", Path(out) / "training.png", "Fit to the scans")
    return fitted


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
