"""Stage 1: label maps teach the shape prior."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_seg.api.labels import learn_asleep
from ppl_seg.api.load import load_model
from ppl_seg.api.model import Model
from ppl_seg.api.output import begin_training, claim_model_directory, finish_training, is_finished, say, say_device
from ppl_seg.api.resources import available_memory, check_memory, learning_memory, prior_memory
from ppl_seg.api.shapes import CLIP_NORM, LATENT_DIM, LEARNING_RATE, Lesson, learn_decoder, learn_warp
from ppl_seg.api.trust import trust
from ppl_seg.data.alignment import check_alignment
from ppl_seg.data.augmentation import UNKNOWN
from ppl_seg.data.cohort import Found, Selection, check_output_apart, find_label_maps
from ppl_seg.data.fields import brain_labels, field_of_maps
from ppl_seg.data.grids import Grid, alignment_matrix, common_grid, default_align, default_spacing
from ppl_seg.data.groupwise import align_maps, code_map
from ppl_seg.data.images import Image, describe_spacings, read_label_map
from ppl_seg.data.labels import LabelTable, apply_map, composed, merge_sides
from ppl_seg.data.loading import label_positions, labels_on_grid
from ppl_seg.data.mirror import mirror_plane, other_side, reflection
from ppl_seg.data.names import person_of
from ppl_seg.data.nifti import open_image
from ppl_seg.data.tables import read_value_map, table_for
from ppl_seg.errors import InputError
from ppl_seg.files import file_sha256
from ppl_seg.guides.families import FAMILIES
from ppl_seg.inference.networks import WARP
from ppl_seg.inference.report import prior_report
from ppl_seg.inference.trainer import TrainingOptions, resolve_device
from ppl_seg.models.decoders import DECODERS
from ppl_seg.models.shape_prior import ShapeModel, location_prior
from ppl_seg.results.provenance import Stopwatch, run_record

FEWEST_MAPS = 3
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class LabelMaps:
    """Label maps on one grid.

    field_of_view: brain, head or crop. labels: (n, *grid) positions. observed: (n, 1, *grid). persons: who each belongs
    to. mirrored: of brains and heads labels and observed of their mirror images, where labels come in pairs. fine:
    (n, X, Y, Z) positions in voxels half as large, UNKNOWN where a map ends, where asked for.
    """

    table: LabelTable
    grid: Grid
    align: str
    field_of_view: str
    labels: Tensor
    observed: Tensor
    persons: list[str]
    mirrored: tuple[Tensor, Tensor] | None = None
    fine: Tensor | None = None


def learn_prior(
    label_maps: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    labels: str | Path | None = None,
    value_map: str | Path | None = None,
    merge_sides: bool = False,
    spacing: float | None = None,
    align: str | None = None,
    shape: str | None = None,
    latent_dim: int | None = None,
    guide: str = "mean-field",
    objective: str = "marginal",
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    steps: int | None = None,
    label_steps: int = 0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32",
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Model:
    """Learn p(z) p(s|z) and q(z|s) from label maps, and with `label_steps` q(s|x) from scans simulated of them.

    Args:
        label_maps: files, folders, globs. out: model directory to write, with a report and figures.
        labels: label table. value_map: TSV from, to, applied first. merge_sides: left and right become one.
        spacing: of the prior's grid, mm. align: none, center, rigid or affine.
        shape: convolutional, a decoder of latent dimension `latent_dim`, or `package.module:Name`, another of the same
            kind; or warp, an atlas that z deforms. None takes warp for brains and heads, of which there are few maps,
            and convolutional for crops.
        guide: family of q(z|s). objective: marginal or trace. steps: of training. label_steps: of q(s|x), for scans of
            any contrast; 0 for none.
        participants, sessions: labels of the only ones to take; () takes all.
        resume: go on from the checkpoint in `out`. force: replace what is in `out`.

    Raises:
        InputError: bad files or options, too few maps, `out` in use. TrainingError: a bound that is not finite.
    """
    if objective not in ("marginal", "trace"):
        raise InputError(f"--objective {objective}: a prior is learned with marginal or trace")
    trust(guide, shape)
    if guide not in FAMILIES:
        raise InputError(f"--guide {guide}: unknown; choose one of {', '.join(sorted(FAMILIES))}")
    if shape not in (None, "convolutional", WARP) and not (":" in shape and shape in DECODERS):
        raise InputError(f"--shape {shape}: unknown; choose convolutional, {WARP}, or a decoder as package.module:Name")
    if shape == WARP and (latent_dim is not None or objective != "marginal"):
        raise InputError(
            f"--shape {WARP}: its latent dimension follows from the grid, and its KL is analytic; leave "
            "--latent-dim and --objective out"
        )
    if latent_dim is not None and latent_dim < 1:
        raise InputError(f"--latent-dim {latent_dim}: expected at least 1")
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps}: expected at least 1")
    if label_steps < 0:
        raise InputError(f"--label-steps {label_steps}: expected at least 0")
    options = TrainingOptions(
        steps=steps or 0,
        learning_rate=LEARNING_RATE,
        warmup_steps=100,
        clip_norm=CLIP_NORM,
        seed=seed,
        device=device,
        precision=precision,
        patience=8,
    )
    where = resolve_device(device)
    if out is not None and is_finished(out, resume):
        return load_model(out)
    found = find_label_maps(label_maps, Selection(tuple(participants), tuple(sessions)))
    check_output_apart(found, out)
    needed = prior_memory(sum(math.prod(open_image(path).shape) for file in found for path in file.paths), label_steps)
    free = available_memory(torch.device("cpu"))  # where label maps are read, whatever trains
    check_memory("prior", needed, free, "free some, or use fewer label maps or coarser ones")
    if out is not None:
        claim_model_directory(out, force, resume)
    watch = Stopwatch()
    maps = load_label_maps(found, labels, value_map, merge_sides, spacing, align, label_steps > 0)
    chosen = shape or default_shape(maps.field_of_view, latent_dim, objective)
    needed = learning_memory(chosen, len(maps.table), maps.grid.shape)
    learner = torch.device("cpu") if chosen == WARP else where
    check_memory("prior", needed, available_memory(learner), "free some, or use fewer labels or a coarser --spacing")
    watch.lap("read and align")
    if out is not None:
        identity: dict[str, Any] = {"label table": maps.table.to_dict(), "grid": maps.grid.to_dict()}
        identity |= {"alignment": maps.align, "latent dimension": latent_dim, "guide": guide, "objective": objective}
        identity |= {"shape": chosen, "label steps": label_steps}
        identity |= {"value map": None if value_map is None else file_sha256(value_map)}
        hashes = [file_sha256(path) for file in found for path in file.paths]
        begin_training(out, identity | {"label maps": hashes}, resume)
    held_out = held_out_persons(maps.persons)
    taught, seen, judges = maps.labels, maps.observed, held_out
    if chosen == WARP and maps.mirrored is not None:
        taught, seen = (torch.cat(both) for both in zip((taught, seen), maps.mirrored, strict=True))
        judges = held_out.repeat(2)
    location = location_prior(taught[~judges], seen[~judges], len(maps.table))
    lesson = Lesson(location, taught, seen, judges, min(maps.grid.spacing), guide, objective)
    if chosen == WARP:
        learned = learn_warp(lesson, options, out, progress)
    else:
        learned = learn_decoder(lesson, chosen, latent_dim or LATENT_DIM, options, out, resume, progress)
    watch.lap("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        report = prior_report(
            learned.prior, learned.guide, maps.labels, maps.observed, held_out, maps.table.names, learned.log
        )
    config: dict[str, Any] = {
        "shape_prior": {"decoder": chosen, "latent_dim": learned.prior.latent_dim, "options": learned.options},
        "label_guide": {"family": guide, "options": {}},
        "training": {"prior": {**learned.training, "objective": objective, "label_maps": len(maps.labels)}},
    }
    model = Model(
        maps.table,
        maps.grid,
        maps.align,
        learned.prior,
        learned.guide,
        learned.codes,
        config,
        field_of_view=maps.field_of_view,
    )
    if maps.fine is not None:
        training = {"seed": seed, "device": device, "precision": precision}
        model, report["label_guide"] = learn_asleep(model, maps.fine, label_steps, training, out, resume, progress)
        watch.lap("labels")
    report |= run_record("cpu" if chosen == WARP and not label_steps else str(where)) | {"stages": watch.seconds}
    if out is not None:
        draw_prior(model, Path(out), seed)  # before config.json, which says that all is there
        model.save(
            out,
            {"training.csv": (Path(out) / "training.csv").read_bytes(), "report.json": json.dumps(report, indent=2)},
        )
        finish_training(out)
    if chosen != WARP or label_steps:
        say_device(device, where)
    elif where.type != "cpu" or precision != "32":
        say([f"--shape {WARP} was learned on the CPU, in 32 bits: --device and --precision say nothing there"])
    return model


def default_shape(field_of_view: str, latent_dim: int | None, objective: str) -> str:
    """A decoder for crops, of which there are many, and where something is asked that only it has; else an atlas."""
    plain = latent_dim is None and objective == "marginal"
    return WARP if field_of_view != "crop" and plain else "convolutional"


def load_label_maps(
    found: Sequence[Found],
    labels: str | Path | None,
    value_map: str | Path | None,
    merge: bool,
    spacing: float | None,
    align: str | None,
    with_fine: bool = False,
) -> LabelMaps:
    """Read label maps, agree on a table and a grid, and bring them there. InputError for what can't be used.

    with_fine: bring them onto a grid of half its voxel size, too.
    """
    if len(found) < FEWEST_MAPS:
        raise InputError(
            f"{found[0].path}: a prior needs at least {FEWEST_MAPS} label maps, better tens; found {len(found)}"
        )
    images = [read_label_map(file.path) for file in found]
    mapping = read_value_map(value_map) if value_map is not None else {}
    table, parcels, messages = table_for(occurring_values(images, mapping), labels)
    mapping = composed(mapping, parcels)
    messages += [warning for image in images for warning in image.warnings] + describe_spacings(images)
    if merge:
        table, sides = merge_sides(table)
        table.check_names("--merge-sides")
        mapping = composed(mapping, sides)
        messages.append(f"--merge-sides: {len(sides)} pairs of sides were joined")
    if len(table) < 2:
        raise InputError(f"{found[0].path}: all label maps are zero; a prior needs at least one structure")
    chosen = align or default_align(images)
    check_alignment(chosen)
    view, grid, matrices = bring_together(images, table, mapping, chosen, spacing)
    messages.append(
        f"{len(images)} label maps, {len(table) - 1} structures, {len(set(table.class_of_label))} intensity classes; "
        f"{view}s; align {chosen}; grid {'x'.join(map(str, grid.shape))} at {grid.spacing[0]:.3g} mm"
    )
    say(messages)
    placed = [labels_on_grid(image, table, mapping, m, grid.shape) for image, m in zip(images, matrices, strict=True)]
    positions, observed = _stacked(placed, table)
    mirrored = None if view == "crop" else mirror_images(images, matrices, table, mapping, grid, positions)
    fine = None
    if with_fine:
        if min(grid.shape) == 1:
            raise InputError(f"{found[0].path}: --label-steps learns from volumes; these are one voxel thick")
        halves, shape = np.diag([0.5, 0.5, 0.5, 1.0]), [2 * n for n in grid.shape]
        halves[:3, 3] = -0.25  # two of them within each voxel
        both = zip(images, matrices, strict=True)
        shown = (labels_on_grid(i, table, mapping, m @ halves, shape) for i, m in both)
        fine = torch.stack([torch.where(inside[0], labels.to(torch.int16), UNKNOWN) for labels, inside in shown])
    persons = [person_of(file.path) or str(file.path) for file in found]
    return LabelMaps(table, grid, chosen, view, positions, observed, persons, mirrored, fine)


def mirror_images(
    images: Sequence[Image],
    matrices: Sequence[np.ndarray],
    table: LabelTable,
    mapping: dict[int, int],
    grid: Grid,
    positions: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """The label maps' mirror images on the grid, and what of them is observed, or None where there is no plane.

    positions: of the maps as they are, (n, *grid). They say where the plane between the sides lies.
    """
    other = other_side(table)
    plane = mirror_plane(positions, other, min(grid.spacing))
    if plane is None:
        return None
    turned = reflection(*plane)
    placed = (
        labels_on_grid(image, table, mapping, matrix @ turned, grid.shape)
        for image, matrix in zip(images, matrices, strict=True)
    )
    return _stacked([(other[labels], inside) for labels, inside in placed], table)


def _stacked(placed: Sequence[tuple[Tensor, Tensor]], table: LabelTable) -> tuple[Tensor, Tensor]:
    """Positions (n, *grid), as small as they can be, and what is observed (n, 1, *grid)."""
    positions, observed = zip(*placed, strict=True)
    return torch.stack(positions).to(torch.uint8 if len(table) <= 256 else torch.int16), torch.stack(observed)


def bring_together(
    images: Sequence[Image], table: LabelTable, mapping: dict[int, int], align: str, spacing: float | None
) -> tuple[str, Grid, list[np.ndarray]]:
    """The label maps' field of view, their common grid, and of each map the matrix (4, 4), grid voxel → map voxel."""
    positions = [label_positions(image, table, mapping) for image in images]
    counts = np.stack([np.bincount(p.ravel(), minlength=len(table)) for p in positions])
    view = field_of_maps(table, counts, [image.voxel_volume for image in images], default_align(images) == "center")
    if align == "none" or (align == "center" and view != "brain"):
        grid = common_grid(images, spacing, align)
        return view, grid, [alignment_matrix(align, image, grid) for image in images]
    classes, registered = table.class_of_label, brain_labels(table)
    coded = [code_map(p, image, classes, registered) for p, image in zip(positions, images, strict=True)]
    grid, worlds = align_maps(coded, align, spacing, default_spacing(images))
    return view, grid, [np.linalg.inv(i.affine) @ w @ grid.affine for i, w in zip(images, worlds, strict=True)]


def occurring_values(images: Sequence[Image], mapping: dict[int, int]) -> set[int]:
    """Values that occur in any of the maps, after the value map; maps with other value sets are said."""
    values = [set(np.unique(apply_map(image.data, mapping) if mapping else image.data).tolist()) for image in images]
    everything = set().union(*values)
    for image, own in zip(images, values, strict=True):
        if own != everything:
            say([f"{image.path}: labels {sorted(everything - own)} do not occur"])
    return everything


def held_out_persons(persons: Sequence[str]) -> Tensor:
    """Which label maps only judge, (n,) bool: every tenth person's, of 8 persons or more."""
    distinct = sorted(set(persons))
    if len(distinct) < 8:
        return torch.zeros(len(persons), dtype=torch.bool)
    chosen = set(distinct[:: math.ceil(1 / HELD_OUT_SHARE)])
    return torch.tensor([person in chosen for person in persons])


def draw_prior(model: Model, out: Path, seed: int) -> None:
    """draws.png, eight label maps drawn from the prior, and training.png."""
    from ppl_seg.results.charts import training_figure
    from ppl_seg.results.figures import draws_figure

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        program = ShapeModel(model.shape_prior)
        drawn = torch.cat([program() for _ in range(8)])  # of a whole brain all at once take gigabytes
    draws_figure(drawn.numpy(), model.table, model.grid.affine, out / "draws.png", "Drawn from the prior")
    training_figure(out / "training.csv", out / "training.png", "Learning the prior")
