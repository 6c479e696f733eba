"""From a configuration to networks: what config.json names and what weights.safetensors fills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..guides.deformations import DeformationGuide
from ..guides.encoders import ConvolutionalEncoder, FieldEncoder
from ..guides.families import build_family
from ..guides.label_maps import LabelMapGuide
from ..guides.scans import ScanGuide
from ..models.decoders import build_decoder
from ..models.intensity import IntensityModel, IntensityParameters
from ..models.intensity_prior import SharedIntensity
from ..models.segmentation import SegmentationModel
from ..models.shape_prior import LabelPrior, ShapePrior
from ..models.warped_atlas import WarpedAtlas
from .objectives import OBJECTIVES
from .recipes import Recipe

START_SCALE = 0.2  # sd of q(z|s) before training, and of q(z|x) of an atlas

WARP = "warp"  # in the place of a decoder's name

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def build_shape_prior(location_prior: Tensor, decoder: str, latent_dim: int, **options: Any) -> LabelPrior:
    """p(z) p(s|z) on the grid of p_loc (M, *grid): a decoder's by its name, or the atlas that `warp` deforms.

    Raises:
        ValueError: unknown name, or a latent dimension that the atlas does not have.
    """
    num_labels, *grid = location_prior.shape
    if decoder == WARP:
        atlas = WarpedAtlas(location_prior, **options)
        if atlas.latent_dim != latent_dim:
            raise ValueError(f"latent_dim: {atlas.latent_dim} expected of this atlas, found {latent_dim}")
        return atlas
    return ShapePrior(location_prior, build_decoder(decoder, latent_dim, num_labels, grid, **options), latent_dim)


def build_label_guide(shape_prior: LabelPrior, family: str, **options: Any) -> LabelMapGuide | DeformationGuide:
    """q(z|s) of a shape prior: a network for a decoder, gradient steps for an atlas."""
    if isinstance(shape_prior, WarpedAtlas):
        return DeformationGuide(shape_prior, build_family(family, shape_prior.latent_dim), **options)
    return build_label_map_guide(family, shape_prior.latent_dim, shape_prior.num_labels, shape_prior.grid, **options)


def build_label_map_guide(
    family: str, latent_dim: int, num_labels: int, grid: Sequence[int], **options: Any
) -> LabelMapGuide:
    """q(z|s) by a network."""
    distribution = build_family(family, latent_dim)
    encoder = ConvolutionalEncoder(num_labels, grid, distribution.num_parameters, **options)
    with torch.no_grad():
        # from sd 1 the decoder learns to mistrust z before it has heard of it
        encoder.to_raw.bias.copy_(distribution.raw_at(torch.zeros(latent_dim), START_SCALE))
    return LabelMapGuide(encoder, distribution, num_labels)


def build_scan_guide(shape_prior: LabelPrior, family: str, channels: int, **options: Any) -> ScanGuide:
    """q(z|x); the encoder sees the scan and what of it is observed."""
    distribution = build_family(family, shape_prior.latent_dim)
    if isinstance(shape_prior, WarpedAtlas):
        fields = distribution.num_parameters // math.prod(shape_prior.control_grid)
        field_encoder = FieldEncoder(2 * channels, shape_prior.control_grid, fields, **options)
        start = distribution.raw_at(torch.zeros(shape_prior.latent_dim), START_SCALE)
        with torch.no_grad():
            field_encoder.to_raw.get_parameter("bias").copy_(start.view(fields, -1)[:, 0])
        encoder: nn.Module = field_encoder
    else:
        encoder = ConvolutionalEncoder(2 * channels, shape_prior.grid, distribution.num_parameters, **options)
    return ScanGuide(encoder, distribution)


def freeze(module: AnyModule) -> AnyModule:
    """No gradients, evaluation mode: Pyro then leaves the module alone."""
    return module.requires_grad_(False).eval()


def build_segmentation_model(
    shape_prior: LabelPrior,
    class_of_label: Sequence[int],
    channels: int,
    recipe: Recipe,
    shared: IntensityParameters | None = None,
    fluid: int | None = None,
    outer_fluid: Sequence[int] = (),
) -> SegmentationModel:
    """The program that a recipe asks for; the shape prior is frozen in place.

    Args:
        class_of_label: intensity class of each label, by the label table.
        shared: where shared θ starts, or what it is; None for θ per scan.
        fluid: class of cerebrospinal fluid, where there is one. outer_fluid: labels of what of it surrounds the brain.
    """
    num_labels = shape_prior.num_labels
    classes = list(range(num_labels)) if recipe.classes == "labels" else list(class_of_label)
    rates = recipe.observed_rates(num_labels, outer_fluid)
    components = recipe.gaussians(max(classes) + 1, fluid)
    intensity = IntensityModel(classes, components, channels, rates, recipe.outliers)
    if recipe.shape == "location":
        location = shape_prior.log_location_prior.exp()
        shape_prior = build_shape_prior(location, "location", 1)
    freeze(shape_prior)
    form = OBJECTIVES[recipe.objective].form  # type: ignore[attr-defined]
    shared_intensity = None if shared is None else SharedIntensity(intensity, shared)
    return SegmentationModel(shape_prior, intensity, recipe.beta, form, shared_intensity)


def with_prefix(module: nn.Module | None, prefix: str) -> dict[str, Tensor]:
    """A module's tensors under a prefix, for the model directory."""
    return {} if module is None else {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def take_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix."""
    start = prefix + "."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def theta_tensors(theta: IntensityParameters | None) -> dict[str, Tensor]:
    """θ as named tensors; empty for None."""
    if theta is None:
        return {}
    tensors = {"mean": theta.mean, "sd": theta.sd, "log_weight": theta.log_weight}
    if theta.log_weight_maps is not None:
        tensors["background_log_weight"] = theta.log_weight_maps
    return {name: tensor.detach() for name, tensor in tensors.items()}


def theta_from(tensors: dict[str, Tensor]) -> IntensityParameters | None:
    """The inverse of `theta_tensors`."""
    if not tensors:
        return None
    return IntensityParameters(
        tensors["mean"], tensors["sd"], tensors["log_weight"], tensors.get("background_log_weight")
    )


def mean_theta(theta: IntensityParameters) -> IntensityParameters:
    """One θ from many scans': means and the mean weights' logarithm, (1, ...)."""
    return IntensityParameters(
        theta.mean.mean(0, keepdim=True),
        theta.sd.mean(0, keepdim=True),
        torch.log(theta.log_weight.exp().mean(0, keepdim=True)),
        theta.log_weight_maps,
    )
