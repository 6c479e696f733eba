"""A learned model: prior, or prior fitted to scans. It is saved, loaded, and segments scans."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_seg import __version__
from ppl_seg.data.grids import Grid, check_alignment
from ppl_seg.data.images import read_label_map
from ppl_seg.data.labels import LabelTable
from ppl_seg.data.loading import OwnScan, labels_on_grid, load_scan, scan_on_grid
from ppl_seg.data.names import parse_name
from ppl_seg.errors import InputError
from ppl_seg.guides.families import build_family
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.expectation import update_theta
from ppl_seg.inference.networks import (
    build_label_map_guide,
    build_scan_guide,
    build_segmentation_model,
    build_shape_prior,
    freeze,
    take_prefix,
    theta_from,
    theta_tensors,
    with_prefix,
)
from ppl_seg.inference.posterior import Posterior, best_start, factor_of, infer, start_theta
from ppl_seg.inference.recipes import Recipe, build_recipe, changed_recipe
from ppl_seg.inference.store import load_model_files, save_model, tensor_bytes
from ppl_seg.inference.trainer import resolve_device
from ppl_seg.inference.training_options import derived_seed
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.normalisation import normalise
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import ShapePrior
from ppl_seg.results.readout import read_out
from ppl_seg.results.segmentation import Segmentation
from ppl_seg.results.volumes import border_flags, label_quality

START_SCALE = 0.3  # sd of a scan's own q(z) before its first step: the gradient hears the data before the noise


@dataclass
class Model:
    """What `learn_prior` and `fit_scans` give.

    Attributes:
        table: the label table. grid, align: the prior's grid, and how images are brought onto it.
        shape_prior, label_guide: p(z) p(s|z) and q(z|s), frozen. codes: q(z|s) means of the prior's label maps, (n, D).
        config: names and options of the networks, as in config.json.
        recipe: of stage 2. channels: C.
        scan_guide: q(z|x), after a fit. theta: of a fit: background maps, and shared or typical parameters.
    """

    table: LabelTable
    grid: Grid
    align: str
    shape_prior: ShapePrior
    label_guide: LabelMapGuide
    codes: Tensor
    config: dict[str, Any]
    recipe: Recipe = field(default_factory=lambda: build_recipe("default"))
    channels: int = 1
    scan_guide: ScanGuide | None = None
    theta: IntensityParameters | None = None

    def save(self, directory: str | Path, files: dict[str, bytes | str] | None = None) -> None:
        """Write a model directory (config.json, weights.safetensors and `files`)."""
        save_model(directory, self._configuration(), self._tensors(), files)

    def _configuration(self) -> dict[str, Any]:
        return {
            **self.config,
            "kind": "prior" if self.scan_guide is None else "fit",
            "version": __version__,
            "labels": self.table.to_dict(),
            "grid": self.grid.to_dict(),
            "align": self.align,
            "channels": self.channels,
            "recipe": self.recipe.to_dict(),
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"theta.{name}": tensor for name, tensor in theta_tensors(self.theta).items()}
        tensors |= with_prefix(self.shape_prior, "shape_prior") | with_prefix(self.label_guide, "label_guide")
        return tensors | with_prefix(self.scan_guide, "scan_guide") | {"codes": self.codes}

    @property
    def hash(self) -> str:
        """SHA-256 of what the model computes, for provenance."""
        text = repr(sorted(self._configuration().items())).encode()
        return hashlib.sha256(text + tensor_bytes(self._tensors())).hexdigest()

    def program(self, recipe: Recipe, channels: int) -> SegmentationModel:
        """The probabilistic program that a recipe asks for, on this prior, frozen."""
        shared = self.theta if recipe.intensity == "shared" else None
        model = build_segmentation_model(self.shape_prior, self.table.class_of_label, channels, recipe, shared)
        freeze(model)
        return model

    def place(self, own: OwnScan, align: str | None = None) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """A scan normalised in its own voxels (C, X, Y, Z), on the grid (1, C, *grid), observed there, the matrix."""
        normalised = normalise(own.intensities[None], own.observed[None])[0]
        scan, observed, matrix = scan_on_grid(normalised, own.observed, own.image, self.grid, align or self.align)
        if not bool(observed.any()):
            raise InputError(
                f"{own.image.path}: nothing of the scan lies on the prior's grid; use --align center, or "
                "give scans of its space"
            )
        return normalised, scan[None], observed[None], matrix

    def segment(
        self,
        scan: str | Path | tuple[Path, ...],
        *,
        draws: int = 200,
        refine: int | None = None,
        mask: str | Path = "auto",
        readout: str | None = None,
        objective: str | None = None,
        guide: str | None = None,
        likelihood_power: float | None = None,
        align: str | None = None,
        recipe: str | None = None,
        shape_from: str | Path | None = None,
        keep_probabilities: bool = False,
        keep_draws: bool = False,
        seed: int = 0,
        device: str = "auto",
    ) -> Segmentation:
        """Segment one scan, in its own voxels.

        Args:
            scan: a file, or a tuple of its channels' files.
            draws: S, draws of z and of whole segmentations.
            refine: gradient steps for this scan; None takes the recipe's, 0 leaves what the encoder says.
            mask: auto, none, or a mask's file.
            readout: `marginals` (argmax of the label marginals) or `decoder` (argmax of f).
            objective, guide, likelihood_power, align, recipe: in place of the model's.
            shape_from: a label map of this scan whose q(z|s) stands for the inference of z: a ceiling, no segmentation.
            keep_probabilities, keep_draws: keep the label marginals, all drawn segmentations.

        Raises:
            InputError: a file that can't be read, options that don't fit the model.
        """
        began = time.monotonic()
        paths = scan if isinstance(scan, tuple) else (Path(scan),)
        chosen = self.checked_recipe(recipe, objective, guide, readout, likelihood_power)
        check_alignment(align or self.align)
        if draws < 1 or (refine or 0) < 0:
            raise InputError(f"--draws {draws}, --refine {refine}: expected at least 1 draw and 0 steps")
        if len(paths) != self.channels and self.scan_guide is not None:
            raise InputError(
                f"{paths[0]}: the model was fitted to scans of {self.channels} channels; found {len(paths)}; "
                "see --channels"
            )
        where = resolve_device(device)
        own = load_scan(paths, mask)
        normalised, on_grid, observed, matrix = self.place(own, align)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, 0, Path(paths[0]).name))
            posterior, model = self._infer(chosen, on_grid.to(where), observed.to(where), refine, shape_from, align)
            bound = {
                "bound": posterior.bound(model, chosen.objective, on_grid.to(where), observed.to(where)),
                "kl": float(posterior.kl(model)[0]),
            }
            z = posterior.sample(draws)[:, 0]
            result = read_out(
                model,
                z,
                posterior.theta,
                normalised.to(where),
                own.observed.to(where),
                matrix,
                chosen.readout,
                keep_draws,
            )
        positions = result.labels.cpu().numpy()
        marginals = result.marginals.cpu().numpy()
        quality = label_quality(positions, marginals)
        label_map = self.table.from_positions(positions)
        return Segmentation(
            image=own.image,
            table=self.table,
            label_map=label_map,
            entropy=result.entropy.cpu().numpy().astype(np.float32),
            probabilities=marginals if keep_probabilities else None,
            draws=None if result.draws is None else self.table.from_positions(result.draws.cpu().numpy()),
            volume_draws=result.counts.cpu().numpy() * own.image.voxel_volume,
            touches_border=border_flags(label_map, self.table),
            z_draws=z.cpu().numpy(),
            observed_scan=on_grid[0].numpy(),
            observed=observed[0].numpy(),
            sample_stats={"log_evidence": result.log_likelihood.cpu().numpy()},
            bound=bound,
            provenance={
                "sources": [str(path) for path in paths],
                "scan": parse_name(paths[0]).stem,
                "version": __version__,
                "model_hash": self.hash,
                "seed": seed,
                "options": self.options(chosen, draws=draws, refine=refine, mask=mask, align=align, seed=seed),
                "seconds": time.monotonic() - began,
                "quality": dict(zip(self.table.names, (float(q) for q in quality), strict=True)),
            },
        )

    def checked_recipe(
        self,
        recipe: str | None,
        objective: str | None,
        guide: str | None,
        readout: str | None,
        likelihood_power: float | None,
    ) -> Recipe:
        """The recipe with a call's changes, or an InputError for what does not fit this model."""
        if readout not in (None, "marginals", "decoder"):
            raise InputError(f"--readout {readout}: choose marginals or decoder")
        if guide is not None and self.scan_guide is not None and guide != self.recipe.guide:
            raise InputError(
                f"--guide {guide}: the model was fitted with {self.recipe.guide}; fit again, or segment from the prior"
            )
        changes = {"objective": objective, "guide": guide, "readout": readout, "likelihood_power": likelihood_power}
        return changed_recipe(self.recipe, recipe, **changes)

    def options(self, recipe: Recipe, **others: Any) -> dict[str, Any]:
        """What decides on a result besides the scan and the model: for provenance, and to skip what is done."""
        others["align"] = others.get("align") or self.align
        return {"recipe": recipe.to_dict(), **{name: str(value) for name, value in others.items()}}

    def _infer(
        self,
        recipe: Recipe,
        scan: Tensor,
        observed: Tensor,
        refine: int | None,
        shape_from: str | Path | None,
        align: str | None,
    ) -> tuple[Posterior, SegmentationModel]:
        """q(z) and θ of one scan on the grid."""
        device = scan.device
        model = self.program(recipe, scan.shape[1]).to(device)
        fitted = self.scan_guide is not None and recipe.shape == "prior"
        maps = self.theta.background_log_weight if fitted and self.theta is not None else None
        maps = None if maps is None or recipe.maps is None else maps.to(device)
        if recipe.intensity == "shared" and model.shared_intensity is not None:
            theta: IntensityParameters = model.shared_intensity()
        elif recipe.intensity == "shared":
            raise InputError("shared intensities come from a fit: segment with its model, or choose another recipe")
        else:
            theta = start_theta(model, scan, observed, recipe, maps)
        if shape_from is not None:
            return self._encoded(recipe, model, scan, observed, theta, shape_from, align), model
        if fitted and self.scan_guide is not None:
            guide = self.scan_guide.to(device)
            with torch.no_grad():
                raw = guide.raw(scan, observed)
            steps, family = recipe.refine_steps if refine is None else refine, guide.family
            if recipe.intensity == "per-scan":
                z = family(raw).sample((4,))
                for _ in range(recipe.em_iterations // 2):
                    theta, _ = update_theta(model, z, scan, observed, theta, factor_of(recipe.objective), recipe.pseudo)
        else:
            family = build_family(recipe.guide, self.shape_prior.latent_dim).to(device)
            raw = torch.zeros(len(scan), family.num_parameters, device=device)
            steps = recipe.per_scan_steps if refine is None else refine
            if steps:
                raw = family.raw_at(best_start(model, self.codes.to(device), scan, observed, theta), START_SCALE)
        learn_maps = maps is None and recipe.maps is not None
        return infer(model, family, raw, scan, observed, theta, recipe, steps, learn_maps), model

    def _encoded(
        self,
        recipe: Recipe,
        model: SegmentationModel,
        scan: Tensor,
        observed: Tensor,
        theta: IntensityParameters,
        truth: str | Path,
        align: str | None,
    ) -> Posterior:
        """z from q(z|s) of a label map in place of inference; θ by EM at its draws."""
        image = read_label_map(truth)
        labels, inside = labels_on_grid(image, self.table, {}, self.grid, align or self.align)
        guide = self.label_guide.to(scan.device)
        with torch.no_grad():
            q = guide.posterior(labels[None].to(scan.device), inside[None].to(scan.device))
        posterior = Posterior(q, theta)
        z = posterior.sample(4)
        for _ in range(recipe.em_iterations):
            posterior.theta, _ = update_theta(
                model, z, scan, observed, posterior.theta, factor_of(recipe.objective), recipe.pseudo
            )
        return posterior


def load_model(directory: str | Path) -> Model:
    """Read a model directory; every file is verified, nothing is unpickled. InputError names what does not fit."""
    config, tensors = load_model_files(directory)
    try:
        shape, labels = config["shape_prior"], config["label_guide"]
        table = LabelTable.from_dict(config["labels"])
        grid, recipe = Grid.from_dict(config["grid"]), Recipe.from_dict(config["recipe"])
        location = tensors["shape_prior.log_location_prior"].exp()
        prior = build_shape_prior(location, shape["decoder"], shape["latent_dim"], **shape["options"])
        prior.load_state_dict(take_prefix(tensors, "shape_prior"))
        label_guide = build_label_map_guide(
            labels["family"], prior.latent_dim, len(table), prior.grid, **labels["options"]
        )
        label_guide.load_state_dict(take_prefix(tensors, "label_guide"))
        label_guide.follow(prior)
        scan_guide = None
        if config["kind"] == "fit":
            options = config["scan_guide"]["options"]
            scan_guide = build_scan_guide(recipe.guide, prior.latent_dim, config["channels"], prior.grid, **options)
            scan_guide.load_state_dict(take_prefix(tensors, "scan_guide"))
            freeze(scan_guide)
        freeze(prior)
        freeze(label_guide)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{Path(directory) / 'config.json'}: does not describe a model of this version ({error}); learn it again"
        ) from error
    kept = {"kind", "version", "labels", "grid", "align", "channels", "recipe"}
    return Model(
        table=table,
        grid=grid,
        align=config["align"],
        shape_prior=prior,
        label_guide=label_guide,
        codes=tensors["codes"],
        config={key: value for key, value in config.items() if key not in kept},
        recipe=recipe,
        channels=config["channels"],
        scan_guide=scan_guide,
        theta=theta_from(take_prefix(tensors, "theta")),
    )
