"""What was learned: a prior, or a prior fitted to scans. It is saved, and says how a scan is brought to it."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ppl_seg import __version__
from ppl_seg.api.output import say
from ppl_seg.data.alignment import Alignment, Atlas, align_scan
from ppl_seg.data.bias_field import log_bias_field
from ppl_seg.data.fields import brain_labels, field_of_scan
from ppl_seg.data.grids import Grid
from ppl_seg.data.labels import LabelTable
from ppl_seg.data.loading import OwnScan, scan_on_grid
from ppl_seg.data.resampling import resample
from ppl_seg.errors import InputError
from ppl_seg.files import file_sha256
from ppl_seg.guides.deformations import DeformationGuide
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.guides.label_network import AnyContrastNetwork, LabelNetwork
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.border_shift import BorderShift
from ppl_seg.inference.networks import (
    build_segmentation_model,
    freeze,
    theta_tensors,
    with_prefix,
)
from ppl_seg.inference.recipes import Recipe, build_recipe, changed_recipe, recipe_for_field
from ppl_seg.inference.store import save_model, tensor_bytes
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.normalisation import normalise
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import LabelPrior
from ppl_seg.models.warped_atlas import WarpedAtlas

LEAST_SEEN = 0.1  # share of the structures that the prior expects
MOST_BELOW_ZERO = 0.01  # share of a scan's voxels; interpolation leaves some


@dataclass
class LearnedModel:
    """All that `learn_prior` and `fit_scans` learn.

    Attributes:
        table: the label table. grid, align: the prior's grid, and how images are brought onto it.
        field_of_view: of the label maps: brain, head or crop (see `data.fields`).
        shape_prior, label_guide: p(z) p(s|z) and q(z|s), frozen. codes: q(z|s) means of the prior's label maps, (n, D).
        config: names and options of the networks, as in config.json.
        recipe: of stage 2. channels: C.
        scan_guide: q(z|x), after a fit. label_network: q(s|x), where one was learned.
        border_shift: of a fit's q(s|x), what brings the scans' mean label marginals near the prior's.
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
    label_network: LabelNetwork | AnyContrastNetwork | None = None
    border_shift: BorderShift | None = None
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
            **({} if self.border_shift is None else {"border_shift": True}),
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"theta.{name}": tensor for name, tensor in theta_tensors(self.theta).items()}
        tensors |= with_prefix(self.shape_prior, "shape_prior") | with_prefix(self.label_guide, "label_guide")
        tensors |= with_prefix(self.scan_guide, "scan_guide") | with_prefix(self.label_network, "label_network")
        return tensors | with_prefix(self.border_shift, "border_shift") | {"codes": self.codes}

    @property
    def hash(self) -> str:
        """SHA-256 of what the model computes, for provenance."""
        text = repr(sorted(self._configuration().items())).encode()
        return hashlib.sha256(text + tensor_bytes(self._tensors())).hexdigest()

    @property
    def scans_left_out(self) -> int:
        """How many of a fit's scans could not be used."""
        return int(self.config["training"].get("fit", {}).get("left_out", 0))

    @property
    def learned_asleep(self) -> bool:
        """Whether q(s|x) is a prior's, of scans simulated from label maps, rather than a fit's, of what it inferred."""
        return isinstance(self.label_network, AnyContrastNetwork)

    def without_label_network(self) -> Self:
        """The model without q(s|x), and what config.json says of it."""
        config = {key: value for key, value in self.config.items() if key != "label_network"}
        config["training"] = {key: value for key, value in config["training"].items() if key != "label_guide"}
        return replace(self, label_network=None, border_shift=None, config=config)

    def program(self, recipe: Recipe, channels: int, device: torch.device | None = None) -> SegmentationModel:
        """The probabilistic program that a recipe asks for, on this prior, frozen; on `device`, or the prior's."""
        shared = self.theta if recipe.intensity == "shared" else None
        return freeze(self.build_program(recipe, channels, shared, device))

    def build_program(
        self,
        recipe: Recipe,
        channels: int,
        shared: IntensityParameters | None = None,
        device: torch.device | None = None,
    ) -> SegmentationModel:
        """The same, with a θ of its own to learn where `shared` says how it starts."""
        table, prior = self.table, self.shape_prior
        if device is not None and prior.log_location_prior.device != device:
            prior = copy.deepcopy(prior)  # this model's stays where it is
        built = build_segmentation_model(
            prior, table.class_of_label, channels, recipe, shared, table.fluid, table.outer_fluid
        )
        return built if device is None else built.to(device)

    def atlas(self) -> Atlas:
        """What scans are registered to: p_loc as the commonest intensity class, and the probability of brain."""
        location = self.shape_prior.log_location_prior.detach().exp().cpu()
        classes = location.new_zeros(max(self.table.class_of_label) + 1, *location.shape[1:])
        classes.index_add_(0, torch.tensor(self.table.class_of_label), location)
        brain = location[torch.from_numpy(brain_labels(self.table))].sum(0)
        shape = self.grid.shape
        return Atlas(
            self.grid,
            classes.argmax(0).view(shape).numpy().astype(np.uint8),
            brain.view(shape).numpy(),
            self.field_of_view,
        )

    def for_scan(self, own: OwnScan, view: str | None = None) -> tuple[Self, str]:
        """This model, or for a brain under a prior of heads its brain alone; and the scan's field of view.

        Args:
            view: brain, head or crop, where the user knows; None decides by what is observed.
        """
        view = view or field_of_scan(own.image, own.observed.any(0).numpy())
        if view == "brain" and self.field_of_view == "head":
            outside = ~brain_labels(self.table)
            outside[0] = False
            names = [name for name, out in zip(self.table.names, outside, strict=True) if out]
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            say([f"{own.image.path}: a brain, under a prior of heads: left out is what lies outside it ({listed})"])
            return self._brain_alone(torch.from_numpy(outside)), view
        return self, view

    def _brain_alone(self, outside: Tensor) -> Self:
        """The model with all labels outside the brain, (M,) bool, made background."""
        return replace(self, shape_prior=self.shape_prior.without(outside), field_of_view="brain")

    def place(
        self, own: OwnScan, align: str | None = None, view: str | None = None, recipe: Recipe | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Alignment]:
        """A scan normalised in its own voxels (C, X, Y, Z), on the grid (1, C, *grid), observed there, where it lies.

        A head is normalised by its brain, so that a bright scalp does not make tissues alike.

        Args:
            align: in place of the model's. view: the scan's field of view, see `for_scan`.
            recipe: says whether the bias field is corrected; None takes the model's.

        Raises:
            InputError: the scan can't be aligned.
        """
        anywhere = own.observed.any(0).numpy()
        view = view or field_of_scan(own.image, anywhere)
        atlas = self.atlas()
        alignment = align_scan(align or self.align, own.image, anywhere, atlas, view)
        moved = alignment.overlap is not None or (alignment.kind == "center" and view != "crop")
        if moved or view != self.field_of_view:  # else nothing was decided
            overlap = "" if alignment.overlap is None else f", overlap {alignment.overlap:.2f}"
            say([f"{own.image.path}: a {view}; --align {alignment.kind}{overlap}"])
        region = torch.ones(own.image.shape, dtype=torch.bool)
        if view == "head":
            region = _brain_in(own, atlas, alignment)
        intensities = own.intensities
        if corrects_bias_field(recipe or self.recipe, own, view):
            intensities = _without_bias_field(own, region)
        normalised = normalise(intensities[None], own.observed[None], region)[0]
        scan, observed = scan_on_grid(normalised, own.observed, alignment.matrix, self.grid.shape)
        expected = 1 - self.shape_prior.log_location_prior[0].exp().cpu()
        share = float((expected * observed.any(0)).sum() / expected.sum())
        if share < LEAST_SEEN:
            raise InputError(
                f"{own.image.path}: wrong anatomy or no overlap with the prior: {share:.0%} of where it expects "
                "structures is observed; use another --align or --mask, or give scans of its space"
            )
        return normalised, scan[None], observed[None], alignment

    def checked_recipe(
        self,
        recipe: str | None,
        objective: str | None,
        guide: str | None,
        readout: str | None,
        likelihood_power: float | None,
        bias_field: str | None = None,
    ) -> Recipe:
        """The recipe with a call's changes, or an InputError for what does not fit this model."""
        if readout not in (None, "marginals", "decoder"):
            raise InputError(f"--readout {readout}: choose marginals or decoder")
        if guide is not None and self.scan_guide is not None and guide != self.recipe.guide:
            raise InputError(
                f"--guide {guide}: the model was fitted with {self.recipe.guide}; fit again, or segment from the prior"
            )
        changes: dict[str, Any] = {"objective": objective, "guide": guide, "readout": readout}
        changes |= {"likelihood_power": likelihood_power, "bias_field": bias_field}
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
        if Path(others.get("mask", "")).is_file():  # wherever it lies
            others["mask"] = f"sha256:{file_sha256(others['mask'])}"
        return {"recipe": recipe.to_dict(), **{name: str(value) for name, value in others.items()}}


def corrects_bias_field(recipe: Recipe, own: OwnScan, view: str) -> bool:
    """Whether N4 divides a scan of this field of view: of itself not one below 0, such as z-scores, or CT.

    Raises:
        InputError: where the recipe insists on it for such a scan.
    """
    if not recipe.corrects_bias_field(view):
        return False
    share = float((own.intensities[own.observed] < 0).float().mean())
    if share <= MOST_BELOW_ZERO:
        return True
    found = f"{own.image.path}: {share:.0%} of the intensities are below 0"
    if recipe.bias_field == "n4":
        raise InputError(f"{found}, which a multiplicative bias field does not allow; leave out --bias-field n4")
    say([f"{found} (CT, z-scores?): its bias field is not corrected"])
    return False


def _brain_in(own: OwnScan, atlas: Atlas, alignment: Alignment) -> Tensor:
    """(X, Y, Z) bool: where a scan shows the atlas' brain; all of it, where it shows none."""
    brain = torch.from_numpy(atlas.brain)[None].float()
    found = resample(brain, np.linalg.inv(alignment.matrix), own.image.shape)[0] > 0.5
    return found if bool((found & own.observed.all(0)).any()) else torch.ones_like(found)


def _without_bias_field(own: OwnScan, region: Tensor) -> Tensor:
    """The channels (C, X, Y, Z) divided by their bias fields, which are fitted in a region (X, Y, Z)."""
    fields = [
        log_bias_field(channel.numpy(), own.image.spacing, (region & seen).numpy())
        for channel, seen in zip(own.intensities, own.observed, strict=True)
    ]
    return own.intensities / torch.from_numpy(np.stack(fields)).exp()
