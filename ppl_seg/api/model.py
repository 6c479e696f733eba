"""A learned model: prior, or prior fitted to scans. It is saved, loaded, and segments scans."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from ppl_seg import __version__
from ppl_seg.api.output import say
from ppl_seg.data.alignment import Alignment, Atlas, align_scan, check_alignment
from ppl_seg.data.fields import brain_labels, check_view, field_of_scan
from ppl_seg.data.grids import Grid
from ppl_seg.data.images import read_label_map
from ppl_seg.data.labels import LabelTable
from ppl_seg.data.loading import OwnScan, labels_on_grid, load_scan, scan_on_grid
from ppl_seg.data.names import parse_name
from ppl_seg.data.resampling import inside as field_on_grid
from ppl_seg.errors import InputError
from ppl_seg.guides.deformations import DeformationGuide
from ppl_seg.guides.families import Family, build_family
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.expectation import label_responsibilities, update_theta
from ppl_seg.inference.label_training import log_label_marginals
from ppl_seg.inference.networks import (
    build_segmentation_model,
    freeze,
    theta_tensors,
    with_prefix,
)
from ppl_seg.inference.posterior import Posterior, best_start, factor_of, infer, start_theta
from ppl_seg.inference.recipes import Recipe, build_recipe, changed_recipe, recipe_for_field
from ppl_seg.inference.store import save_model, tensor_bytes
from ppl_seg.inference.trainer import resolve_device
from ppl_seg.inference.training_options import derived_seed
from ppl_seg.models.guided_intensity import outside_log_factor, with_label_factor, with_log_factor
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.normalisation import normalise
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import LabelPrior
from ppl_seg.models.warped_atlas import WarpedAtlas
from ppl_seg.results.provenance import Stopwatch
from ppl_seg.results.readout import read_out
from ppl_seg.results.segmentation import Segmentation
from ppl_seg.results.volumes import border_flags, label_quality

NEAR_BRAIN = 0.98  # probability of background below which a voxel outside a brain mask says something
START_SCALE = 0.3  # sd of a scan's own q(z) before its first step: the gradient hears the data before the noise


@dataclass(frozen=True)
class Inference:
    """One scan's posterior on the grid.

    program, data: what z was inferred with, data (scan, observed); both with the label guide's factor where there is
    one. model: the program without it; log_factor: it, log u (M, *grid), or None.
    bound: of the program, by the objective, nats; with the factor it is a lower bound of the bound without, see
    `models.guided_intensity`. kl: KL(q ‖ p).
    """

    posterior: Posterior
    program: SegmentationModel
    data: tuple[Tensor, Tensor]
    model: SegmentationModel
    log_factor: Tensor | None
    bound: float
    kl: float

    def label_marginals(self, draws: int, power: float) -> Tensor:
        """Responsibilities averaged over draws of z, (1, M, *grid). power: of the likelihood within them."""
        z = self.posterior.sample(draws)
        r = label_responsibilities(self.program, z, *self.data, self.posterior.theta, power=power)
        return r.unflatten(-1, self.model.shape_prior.grid)


@dataclass
class Model:
    """What `learn_prior` and `fit_scans` give.

    Attributes:
        table: the label table. grid, align: the prior's grid, and how images are brought onto it.
        field_of_view: of the label maps: brain, head or crop (see `data.fields`).
        shape_prior, label_guide: p(z) p(s|z) and q(z|s), frozen. codes: q(z|s) means of the prior's label maps, (n, D).
        config: names and options of the networks, as in config.json.
        recipe: of stage 2. channels: C.
        scan_guide, label_network: q(z|x) and q(s|x), after a fit.
        theta: of a fit: background maps, and shared or typical parameters.
    """

    table: LabelTable
    grid: Grid
    align: str
    shape_prior: LabelPrior
    label_guide: LabelMapGuide | DeformationGuide
    codes: Tensor
    config: dict[str, Any]
    recipe: Recipe = field(default_factory=lambda: build_recipe("default"))
    channels: int = 1
    scan_guide: ScanGuide | None = None
    theta: IntensityParameters | None = None
    label_network: nn.Module | None = None
    field_of_view: str = "crop"

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
            "field": self.field_of_view,
            "channels": self.channels,
            "recipe": self.recipe.to_dict(),
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"theta.{name}": tensor for name, tensor in theta_tensors(self.theta).items()}
        tensors |= with_prefix(self.shape_prior, "shape_prior") | with_prefix(self.label_guide, "label_guide")
        tensors |= with_prefix(self.scan_guide, "scan_guide") | with_prefix(self.label_network, "label_network")
        return tensors | {"codes": self.codes}

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

    def atlas(self) -> Atlas:
        """What scans are registered to: p_loc as the commonest intensity class, and the probability of brain."""
        location = self.shape_prior.log_location_prior.detach().exp().cpu()
        classes = torch.zeros(max(self.table.class_of_label) + 1, *location.shape[1:])
        classes.index_add_(0, torch.tensor(self.table.class_of_label), location)
        brain = location[torch.from_numpy(brain_labels(self.table))].sum(0)
        shape = self.grid.shape
        return Atlas(
            self.grid,
            classes.argmax(0).view(shape).numpy().astype(np.uint8),
            brain.view(shape).numpy(),
            self.field_of_view,
        )

    def for_scan(self, own: OwnScan, view: str | None = None) -> tuple[Model, str]:
        """This model, or for a brain under a prior of heads its brain alone; and the scan's field of view.

        Args:
            view: brain, head or crop, where the user knows; None decides by what is observed.
        """
        view = view or field_of_scan(own.image, own.observed.any(0).numpy())
        if view == "brain" and self.field_of_view == "head":
            return self._brain_alone(), view
        return self, view

    def _brain_alone(self) -> Model:
        """The model with all labels outside the brain made background."""
        outside = torch.from_numpy(~brain_labels(self.table))
        outside[0] = False
        prior = copy.deepcopy(self.shape_prior)
        location = prior.log_location_prior.exp()
        location[0] += location[outside].sum(0)
        location[outside] = torch.finfo(location.dtype).tiny
        prior.log_location_prior.copy_(location.log())
        return replace(self, shape_prior=prior, field_of_view="brain")

    def place(
        self, own: OwnScan, align: str | None = None, view: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Alignment]:
        """A scan normalised in its own voxels (C, X, Y, Z), on the grid (1, C, *grid), observed there, where it lies.

        Args:
            align: in place of the model's. view: the scan's field of view, see `for_scan`.

        Raises:
            InputError: the scan can't be aligned.
        """
        normalised = normalise(own.intensities[None], own.observed[None])[0]
        anywhere = own.observed.any(0).numpy()
        view = view or field_of_scan(own.image, anywhere)
        alignment = align_scan(align or self.align, own.image, anywhere, self.atlas(), view)
        if alignment.overlap is not None:
            say([f"{own.image.path}: a {view}; {alignment.kind} to the prior, overlap {alignment.overlap:.2f}"])
        scan, observed = scan_on_grid(normalised, own.observed, alignment.matrix, self.grid.shape)
        if not bool(observed.any()):
            raise InputError(
                f"{own.image.path}: nothing of the scan lies on the prior's grid; use --align center, or "
                "give scans of its space"
            )
        return normalised, scan[None], observed[None], alignment

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
        channel_align: str = "rigid",
        view: str | None = None,
        recipe: str | None = None,
        shape_from: str | Path | None = None,
        keep_probabilities: bool = False,
        keep_draws: bool = False,
        share: float = 1.0,
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
            channel_align: rigid or none, for channels on other grids than the first one's.
            view: brain or head, where the user knows what the scan shows; None decides.
            shape_from: a label map of this scan whose q(z|s) stands for the inference of z: a ceiling, no segmentation.
            keep_probabilities, keep_draws: keep the label marginals, all drawn segmentations.
            share: of the read-out's usual working memory; less takes longer.

        Raises:
            InputError: a file that can't be read, options that don't fit the model.
        """
        watch = Stopwatch()
        paths = scan if isinstance(scan, tuple) else (Path(scan),)
        asked = self.checked_recipe(recipe, objective, guide, readout, likelihood_power)
        check_alignment(align or self.align)
        check_view(view)
        if draws < 1 or (refine or 0) < 0:
            raise InputError(f"--draws {draws}, --refine {refine}: expected at least 1 draw and 0 steps")
        if len(paths) != self.channels and self.scan_guide is not None:
            raise InputError(
                f"{paths[0]}: the model was fitted to scans of {self.channels} channels; found {len(paths)}; "
                "see --channels"
            )
        where = resolve_device(device)
        own = load_scan(paths, mask, channel_align)
        watch.lap("read")
        fitting, shown = self.for_scan(own, view)
        chosen = fitting.adapted_recipe(asked)
        normalised, on_grid, observed, alignment = fitting.place(own, align, shown)
        watch.lap("align")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, 0, Path(paths[0]).name))
            encoded = None if shape_from is None else fitting._encoded(shape_from, alignment, where)
            shows = field_on_grid(alignment.matrix, own.image.shape, fitting.grid.shape)
            found = fitting.infer(chosen, on_grid.to(where), observed.to(where), refine, encoded, inside=shows)
            z = found.posterior.sample(draws)[:, 0]
            watch.lap("infer")
            # outside the mask is background; within it, voxels without a value may be anything
            region = own.observed.any(0) | ~torch.from_numpy(np.isfinite(own.image.data))
            result = read_out(
                found.model,
                z,
                found.posterior.theta,
                normalised.to(where),
                own.observed.to(where),
                alignment.matrix,
                chosen.readout,
                keep_draws,
                keep_probabilities,
                region.to(where),
                share,
                found.log_factor,
                chosen.power_at(own.image.voxel_volume),
            )
        positions = result.labels.cpu().numpy()
        quality = label_quality(positions, result.confidence.cpu().numpy(), len(self.table))
        label_map = self.table.from_positions(positions)
        watch.lap("readout")
        return Segmentation(
            image=own.image,
            table=self.table,
            label_map=label_map,
            entropy=result.entropy.cpu().numpy().astype(np.float32),
            probabilities=None if result.marginals is None else result.marginals.cpu().numpy(),
            draws=None if result.draws is None else self.table.from_positions(result.draws.cpu().numpy()),
            volume_draws=result.counts.cpu().numpy() * own.image.voxel_volume,
            touches_border=border_flags(label_map, self.table),
            z_draws=z.cpu().numpy(),
            observed_scan=on_grid[0].numpy(),
            observed=observed[0].numpy(),
            alignment=alignment,
            sample_stats={"log_evidence": result.log_likelihood.cpu().numpy()},
            bound={"bound": found.bound, "kl": found.kl},
            provenance={
                "sources": [str(path) for path in paths],
                "scan": parse_name(paths[0]).stem,
                "version": __version__,
                "model_hash": self.hash,
                "seed": seed,
                "options": self.options(
                    asked,
                    draws=draws,
                    refine=refine,
                    mask=mask,
                    align=align,
                    channel_align=channel_align,
                    view=view,
                    seed=seed,
                ),
                "seconds": watch.seconds,
                "device": str(where),
                "field": fitting.field_of_view,
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

    def adapted_recipe(self, recipe: Recipe) -> Recipe:
        """A recipe as it is used for this model's field of view; a fit's own was adapted when it was fitted."""
        own = self.scan_guide is not None and recipe.name == self.recipe.name
        if own:
            return recipe
        warped = isinstance(self.shape_prior, WarpedAtlas)
        return recipe_for_field(recipe, self.field_of_view, math.prod(self.grid.spacing), warped)

    def options(self, recipe: Recipe, **others: Any) -> dict[str, Any]:
        """What decides on a result besides the scan and the model: for provenance, and to skip what is done."""
        others["align"] = others.get("align") or self.align
        return {"recipe": recipe.to_dict(), **{name: str(value) for name, value in others.items()}}

    def infer(
        self,
        recipe: Recipe,
        scan: Tensor,
        observed: Tensor,
        refine: int | None = None,
        encoded: dist.Distribution | None = None,
        amortised: bool = True,
        inside: Tensor | None = None,
    ) -> Inference:
        """q(z) and θ of one scan, (1, C, *grid), as `segment` infers them.

        Args:
            recipe: adapted to the field of view. refine: gradient steps; None takes the recipe's.
            encoded: q(z) in place of its inference. amortised: with the q(z|x) and the background maps of a fit.
            inside: bool, (*grid), the image's field of view; None, all of the grid.

        Raises:
            InputError: the recipe shares θ among scans, and the model was fitted to none.
        """
        device = scan.device
        model = self.program(recipe, scan.shape[1]).to(device)
        fitted = self.scan_guide is not None and recipe.shape == "prior"
        maps = self.theta.background_log_weight if fitted and amortised and self.theta is not None else None
        maps = None if maps is None or recipe.maps is None else maps.to(device)
        program, data = model, (scan, observed)
        log_factor, evidence = self._evidence(recipe, scan, observed, inside, fitted)
        if evidence is not None:
            program = with_label_factor(self.program(recipe, scan.shape[1]).to(device))
            data = with_log_factor(scan, observed, *evidence)
        if recipe.intensity == "shared" and model.shared_intensity is not None:
            theta: IntensityParameters = model.shared_intensity()
        elif recipe.intensity == "shared":
            raise InputError("shared intensities come from a fit: segment with its model, or choose another recipe")
        else:
            theta = start_theta(program, *data, recipe, maps)
        if encoded is not None:
            posterior = Posterior(encoded, self._theta_at(encoded, program, data, theta, recipe, recipe.em_iterations))
        else:
            family, raw, steps = self._start(recipe, refine, program, data, theta, amortised)
            if fitted and amortised and recipe.intensity == "per-scan":
                theta = self._theta_at(family(raw), program, data, theta, recipe, recipe.em_iterations // 2)
            posterior = infer(
                program, family, raw, *data, theta, recipe, steps, maps is None and recipe.maps is not None
            )
        bound = posterior.bound(program, recipe.objective, *data)
        return Inference(posterior, program, data, model, log_factor, bound, float(posterior.kl(program)[0]))

    def _evidence(
        self, recipe: Recipe, scan: Tensor, observed: Tensor, inside: Tensor | None, fitted: bool
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """What else than intensities speaks of labels: log factor of the read-out (M, *grid), and of the inference.

        The latter (1, M, *grid) with where it counts (1, 1, *grid). Outside a brain mask but near brains only the mask
        speaks.
        """
        location = self.shape_prior.log_location_prior.to(scan.device)
        seen = observed.any(1, keepdim=True)
        said, total = None, torch.zeros_like(location)[None]
        if fitted and self.label_network is not None and recipe.label_rounds:
            network = self.label_network.to(scan.device)
            said = log_label_marginals(network, location, scan, observed)
            total = torch.where(seen, said, 0.0)
        said = None if said is None else said[0]
        if recipe.mask_background == 1:
            return said, None if said is None else (total, seen)
        near = location[0].exp() < NEAR_BRAIN
        counts = seen | (near if inside is None else near & inside.to(near.device))
        return said, (total + outside_log_factor(seen, len(location), recipe.mask_background), counts)

    def _start(
        self,
        recipe: Recipe,
        refine: int | None,
        program: SegmentationModel,
        data: tuple[Tensor, Tensor],
        theta: IntensityParameters,
        amortised: bool,
    ) -> tuple[Family, Tensor, int]:
        """A family, where its raw parameters start, and the number of gradient steps."""
        scan, observed = (part[:, : self.channels] for part in data)
        if amortised and self.scan_guide is not None and recipe.shape == "prior":
            guide = self.scan_guide.to(scan.device)
            with torch.no_grad():
                raw = guide.raw(scan, observed)
            return guide.family, raw, recipe.refine_steps if refine is None else refine
        steps = recipe.per_scan_steps if refine is None else refine
        family = build_family(recipe.guide, program.shape_prior.latent_dim).to(scan.device)
        raw = torch.zeros(len(scan), family.num_parameters, device=scan.device)
        if steps:
            raw = family.raw_at(best_start(program, self.codes.to(scan.device), *data, theta), START_SCALE)
        return family, raw, steps

    def _theta_at(
        self,
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

    def _encoded(self, truth: str | Path, alignment: Alignment, device: torch.device) -> dist.Distribution:
        """q(z|s) of a label map."""
        image = read_label_map(truth)
        labels, inside = labels_on_grid(image, self.table, {}, alignment.matrix, self.grid.shape)
        guide = self.label_guide.to(device)
        with torch.no_grad():
            encoded: dist.Distribution = guide.posterior(labels[None].to(device), inside[None].to(device))
        return encoded
