"""A model directory becomes a model. It may come from anywhere: all of it is checked, and none of it is executed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppl_seg.api.model import Model
from ppl_seg.api.trust import refuse_foreign, trust
from ppl_seg.data.alignment import KINDS
from ppl_seg.data.fields import FIELDS
from ppl_seg.data.grids import Grid
from ppl_seg.data.labels import LabelTable
from ppl_seg.errors import InputError
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.guides.label_network import build_label_network
from ppl_seg.inference.border_shift import BorderShift
from ppl_seg.inference.networks import (
    build_label_guide,
    build_scan_guide,
    build_shape_prior,
    freeze,
    take_prefix,
    theta_from,
    with_prefix,
)
from ppl_seg.inference.recipes import Recipe, changed_recipe
from ppl_seg.inference.store import CONFIG, WEIGHTS, load_model_files

_LABEL_MAPS = "shape_prior.label_maps"  # whole numbers, where all else is not
LARGEST_OPTION = 4096  # of a network's options: widths, levels
LARGEST_NUMBER = 1e6  # in a recipe: steps, batch sizes
MOST_STRENGTHS = 8  # of which a scan's bound chooses
_NOT_NETWORKS = {"kind", "version", "labels", "grid", "align", "field", "channels", "recipe", "border_shift"}


def load_model(directory: str | Path, trusted: Sequence[str] = ()) -> Model:
    """Read a model directory.

    Every file is verified and nothing is unpickled. The shapes that config.json asks for are compared with those of
    the weights before anything of their size is made.

    Args:
        trusted: import paths `package.module:Name` that config.json may name.

    Raises:
        InputError: naming the file that is missing, altered, of another format or does not fit.
    """
    trust(*trusted)
    config, tensors = load_model_files(directory)
    path = Path(directory) / CONFIG
    try:
        names = {"decoder": config["shape_prior"]["decoder"], "label guide": config["label_guide"]["family"]}
        names |= {"guide": config["recipe"]["guide"], "objective": config["recipe"]["objective"]}
        refuse_foreign(names, path)
        return _assemble(config, tensors)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not describe a model of this version ({error}); learn it again") from error


def _assemble(config: dict[str, Any], tensors: dict[str, Tensor]) -> Model:
    table, recipe, grid = LabelTable.from_dict(config["labels"]), _recipe(config["recipe"]), _grid(config["grid"])
    if config["align"] not in KINDS or config["field"] not in FIELDS or config["kind"] not in ("prior", "fit"):
        raise ValueError(f"align {config['align']!r}, field {config['field']!r} or kind {config['kind']!r} is unknown")
    if not all(name.isprintable() and name for name in table.names):
        raise ValueError("a label's name is empty or holds control characters")
    for name, tensor in tensors.items():
        if name == _LABEL_MAPS:
            if tensor.dtype != torch.int16 or not bool(((tensor >= 0) & (tensor < len(table))).all()):
                raise ValueError(f"{WEIGHTS} holds label maps with other labels than the table's: {name}")
        elif not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{WEIGHTS} holds values that are no finite numbers: {name}")
    location = tensors["shape_prior.log_location_prior"].exp()
    if location.shape != (len(table), *grid.shape):
        raise ValueError(f"{len(table)} labels on a grid of {grid.shape}, {WEIGHTS} has {tuple(location.shape)}")
    with torch.device("meta"):  # shapes without memory
        expected = _shapes(_networks(config, table, recipe, location.to("meta")))
    expected |= {"codes": (tensors["codes"].shape[0], config["shape_prior"]["latent_dim"])}
    expected |= _theta_shapes(config, recipe, table, grid)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = next(n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n))
        raise ValueError(f"{name}: shape {expected.get(name)} expected, {WEIGHTS} has {found.get(name)}")
    networks = _networks(config, table, recipe, location)
    for prefix, network in networks.items():
        network.load_state_dict(take_prefix(tensors, prefix))
    if isinstance(networks["label_guide"], LabelMapGuide):
        networks["label_guide"].follow(networks["shape_prior"])
    shift = networks.get("border_shift")
    if shift is not None and not (shift.usual > 0 and 0 < shift.blur <= LARGEST_OPTION):
        raise ValueError(f"border_shift: blur {float(shift.blur)} or usual {float(shift.usual)} is no size")
    for network in networks.values():
        freeze(network)
    model = Model(
        table=table,
        grid=grid,
        align=config["align"],
        shape_prior=networks["shape_prior"],
        label_guide=networks["label_guide"],
        codes=tensors["codes"],
        config={key: value for key, value in config.items() if key not in _NOT_NETWORKS},
        recipe=recipe,
        channels=config["channels"],
        scan_guide=networks.get("scan_guide"),
        theta=theta_from(take_prefix(tensors, "theta")),
        label_network=networks.get("label_network"),
        border_shift=networks.get("border_shift"),
        field_of_view=config["field"],
    )
    model.build_program(recipe, model.channels)
    return model


def _networks(config: Mapping[str, Any], table: LabelTable, recipe: Recipe, location: Tensor) -> dict[str, Any]:
    """The networks that config.json names, by the prefix of their tensors."""
    shape, labels = config["shape_prior"], config["label_guide"]
    prior = build_shape_prior(location, shape["decoder"], shape["latent_dim"], **_options(shape))
    networks: dict[str, nn.Module] = {
        "shape_prior": prior,
        "label_guide": build_label_guide(prior, labels["family"], **_options(labels)),
    }
    if config["kind"] == "fit":
        networks["scan_guide"] = build_scan_guide(
            prior, recipe.guide, config["channels"], **_options(config["scan_guide"])
        )
    if "label_network" in config:
        network = config["label_network"]
        networks["label_network"] = build_label_network(
            network["network"], prior, table.class_of_label, config["channels"], **_options(network)
        )
    if config.get("border_shift"):
        networks["border_shift"] = BorderShift(location.shape)
    return networks


def _shapes(networks: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    tensors = {k: t for prefix, network in networks.items() for k, t in with_prefix(network, prefix).items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _theta_shapes(
    config: Mapping[str, Any], recipe: Recipe, table: LabelTable, grid: Grid
) -> dict[str, tuple[int, ...]]:
    """Of a fit's θ: means and sds of every component and channel, weights, background maps."""
    if config["kind"] != "fit":
        return {}
    classes = len(table) if recipe.classes == "labels" else len(set(table.class_of_label))
    components = sum(recipe.gaussians(classes, table.fluid))
    shapes: dict[str, tuple[int, ...]] = {
        "theta.mean": (1, components, config["channels"]),
        "theta.sd": (1, components, config["channels"]),
        "theta.log_weight": (1, components),
    }
    if recipe.maps is not None:
        shapes["theta.background_log_weight"] = (recipe.background_components, math.prod(grid.shape))
    return shapes


def _options(part: Mapping[str, Any]) -> dict[str, int]:
    """Options of a network: small whole numbers."""
    for name, value in part["options"].items():
        if not isinstance(value, int) or not 0 <= value <= LARGEST_OPTION:
            raise ValueError(f"{name}: expected a whole number up to {LARGEST_OPTION}, found {value!r}")
    return dict(part["options"])


def _recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe whose values have the types of the default's, and whose numbers are of a sane size."""
    recipe, usual = Recipe.from_dict(dict(values)), Recipe()
    plain = {**usual.to_dict(), "likelihood_power": usual.beta}

    def check(name: str, value: Any, like: Any) -> None:
        if isinstance(value, Mapping) and isinstance(like, Mapping):
            for key, item in value.items():
                check(f"{name}.{key}", item, like[key])
        elif isinstance(like, tuple):
            if not isinstance(value, tuple) or not 1 <= len(value) <= MOST_STRENGTHS:
                raise ValueError(f"recipe: {name} is {value!r}, expected a list like {list(like)!r}")
            for item in value:
                check(name, item, like[0])
        elif isinstance(like, (int, float)) and not isinstance(like, bool):
            kinds = (int,) if isinstance(like, int) else (int, float)
            if not isinstance(value, kinds) or not 0 <= value <= LARGEST_NUMBER:
                raise ValueError(f"recipe: {name} is {value!r}, expected a number like {like!r}")
        elif not isinstance(value, type(like)) and value is not None:
            raise ValueError(f"recipe: {name} is {value!r}, expected something like {like!r}")

    check("recipe", {**recipe.to_dict(), "likelihood_power": recipe.beta}, plain)
    try:
        return changed_recipe(recipe)
    except InputError as error:  # it speaks of options; these come from the file
        raise ValueError(str(error)) from error


def _grid(values: dict[str, Any]) -> Grid:
    grid = Grid.from_dict(values)
    if grid.affine.shape != (4, 4) or not np.isfinite(grid.affine).all() or not np.linalg.det(grid.affine[:3, :3]):
        raise ValueError("the grid's affine is no invertible 4x4 matrix")
    return grid
