"""What will run on a GPU runs on the meta device: a tensor made on the wrong device is an error there."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from ppl_seg.guides.deformations import DeformationGuide
from ppl_seg.guides.encoders import ConvolutionalEncoder
from ppl_seg.guides.families import FAMILIES, build_family
from ppl_seg.guides.label_factors import LabelFactorGuide
from ppl_seg.guides.label_maps import LabelMapGuide
from ppl_seg.guides.label_network import LabelNetwork
from ppl_seg.guides.per_scan import PerScanGuide
from ppl_seg.guides.scans import ScanGuide
from ppl_seg.inference.expectation import MapOptions, expectation_maximisation, initial_theta
from ppl_seg.models.decoders import DECODERS, build_decoder
from ppl_seg.models.guided_intensity import outside_log_factor, with_label_factor, with_log_factor
from ppl_seg.models.intensity import IntensityModel, IntensityParameters
from ppl_seg.models.intensity_prior import IntensityPrior, SharedIntensity
from ppl_seg.models.label_mixture import LabelMixture
from ppl_seg.models.normalisation import normalise
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import ShapeModel, ShapePrior, location_prior
from ppl_seg.models.warped_atlas import WarpedAtlas

META = torch.device("meta")
B, C, M, D = 2, 2, 4, 3
GRIDS = [(24, 20), (16, 12, 10)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.fixture(autouse=True)
def no_validation() -> Iterator[None]:
    with pyro.validation_enabled(False):
        yield


def shape_prior(grid: tuple[int, ...], decoder: str = "convolutional") -> ShapePrior:
    prior = torch.full((M, *grid), 1 / M)
    return ShapePrior(prior, build_decoder(decoder, D, M, grid), D).to(META)


def intensity() -> IntensityModel:
    return IntensityModel((0, 1, 2, 1), (2, 1, 3), channels=C).to(META)


def warped_atlas(grid: tuple[int, ...]) -> WarpedAtlas:
    return WarpedAtlas(torch.full((M, *grid), 1 / M), control=8).to(META)


def theta(grid: tuple[int, ...], maps: bool, batch: int = B) -> IntensityParameters:
    J = torch.Size(grid).numel()
    shapes = [(batch, 6, C), (batch, 6, C), (batch, 6), (2, J)]
    tensors = [torch.empty(s, device=META, requires_grad=True) for s in shapes]
    return IntensityParameters(*tensors[:3], tensors[3] if maps else None)


def on_cpu(there: IntensityParameters) -> IntensityParameters:
    maps = there.log_weight_maps
    filled = [torch.ones(t.shape) for t in (there.mean, there.sd, there.log_weight)]
    return IntensityParameters(*filled, None if maps is None else torch.ones(maps.shape))


def data(grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.empty(B, C, *grid, device=META), torch.empty(B, 1, *grid, device=META, dtype=torch.bool)


def backward(value: Tensor) -> None:
    assert value.device == META
    value.sum().backward()


@each_grid
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, grid: tuple[int, ...]) -> None:
    z = torch.empty(5, B, D, device=META, requires_grad=True)
    shape = shape_prior(grid, name)
    assert shape.log_label_probs(z).shape == (5, B, M, *grid)
    if name == "convolutional":
        backward(shape.log_label_probs(z))


@each_grid
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("method", ["log_prob", "expected_log_prob"])
def test_fused_likelihood(method: str, maps: bool, grid: tuple[int, ...]) -> None:
    scores = torch.empty(3, B, M, *grid, device=META, requires_grad=True)
    scan, observed = data(grid)
    parameters = theta(grid, maps)
    mixture = LabelMixture(scores, torch.empty(M, *grid, device=META), parameters, intensity(), observed)
    value = getattr(mixture, method)(scan)
    assert value.shape == (3, B)
    backward(value)
    for tensor in (scores, parameters.mean, parameters.sd, parameters.log_weight):
        assert tensor.grad is not None and tensor.grad.device == META


@each_grid
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("form", ["collapsed", "enumerated"])
def test_model_given_a_scan(form: str, maps: bool, grid: tuple[int, ...]) -> None:
    model = SegmentationModel(shape_prior(grid), intensity(), 0.3, form=form)
    trace = poutine.trace(model).get_trace(*data(grid), theta(grid, maps))
    backward(trace.log_prob_sum())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@each_grid
@pytest.mark.parametrize("form", ["collapsed", "enumerated"])
def test_model_with_observed_left_out_and_shared_theta(form: str, grid: tuple[int, ...]) -> None:
    parameters = intensity()
    shared = SharedIntensity(parameters, on_cpu(theta(grid, True, 1))).to(META)
    model = SegmentationModel(shape_prior(grid), parameters, form=form, shared_intensity=shared)
    backward(poutine.trace(model).get_trace(data(grid)[0]).log_prob_sum())
    for parameter in shared.parameters():
        assert parameter.grad is not None and parameter.grad.device == META


@each_grid
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("form", ["collapsed", "enumerated"])
def test_simulation(form: str, maps: bool, grid: tuple[int, ...]) -> None:
    model = SegmentationModel(shape_prior(grid), intensity(), form=form)
    with torch.no_grad():
        assert model(None, data(grid)[1], theta(grid, maps)).device == META
        assert model(num_scans=3).shape == (3, C, *grid)


def test_intensity_prior() -> None:
    drawn = IntensityPrior(intensity()).sample(3)
    assert drawn.mean.device == drawn.sd.device == drawn.log_weight.device == META


@each_grid
@pytest.mark.parametrize("family_name", FAMILIES)
def test_guides(family_name: str, grid: tuple[int, ...]) -> None:
    family = build_family(family_name, D).to(META)
    P = family.num_parameters
    scan, observed = data(grid)
    labels = torch.empty(B, *grid, dtype=torch.long, device=META)
    guides = [
        (ScanGuide(ConvolutionalEncoder(2 * C, grid, P, width=4).to(META), family), (scan, observed)),
        (PerScanGuide(family, torch.empty(B, P, device=META)), (scan, observed)),
        (LabelMapGuide(ConvolutionalEncoder(M, grid, P, width=4).to(META), family, M), (labels, observed)),
    ]
    for guide, arguments in guides:
        pyro.clear_param_store()
        trace = poutine.trace(guide).get_trace(*arguments)
        backward(trace.log_prob_sum())
        prior = torch.distributions.Normal(torch.zeros(D, device=META), 1.0)
        q = trace.nodes["z"]["fn"]
        q = q.base_dist if type(q).__name__ == "ExpandedDistribution" else q
        kl = torch.distributions.kl_divergence(q, torch.distributions.Independent(prior, 1))
        assert kl.shape == (B,)


@each_grid
@pytest.mark.parametrize("factor", ["prior", "posterior"])
def test_label_factors(factor: str, grid: tuple[int, ...]) -> None:
    family = build_family("mean-field", D).to(META)
    model = SegmentationModel(shape_prior(grid), intensity(), form="enumerated")
    guide = LabelFactorGuide(PerScanGuide(family, torch.empty(B, 2 * D, device=META)), model, factor=factor)
    trace = poutine.trace(guide).get_trace(*data(grid), theta(grid, True))
    backward(trace.log_prob_sum())
    assert trace.nodes["labels"]["value"].device == META
    assert guide.z_guide.raw.grad is not None and guide.z_guide.raw.grad.device == META


@each_grid
def test_stage_1_model(grid: tuple[int, ...]) -> None:
    labels = torch.empty(B, *grid, dtype=torch.long, device=META)
    model = ShapeModel(shape_prior(grid))
    backward(poutine.trace(model).get_trace(labels, data(grid)[1]).log_prob_sum())
    with torch.no_grad():
        assert model(num_scans=3).shape == (3, *grid)


@each_grid
def test_normalisation_and_location_prior(grid: tuple[int, ...]) -> None:
    assert normalise(*data(grid)).device == META
    labels = torch.empty(B, *grid, dtype=torch.long, device=META)
    assert location_prior(labels, data(grid)[1], M).shape == (M, *grid)


@each_grid
@pytest.mark.parametrize("factor", ["prior", "posterior"])
def test_em(factor: str, grid: tuple[int, ...]) -> None:
    """E-step, m_step and maps."""
    model = SegmentationModel(shape_prior(grid), intensity(), 0.3)
    scan, observed = data(grid)
    with torch.no_grad():
        start = initial_theta(model.intensity, torch.empty(M, *grid, device=META), scan, observed)
        z = torch.empty(3, B, D, device=META)
        found = expectation_maximisation(model, scan, observed, start, z, 2, factor, maps=MapOptions())
    assert found.log_weight_maps is not None
    for tensor in (found.mean, found.sd, found.log_weight, found.log_weight_maps):
        assert tensor.device == META


@each_grid
def test_warped_atlas(grid: tuple[int, ...]) -> None:
    atlas = warped_atlas(grid)
    z = torch.empty(2, atlas.latent_dim, device=META, requires_grad=True)
    assert atlas.log_label_probs(z).shape == (2, M, *grid)
    backward(atlas.log_label_probs(z))
    voxels = torch.empty(7, dtype=torch.long, device=META)
    backward(atlas.label_log_prob(z[0], voxels, voxels))
    assert atlas.z_of(atlas.coefficients(z)).device == META


def test_the_guide_of_an_atlas_takes_it_along() -> None:
    atlas = WarpedAtlas(torch.full((M, 16, 12, 10), 1 / M), control=8)
    guide = DeformationGuide(atlas, build_family("mean-field", atlas.latent_dim)).to(META)
    assert guide is not atlas and atlas.log_location_prior.device == META and not guide.state_dict()


@each_grid
def test_em_with_a_label_network(grid: tuple[int, ...]) -> None:
    model, (scan, observed) = SegmentationModel(shape_prior(grid), intensity(), 0.3), data(grid)
    with torch.no_grad():
        factor = LabelNetwork(C, M, grid, width=8).to(META)(scan, observed)
        factor = factor + outside_log_factor(observed, [0.2, *[1.0] * (M - 1)])
        guided, scans = with_label_factor(model), with_log_factor(scan, observed, factor)
        z = torch.empty(3, B, D, device=META)
        found = expectation_maximisation(guided, *scans, theta(grid, True), z, 1, maps=MapOptions())
    assert found.mean.shape == (B, 6, C) and found.mean.device == META
    backward(poutine.trace(guided).get_trace(*scans, theta(grid, True)).log_prob_sum())
