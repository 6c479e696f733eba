"""q(s|x) is learned: of a prior, from simulated scans; of a fit, from what the program infers for each real one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_seg.api.model import Model
from ppl_seg.api.output import LABELS, say
from ppl_seg.api.scan_inference import MARGINAL_DRAWS, infer_scan
from ppl_seg.data.scan_augmentation import augmentation
from ppl_seg.data.simulated_anatomy import AnatomySimulator
from ppl_seg.data.simulated_scans import ScanSimulator
from ppl_seg.guides.label_network import build_label_network
from ppl_seg.inference.border_shift import learn_shift
from ppl_seg.inference.label_sleep import LabelOverlapLoss, SimulatedScanTask
from ppl_seg.inference.label_training import LabelCrossEntropy, LabelTask
from ppl_seg.inference.networks import freeze
from ppl_seg.inference.trainer import TrainingOptions, fit
from ppl_seg.inference.training_options import derived_seed, resolve_device

NETWORK, ANY_CONTRAST = "u-net", "any-contrast"
ASLEEP_RATE, ASLEEP_CLIP_NORM = 2e-3, 1.0
CLIP_NORM = 0.1  # of the cross-entropy per voxel
AGREEMENT = 0.99  # share of the structures' voxels that a round leaves as they were: the next one has nothing to teach


def learn_asleep(
    model: Model,
    label_maps: Tensor,
    steps: int,
    training: dict[str, Any],
    out: str | Path | None,
    resume: bool,
    progress: bool,
) -> tuple[Model, dict[str, float]]:
    """The prior with q(s|x) for scans of any contrast, and the last terms of its training.

    Args:
        model: a prior. label_maps: positions on its grid in voxels half as large, UNKNOWN where a map ends,
            (n, *grid · 2).
        training: seed, device, precision. out: the model directory, for checkpoints.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(training["seed"], 0, "label network"))
        network = build_label_network(ANY_CONTRAST, model.shape_prior, model.table.class_of_label, 1)
    device = resolve_device(training["device"])
    anatomy = AnatomySimulator(label_maps, model.table, min(model.grid.spacing) / 2)
    scans = ScanSimulator(model.table, model.field_of_view)
    location = network.location(model.shape_prior.log_location_prior).to(device)
    task = SimulatedScanTask(lambda box, random: scans.draw(anatomy.draw(box, random), random), location)
    options = TrainingOptions(**training, steps=steps, learning_rate=ASLEEP_RATE, clip_norm=ASLEEP_CLIP_NORM)
    log = fit(
        nn.Identity(),
        network.train(),
        LabelOverlapLoss(),
        task,
        options,
        directory=None if out is None else Path(out) / LABELS,
        resume=resume,
        keep_checkpoint=True,
        progress=progress,
    )
    config = {**model.config, "label_network": {"network": ANY_CONTRAST, "options": {}}}
    config["training"] = {**config["training"], "label_guide": {"steps": steps, "seed": training["seed"]}}
    return replace(model, label_network=freeze(network.cpu()), config=config), log.last_terms()


def learn_label_network(
    model: Model,
    scans: Tensor,
    observed: Tensor,
    training: dict[str, Any],
    out: str | Path | None,
    resume: bool,
    progress: bool,
) -> tuple[Model, list[dict[str, float]]]:
    """The fitted model with q(s|x), and of each round: cross-entropy per voxel, agreement with the round before.

    Where targets are matched to the location prior, the model has the shift of what it infers at last, too.

    Args:
        model: fitted, q(z|x) and θ. scans: (n, C, *grid). observed: (n, C or 1, *grid).
        training: seed, device, precision. out: the model directory, for checkpoints.
    """
    recipe, seed, location = model.recipe, training["seed"], model.shape_prior.log_location_prior
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, 0, "label network"))
        network = build_label_network(NETWORK, model.shape_prior, model.table.class_of_label, scans.shape[1])
    model = model.without_label_network()  # what was learned asleep makes room
    model = replace(model, config={**model.config, "label_network": {"network": NETWORK, "options": {}}})
    options = TrainingOptions(
        **{**training, "learning_rate": recipe.label_rate}, steps=recipe.label_steps, clip_norm=CLIP_NORM
    )
    spacing = min(model.grid.spacing)
    rounds: list[dict[str, float]] = []
    before: Tensor | None = None
    # where borders are moved, the last inference is for what `segment` reports
    for number in range(1, recipe.label_rounds + 1 + bool(recipe.label_blur)):
        targets = infer_targets(model, scans, observed, derived_seed(seed, number, "label targets"))
        labels = targets.argmax(1).to(torch.int16)
        agreement = 0.0 if before is None else float(label_agreement(before, labels))
        as_before = f": {agreement:.3f} of the structures' voxels as before" if number > 1 else ""
        before, ended = labels, agreement >= AGREEMENT or number > recipe.label_rounds
        blur = recipe.label_blur / spacing
        shift = learn_shift(targets, observed, location.to(targets.device), blur) if blur else None
        if ended:
            model = replace(model, border_shift=None if shift is None else freeze(shift.cpu()))
            say([f"label guide, ended{as_before}"])
            break
        if shift is not None:
            for r in targets:
                r.copy_(shift.move(r))
        task = LabelTask(
            scans, observed, targets, location.to(scans.device), recipe.label_batch_size, augmentation(spacing)
        )
        log = fit(
            nn.Identity(),
            network.requires_grad_(True).train(),
            LabelCrossEntropy(),
            task,
            replace(options, seed=derived_seed(seed, number, "label training")),
            directory=None if out is None else Path(out) / LABELS / str(number),
            resume=resume,
            keep_checkpoint=True,
            progress=progress,
        )
        model = replace(model, label_network=freeze(network.cpu()))
        rounds.append({"agreement": agreement, **log.last_terms()})
        del targets, task  # before the next are there
        say([f"label guide, round {number} of at most {recipe.label_rounds}{as_before}"])
    return model, rounds


def infer_targets(model: Model, scans: Tensor, observed: Tensor, seed: int) -> Tensor:
    """Label marginals of each scan, (n, M, *grid), float16.

    The first time they are the mean of two inferences, one from the fit's q(z|x) and one of the scan alone, from the
    best of the label maps' codes: where the two end in different optima, neither is right.
    """
    recipe = model.recipe
    starts = (True, False) if model.label_network is None else (True,)
    found = []
    with torch.random.fork_rng(devices=[]):
        for i in range(len(scans)):
            torch.manual_seed(derived_seed(seed, i, "scan"))
            one = scans[i : i + 1], observed[i : i + 1]
            each = [
                infer_scan(model, recipe, *one, amortised=start).label_marginals(
                    MARGINAL_DRAWS, recipe.power_at(math.prod(model.grid.spacing))
                )
                for start in starts
            ]
            found.append((sum(each[1:], each[0]) / len(each)).half())
    return torch.cat(found)


def label_agreement(before: Tensor, labels: Tensor) -> Tensor:
    """Of the voxels that are no background in either, the share with the same label in both."""
    either = (before > 0) | (labels > 0)
    return (before == labels)[either].float().sum() / either.sum().clamp(min=1)
