"""The shape prior, the stage-1 program and the location prior."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from pyro import poutine

from ppl_seg.models.decoders import build_decoder
from ppl_seg.models.shape_prior import ShapeModel, ShapePrior, gaussian_blur, location_prior
from tests.reference.problems import make_problem


def test_log_f_is_softmax_of_scores_and_location_prior() -> None:
    problem = make_problem(grid=(3, 2, 2))
    z = torch.randn(5, 2, 2, dtype=torch.float64)
    shape = problem.shape_prior()
    torch.testing.assert_close(shape.log_label_probs(z).flatten(3), problem.log_f(z), rtol=1e-12, atol=1e-14)
    logits = shape.label_scores(z) + problem.location_prior.log()
    torch.testing.assert_close(shape.label_logits(z), logits, rtol=1e-12, atol=0)
    assert shape.num_labels == 3 and shape.grid == (3, 2, 2)


def test_location_prior_must_be_positive() -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="positive"):
        ShapePrior(torch.zeros(3, 3, 2), problem.decoder, 2)


@pytest.mark.parametrize("grid", [(3, 2), (3, 2, 2)])
def test_stage_1_log_likelihood_by_loops(grid: tuple[int, ...]) -> None:
    problem = make_problem(grid=grid, mask="some")
    observed = problem.observed
    labels = torch.randint(0, 3, (2, *grid))
    z = problem.z()
    model = ShapeModel(problem.shape_prior())
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(labels, observed)
    trace.compute_log_prob()
    site = trace.nodes["labels"]
    log_f = problem.log_f(z)
    for b in range(2):
        chosen = [
            log_f[b, labels[b].flatten()[j], j] for j in range(log_f.shape[-1]) if bool(observed[b, 0].flatten()[j])
        ]
        torch.testing.assert_close(site["log_prob"][b], torch.stack(chosen).sum(), rtol=1e-12, atol=0)
    prior = torch.distributions.Normal(torch.zeros(2).double(), 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], prior, rtol=1e-12, atol=0)


@pytest.mark.parametrize("foreign", [3, 255, -1])
def test_labels_of_unobserved_voxels_need_not_exist(foreign: int) -> None:
    problem = make_problem(grid=(3, 2, 2), mask="some")
    labels, model = torch.randint(0, 3, (2, 3, 2, 2)), ShapeModel(problem.shape_prior())
    strange = torch.where(problem.observed[:, 0], labels, foreign)
    z, found = problem.z(), []
    for given in (labels, strange):
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(given, problem.observed)
        trace.compute_log_prob()
        found.append(trace.nodes["labels"]["log_prob"])
    assert torch.equal(*found)
    assert not torch.equal(labels, strange)


def test_stage_1_labels_sum_to_one_over_all_label_maps() -> None:
    problem = make_problem(grid=(3, 1), num_scans=1, mask="none")
    model, z = ShapeModel(problem.shape_prior()), problem.z()
    total = torch.zeros((), dtype=torch.float64)
    for labels in itertools.product(range(3), repeat=3):
        data = torch.tensor(labels).reshape(1, 3, 1)
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(data, problem.observed)
        trace.compute_log_prob()
        total = total + trace.nodes["labels"]["log_prob"].exp().sum()
    assert float(total) == pytest.approx(1.0, rel=1e-12)


def test_stage_1_simulates_with_the_frequencies_of_f() -> None:
    """20 000 label maps at one z; 36 frequencies within 5 standard errors: failure rate 2e-5; fixed seed."""
    problem = make_problem(num_scans=1, mask="none")
    z = problem.z()
    pyro.set_rng_seed(0)
    with torch.no_grad():
        model = poutine.condition(ShapeModel(problem.shape_prior()), {"z": z.expand(20_000, -1)})
        labels = model(num_scans=20_000)
        f = problem.log_f(z)[0].exp()
    assert labels.shape == (20_000, 3, 2)
    for m in range(3):
        share = (labels.flatten(1) == m).double().mean(0)
        error = (f[m] * (1 - f[m]) / 20_000).sqrt()
        assert bool(((share - f[m]).abs() < 5 * error).all())


def test_location_prior_is_a_smoothed_frequency_with_a_floor() -> None:
    labels = torch.randint(0, 3, (40, 8, 7))
    observed = torch.ones(40, 1, 8, 7, dtype=torch.bool)
    prior = location_prior(labels, observed, 4, blur=0.0, floor=1e-3)
    assert prior.shape == (4, 8, 7) and float(prior.min()) >= 1e-3 / 4 * 0.999
    torch.testing.assert_close(prior.sum(0), torch.ones(8, 7))
    counts = torch.stack([(labels == m).sum(0) for m in range(4)]) / 40
    assert float((prior - counts).abs().max()) < 0.03
    smooth = location_prior(labels, observed, 4, blur=1.0)
    assert float(smooth.diff(dim=1).abs().mean()) < 0.5 * float(prior.diff(dim=1).abs().mean())


@pytest.mark.parametrize("grid", [(5, 4), (3, 4, 5)])
def test_the_mean_over_all_lattices_is_the_whole_likelihood(grid: tuple[int, ...]) -> None:
    shape = ShapePrior(torch.rand(3, *grid).double().softmax(0), build_decoder("convolutional", 2, 3, grid).double(), 2)
    torch.nn.init.normal_(shape.decoder.to_scores.weight)
    labels, observed = torch.randint(3, (2, *grid)), torch.rand(2, 1, *grid) > 0.2
    z = torch.randn(2, 2, dtype=torch.float64)

    def log_prob(lattice: tuple[slice, ...] | None) -> torch.Tensor:
        trace = poutine.trace(poutine.condition(ShapeModel(shape), {"z": z})).get_trace(labels, observed, lattice)
        trace.compute_log_prob()
        return trace.nodes["labels"]["log_prob"]

    phases = itertools.product(*[(slice(0, None, 2), slice(1, None, 2)) for _ in grid])
    torch.testing.assert_close(torch.stack([log_prob(phase) for phase in phases]).mean(0), log_prob(None))


def test_location_prior_counts_observed_voxels_only() -> None:
    labels = torch.ones(10, 6, 5, dtype=torch.long)
    labels[:5] = 2
    observed = torch.ones(10, 1, 6, 5, dtype=torch.bool)
    observed[:5] = False
    prior = location_prior(labels, observed, 3, blur=0.0)
    assert float(prior[1].min()) > 0.9 and float(prior[2].max()) < 0.01


@pytest.mark.parametrize("shape", [(1, 1, 9, 8), (2, 3, 9, 8, 7), (1, 2, 9, 8, 1)])
def test_blur_keeps_constants_and_a_slice_is_2d(shape: tuple[int, ...]) -> None:
    constant = torch.full(shape, 2.5, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(constant, 1.5), constant)
    volume = torch.randn(shape, dtype=torch.float64)
    if shape[-1] == 1:
        assert torch.equal(gaussian_blur(volume, 1.5)[..., 0], gaussian_blur(volume[..., 0], 1.5))
    assert torch.equal(gaussian_blur(volume, 0.0), volume)


def test_blur_is_a_gaussian() -> None:
    from scipy.ndimage import gaussian_filter

    volume = torch.randn(12, 13, dtype=torch.float64)
    expected = gaussian_filter(volume.numpy(), 1.3, mode="nearest", radius=4)
    torch.testing.assert_close(
        gaussian_blur(volume[None, None], 1.3)[0, 0], torch.from_numpy(expected), rtol=1e-9, atol=1e-9
    )
