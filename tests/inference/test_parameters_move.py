"""By Pyro's SVI and by a torch optimiser, every trainable parameter moves, every time; frozen ones do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from ppl_seg.guides.encoders import ConvolutionalEncoder
from ppl_seg.guides.families import FAMILIES, build_family
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.objectives import OBJECTIVES, build_objective
from ppl_seg.models.decoders import build_decoder
from ppl_seg.models.intensity import IntensityModel
from ppl_seg.models.intensity_prior import IntensityPrior, SharedIntensity
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import ShapeModel, ShapePrior

GRID = (24, 20)
D, M = 3, 3
Run = Callable[[Any, Any, Any, tuple[Any, ...]], None]


def by_svi(objective: Any, model: Any, guide: Any, arguments: tuple[Any, ...]) -> None:
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective)
        for _ in range(4):
            svi.step(*arguments)


def by_torch(objective: Any, model: Any, guide: Any, arguments: tuple[Any, ...]) -> None:
    with pyro.get_param_store().scope():
        module = objective(model, guide)
        module(*arguments)
        optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            optimiser.zero_grad()
            module(*arguments).backward()
            optimiser.step()


RUNS = {"SVI": by_svi, "torch": by_torch}


def shape_prior() -> ShapePrior:
    return ShapePrior(torch.rand(M, *GRID).softmax(0), build_decoder("convolutional", D, M, GRID, width=4), D)


def trained_shape_prior() -> ShapePrior:
    """With a decoder that says something: the last layer away from zero."""
    shape = shape_prior()
    with torch.no_grad():
        for parameter in shape.decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return shape


def snapshot(*modules: nn.Module) -> dict[str, Tensor]:
    return {f"{i}.{n}": p.detach().clone() for i, m in enumerate(modules) for n, p in m.named_parameters()}


def unmoved(before: dict[str, Tensor], *modules: nn.Module) -> list[str]:
    after = snapshot(*modules)
    return [name for name, value in before.items() if torch.equal(value, after[name])]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", ["marginal", "trace"])
def test_stage_1(name: str, run: Run) -> None:
    for _ in range(2):  # the second training in one process too
        model = ShapeModel(shape_prior())
        family = build_family("mean-field", D)
        guide = LabelMapGuide(ConvolutionalEncoder(M, GRID, family.num_parameters, width=4), family, M)
        labels = torch.randint(0, M, (2, *GRID))
        observed = torch.ones(2, 1, *GRID, dtype=torch.bool)
        before = snapshot(model, guide)
        run(build_objective(name), model, guide, (labels, observed))
        assert unmoved(before, model, guide) == []


@pytest.mark.parametrize("name", ["enum", "jensen", "iwae", "sleep"])
def test_stage_1_refuses_objectives_about_intensities(name: str) -> None:
    model = ShapeModel(shape_prior())
    family = build_family("mean-field", D)
    guide = LabelMapGuide(ConvolutionalEncoder(M, GRID, family.num_parameters, width=4), family, M)
    labels = torch.randint(0, M, (2, *GRID))
    with pytest.raises(ValueError):
        build_objective(name).differentiable_loss(model, guide, labels, torch.ones(2, 1, *GRID, dtype=torch.bool))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_stage_2_with_a_frozen_decoder(name: str, run: Run) -> None:
    """Shared θ by gradient and an encoder; the decoder is bit-identical afterwards."""
    shape = trained_shape_prior().requires_grad_(False)
    frozen = snapshot(shape)
    for _ in range(2):
        intensity = IntensityModel((0, 1, 2), (2, 1, 1))
        theta = IntensityPrior(intensity).sample(2)
        objective = build_objective(name)
        model = SegmentationModel(
            shape,
            intensity,
            form=objective.form,
            shared_intensity=SharedIntensity(intensity, theta.select(slice(0, 1))),
        )
        family = build_family("mean-field", D)
        guide = ScanGuide(ConvolutionalEncoder(2, GRID, family.num_parameters, width=4), family)
        observed = torch.rand(2, 1, *GRID) > 0.2
        before = snapshot(model.shared_intensity, guide)
        run(objective, model, guide, (torch.rand(2, 1, *GRID), observed))
        left = unmoved(before, model.shared_intensity, guide)
        if name == "sleep":  # trains the guide alone
            left = [parameter for parameter in left if not parameter.startswith("0.")]
        # classes of one component have one weight, 1, whose gradient is 0; the tensor as a whole moves
        assert left == []
        assert len(unmoved(frozen, shape)) == len(frozen)
        assert not any(p.requires_grad for p in shape.parameters())


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("family_name", FAMILIES)
def test_stage_2_with_a_decoder_that_trains(family_name: str, run: Run) -> None:
    shape = trained_shape_prior()
    intensity = IntensityModel((0, 1, 1), (2, 1), channels=2)
    model = SegmentationModel(shape, intensity, likelihood_power=0.3)
    family = build_family(family_name, D)
    guide = ScanGuide(ConvolutionalEncoder(4, GRID, family.num_parameters, width=4), family)
    scan, observed = torch.rand(2, 2, *GRID), torch.ones(2, 1, *GRID, dtype=torch.bool)
    before = snapshot(model, guide)
    run(build_objective("marginal"), model, guide, (scan, observed, IntensityPrior(intensity).sample(2)))
    assert unmoved(before, model, guide) == []


def test_the_store_is_left_as_it_was() -> None:
    before = set(pyro.get_param_store().keys())
    test_stage_1("marginal", by_svi)
    assert set(pyro.get_param_store().keys()) == before
