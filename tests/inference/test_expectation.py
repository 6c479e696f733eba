"""EM for θ: never lowers its bound, recovers what simulated the data, keeps maps away from one-hot."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ppl_seg.inference.expectation import (
    MapOptions,
    expectation_maximisation,
    expecting,
    initial_theta,
    label_responsibilities,
    localise,
    update_theta,
    weight_maps,
)
from ppl_seg.models.decoders import LocationDecoder
from ppl_seg.models.guided_intensity import with_label_factor, with_log_factor
from ppl_seg.models.intensity import IntensityModel, IntensityParameters, PseudoCounts
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import ShapePrior, gaussian_blur
from tests.reference import likelihood as slow
from tests.reference.problems import Problem, make_problem

PSEUDO = PseudoCounts(weight=0.5, mean_count=2.0, mean=0.3, sd_count=3.0, sd=0.5)
SHARE = PseudoCounts(sd=0.2, sd_share=0.7)
FACTORS = {"posterior": slow.exact, "prior": slow.jensen}


def draws(problem: Problem, count: int = 3) -> Tensor:
    return torch.stack([problem.z(d) for d in range(count)]).detach()


def bound(problem: Problem, theta: IntensityParameters, z: Tensor, factor: str) -> Tensor:
    """Mean over the draws of the exact (posterior) or Jensen (prior) log-likelihood, by loops, (B,)."""
    arguments = (problem.scan_flat, problem.observed_flat, theta, *problem.classes, problem.outliers)
    return FACTORS[factor](problem.log_f(z), slow.label_log_prob(*arguments)).mean(0)


@pytest.mark.parametrize("beta", [1.0, 0.2])
@pytest.mark.parametrize("pseudo", [None, PSEUDO, SHARE], ids=["no pseudo-counts", "pseudo-counts", "share"])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    "options", [{}, {"maps": True, "mask": "channel"}, {"outliers": 0.05}], ids=["plain", "maps", "outliers"]
)
def test_em_never_lowers_its_bound(options: dict, factor: str, pseudo: PseudoCounts | None, beta: float) -> None:
    """β × mean bound over fixed draws (+ log p(θ) with pseudo-counts), scan by scan, for 12 steps."""
    problem = make_problem(grid=(5, 4), **options)
    model, z, theta = problem.model(beta=beta), draws(problem), problem.theta().detach()
    counts = expecting(model, problem.observed, pseudo)
    with torch.no_grad():
        values = []
        for _ in range(13):
            value = beta * bound(problem, theta, z, factor)
            values.append(value if counts is None else value + problem.intensity().log_penalty(theta, counts))
            theta, _ = update_theta(model, z, problem.scan, problem.observed, theta, factor, pseudo)
    history = torch.stack(values)
    assert bool((history.diff(dim=0) >= -1e-9 * history[1:].abs()).all())
    assert bool((history[-1] > history[0] + 0.1 * beta).all())  # and it went somewhere


@pytest.mark.parametrize("guided", [False, True])
def test_a_share_counts_what_the_location_prior_expects_of_a_component(guided: bool) -> None:
    """β × share × Σ of p_loc over a class' labels and a scan's observed voxels, in equal parts to its components."""
    problem = make_problem(grid=(5, 4), mask="channel")
    model, observed = problem.model(beta=0.3), problem.observed
    if guided:  # what a mask says outside itself is no intensity
        everywhere = torch.ones_like(observed[:, :1])
        factor = torch.zeros_like(observed[:, :1], dtype=torch.float64).expand(-1, len(problem.class_of_label), -1, -1)
        _, observed = with_log_factor(problem.scan, observed, factor, everywhere)
        model = with_label_factor(model)
    found = expecting(model, observed, SHARE)
    location = model.shape_prior.log_location_prior.exp().flatten(1)
    assert found is not None and found.sd_share == 0 and found.sd == SHARE.sd
    components = [(n, k) for n, k in enumerate(problem.components) for _ in range(k)]
    for b in range(problem.num_scans):
        for q, (n, k) in enumerate(components):
            total = sum(
                float(location[m, j])
                for m, of in enumerate(problem.class_of_label)
                for j in range(location.shape[1])
                if of == n and bool(problem.observed_flat[b, :, j].any())
            )
            assert float(found.sd_count[b, q, 0]) == pytest.approx(0.3 * SHARE.sd_share * total / k, rel=1e-12)
    assert expecting(model, observed, None) is None and expecting(model, observed, PSEUDO) is PSEUDO


def test_with_a_share_a_class_leaves_what_lies_in_its_place() -> None:
    """Of the voxels where the prior says 1, two in five look like 2: Gaussians that are free learn them, too."""
    generator = torch.Generator().manual_seed(0)
    location = torch.full((3, 20, 20), 0.01, dtype=torch.float64)
    location[1, :, :10] = location[2, :, 10:] = 0.7
    location[2, :, :10] = location[1, :, 10:] = 0.29
    truth = torch.ones(20, 20, dtype=torch.long)
    truth[:, 6:] = 2
    scan = torch.tensor([0.0, 0.8, 0.2])[truth] + 0.05 * torch.randn(20, 20, generator=generator)
    scan, observed = scan.double()[None, None], torch.ones(1, 1, 20, 20, dtype=torch.bool)
    intensity = IntensityModel([0, 1, 2], [1, 2, 2])
    model = SegmentationModel(ShapePrior(location, LocationDecoder(1, 3, (20, 20)), 1), intensity)
    wrong = []
    for pseudo in (None, PseudoCounts(sd=0.06, sd_share=1.0)):
        theta = initial_theta(intensity, location, scan, observed)
        theta = expectation_maximisation(model, scan, observed, theta, None, 20, pseudo=pseudo)
        found = label_responsibilities(model, None, scan, observed, theta)[0].argmax(0).view(20, 20)
        wrong.append(int((found != truth).sum()))
    assert wrong[0] > 30 and wrong[1] < 10


@pytest.mark.parametrize("factor", FACTORS)
def test_responsibilities_are_averaged_over_draws(factor: str) -> None:
    problem = make_problem(mask="channel")
    z = draws(problem, 5)
    actual = label_responsibilities(
        problem.model(beta=0.1), z, problem.scan, problem.observed, problem.theta().detach(), factor
    )
    log_f, ll = problem.log_f(z), problem.label_ll()
    expected = (log_f.exp() if factor == "prior" else slow.responsibilities(log_f, ll)).mean(0)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-14)  # β does not temper them
    assert not actual.requires_grad


def test_one_step_is_the_m_step_at_the_old_theta() -> None:
    problem = make_problem(maps=True)
    model, z, theta = problem.model(), draws(problem), problem.theta().detach()
    flat = (problem.scan_flat, problem.observed_flat)
    labels = label_responsibilities(model, z, problem.scan, problem.observed, theta)
    resp = slow.component_responsibilities(labels, *flat, theta, problem.class_of_label, problem.components)
    expected = problem.intensity().m_step(resp, *flat, theta)
    new, statistics = update_theta(model, z, problem.scan, problem.observed, theta)
    for name in ("mean", "sd", "log_weight", "log_weight_maps"):
        torch.testing.assert_close(getattr(new, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
    seen = problem.observed_flat.any(1, keepdim=True)
    torch.testing.assert_close(statistics, (resp[:, :2] * seen).sum(0), rtol=1e-12, atol=1e-14)


def test_a_part_stands_for_all_observed_voxels() -> None:
    """As many times those voxels alone; without pseudo-counts the number falls out, with them it does not."""
    problem = make_problem(grid=(5, 4), mask="channel")
    z, theta = draws(problem), problem.theta().detach()
    for b in range(len(problem.scan)):
        one, here = slice(b, b + 1), slice(1, None, 3)
        seen = problem.observed[one]
        voxels = seen.flatten(2)[0].any(0).nonzero()[here, 0]
        mask = torch.zeros(seen[0, 0].numel(), dtype=torch.bool).index_fill_(0, voxels, True).view(seen[0, 0].shape)
        arguments = (z[:, one], problem.scan[one])
        found, _ = update_theta(problem.model(beta=0.2), *arguments, seen, theta, "posterior", PSEUDO, here)
        expected, _ = update_theta(problem.model(beta=0.6), *arguments, seen & mask, theta, "posterior", PSEUDO)
        for name in ("mean", "sd", "log_weight"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12)


# Simulated data.


def simulated(grid: tuple[int, ...], scans: int = 2) -> tuple[SegmentationModel, IntensityParameters, Tensor, Tensor]:
    """Three regions, soft borders, two channels; classes 1 and 2 overlap in each channel alone."""
    rows = torch.linspace(-3, 3, grid[0], dtype=torch.float64)[:, None].expand(grid)
    location_prior = torch.stack([-4 * rows, 0 * rows, 4 * rows]).softmax(0) * 0.94 + 0.02
    shape = ShapePrior(location_prior, LocationDecoder(2, 3, grid), 2)
    intensity = IntensityModel((0, 1, 2), (2, 1, 1), channels=2)
    mean = torch.tensor([[0.0, 0.1], [0.3, 0.9], [0.5, 0.5], [0.8, 0.6]], dtype=torch.float64).expand(scans, -1, -1)
    sd = torch.tensor([[0.05, 0.1], [0.05, 0.1], [0.08, 0.1], [0.1, 0.12]], dtype=torch.float64).expand(scans, -1, -1)
    weight = torch.tensor([0.3, 0.7, 1.0, 1.0], dtype=torch.float64).expand(scans, -1)
    theta = IntensityParameters(mean, sd, weight.log())
    model = SegmentationModel(shape, intensity)
    observed = torch.ones(scans, 1, *grid, dtype=torch.bool)
    observed[:, :, :, :3] = False
    with torch.no_grad():
        scan = model(None, observed, theta)
    return model, theta, scan, observed


def test_simulated_data_recover_their_parameters() -> None:
    """From p_loc's moments to the truth, within 5 standard errors of moments of half of a component's voxels.

    4620 voxels, about 1540 a class; 40 comparisons: failure rate over seeds well under 1e-3 (unknown labels
    cost some of the information, hence the half); fixed seed.
    """
    model, truth, scan, observed = simulated((60, 80))
    z = torch.zeros(1, 2, 2, dtype=torch.float64)
    start = initial_theta(model.intensity, model.shape_prior.log_location_prior.exp(), scan, observed)
    theta = expectation_maximisation(model, scan, observed, start, z, iterations=60)
    share = torch.tensor([0.3, 0.7, 1.0, 1.0], dtype=torch.float64)
    count = 0.5 * share * 60 * 77 / 3
    assert bool(((theta.mean - truth.mean).abs() < 5 * truth.sd / count.sqrt()[:, None]).all())
    assert bool(((theta.sd / truth.sd - 1).abs() < 5 / (2 * count[:, None]).sqrt()).all())
    error = (0.3 * 0.7 / (0.5 * 60 * 77 / 3)) ** 0.5
    assert bool(((theta.log_weight.exp() - share).abs() < 5 * error).all())


def test_initial_theta_is_ordered_and_of_the_observed_voxels() -> None:
    model, _, scan, observed = simulated((30, 40))
    location_prior = model.shape_prior.log_location_prior.exp()
    theta = initial_theta(model.intensity, location_prior, scan, observed)
    assert theta.mean.shape == theta.sd.shape == (2, 4, 2) and theta.log_weight.shape == (2, 4)
    assert bool((theta.mean[:, 1] > theta.mean[:, 0]).all()) and bool((theta.sd > 0).all())
    torch.testing.assert_close(theta.log_weight.exp()[:, :2].sum(1), torch.ones(2, dtype=torch.float64))
    other = torch.where(observed, scan, float("nan"))
    again = initial_theta(model.intensity, location_prior, other, observed)
    assert torch.equal(theta.mean, again.mean) and torch.equal(theta.sd, again.sd)
    for n, q in ((1, 2), (2, 3)):
        w = location_prior[n].flatten() * observed[0, 0].flatten()
        expected = (w * scan[0].flatten(1)).sum(-1) / w.sum()
        torch.testing.assert_close(theta.mean[0, q], expected, rtol=1e-10, atol=0)


# Background maps.


def test_maps_are_blurred_responsibilities_with_a_pseudo_count() -> None:
    generator = torch.Generator().manual_seed(0)
    statistics = torch.rand(2, 12 * 9, generator=generator, dtype=torch.float64) * 5
    options = MapOptions(blur=1.2, pseudo_count=0.4)
    maps = weight_maps(statistics, (12, 9), options).exp()
    torch.testing.assert_close(maps.sum(0), torch.ones(108, dtype=torch.float64))
    blurred = gaussian_blur(statistics.view(1, 2, 12, 9), 1.2).view(2, -1)
    share = statistics.mean(1) / statistics.mean(1).sum()
    raw = blurred + 0.4 * share[:, None]
    torch.testing.assert_close(maps, raw / raw.sum(0), rtol=1e-4, atol=1e-5)


def background_alone(
    grid: tuple[int, ...] = (24, 24),
) -> tuple[SegmentationModel, Tensor, Tensor, IntensityParameters]:
    """One scan, background almost everywhere, two overlapping components of equal weight at every voxel."""
    location_prior = torch.full((2, *grid), 0.02, dtype=torch.float64)
    location_prior[0] = 0.98
    model = SegmentationModel(
        ShapePrior(location_prior, LocationDecoder(2, 2, grid), 2), IntensityModel((0, 1), (2, 1))
    )
    mean = torch.tensor([[[0.35], [0.65], [3.0]]], dtype=torch.float64)
    sd = torch.full((1, 3, 1), 0.1, dtype=torch.float64)
    theta = IntensityParameters(mean, sd, torch.tensor([[0.5, 0.5, 1.0]], dtype=torch.float64).log())
    observed = torch.ones(1, 1, *grid, dtype=torch.bool)
    with torch.no_grad():
        scan = model(None, observed, theta)
    return model, scan, observed, theta


def test_maps_of_one_scan_do_not_collapse() -> None:
    model, scan, observed, theta = background_alone()
    z = torch.zeros(1, 1, 2, dtype=torch.float64)
    maps = {}
    for name, options in {"default": MapOptions(), "no blur": MapOptions(blur=0.0, pseudo_count=0.0)}.items():
        found = expectation_maximisation(model, scan, observed, theta, z, iterations=60, maps=options)
        assert found.log_weight_maps is not None
        maps[name] = found.log_weight_maps.exp()
    one_hot = {name: float((m.max(0).values > 0.99).double().mean()) for name, m in maps.items()}
    assert one_hot["no blur"] > 0.9  # what the blur is there for
    assert one_hot["default"] < 0.1
    assert bool((maps["default"].mean(1) > 0.3).all())


def test_maps_follow_the_place() -> None:
    """Left half dark, right half bright: the maps learn it, and the right component gets the right half."""
    model, _, observed, theta = background_alone()
    left = torch.arange(24)[None, :].expand(24, 24) < 12
    noise = 0.1 * torch.randn(1, 1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scan = torch.where(left, 0.35, 0.65) + noise
    z = torch.zeros(1, 1, 2, dtype=torch.float64)
    found = expectation_maximisation(model, scan, observed, theta, z, iterations=20, maps=MapOptions())
    assert found.log_weight_maps is not None
    dark = found.log_weight_maps[0].exp().view(24, 24)
    assert float(dark[:, :8].min()) > 0.8 and float(dark[:, 16:].max()) < 0.2


def test_unobserved_voxels_get_the_global_mean() -> None:
    model, scan, observed, theta = background_alone()
    observed[..., 12:] = False
    z = torch.zeros(1, 1, 2, dtype=torch.float64)
    found = expectation_maximisation(model, scan, observed, theta, z, iterations=5, maps=MapOptions(blur=1.0))
    assert found.log_weight_maps is not None
    maps = found.log_weight_maps.exp().view(2, 24, 24)
    far = maps[:, :, 20:].flatten(1)
    torch.testing.assert_close(far, far.mean(1, keepdim=True).expand_as(far), rtol=1e-4, atol=1e-4)


def test_em_is_deterministic_and_pure() -> None:
    problem = make_problem(maps=True)
    theta = problem.theta().detach()
    copies = [t.clone() for t in dataclasses.astuple(theta)]
    model, z = problem.model(), draws(problem)
    first, second = (
        expectation_maximisation(model, problem.scan, problem.observed, theta, z, iterations=3, maps=MapOptions())
        for _ in range(2)
    )
    for a, b in zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(t, c) for t, c in zip(dataclasses.astuple(theta), copies, strict=True))


# Weights of one scan that depend on the place.


def structure_with_two_components() -> tuple[SegmentationModel, Tensor, Tensor, IntensityParameters]:
    """One structure nearly everywhere, dark on the left and bright on the right, which the background is as well."""
    grid = (24, 24)
    location_prior = torch.full((2, *grid), 0.9, dtype=torch.float64)
    location_prior[0] = 0.1
    model = SegmentationModel(
        ShapePrior(location_prior, LocationDecoder(2, 2, grid), 2), IntensityModel((0, 1), (1, 2))
    )
    mean = torch.tensor([[[0.65], [0.35], [0.65]]], dtype=torch.float64)
    sd = torch.full((1, 3, 1), 0.1, dtype=torch.float64)
    theta = IntensityParameters(mean, sd, torch.tensor([[1.0, 0.5, 0.5]], dtype=torch.float64).log())
    left = torch.arange(24)[None, :].expand(24, 24) < 12
    noise = 0.1 * torch.randn(1, 1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return model, torch.where(left, 0.35, 0.65) + noise, torch.ones(1, 1, *grid, dtype=torch.bool), theta


def test_local_weights_follow_the_place_and_leave_brightness_out_of_it() -> None:
    model, scan, observed, theta = structure_with_two_components()
    z = torch.zeros(2, 1, 2, dtype=torch.float64)
    found = localise(model, z, scan, observed, theta, [1], MapOptions())
    assert found.log_weight_maps is not None and found.log_weight_maps.shape == (3, 576)
    weights = found.log_weight_maps.exp().view(3, 24, 24)
    torch.testing.assert_close(weights[1] + weights[2], torch.ones(24, 24, dtype=torch.float64))
    assert float(weights[1, :, :8].min()) > 0.75 and float(weights[1, :, 16:].max()) < 0.25
    for name in ("mean", "sd", "log_weight"):
        assert torch.equal(getattr(found, name), getattr(theta, name))
    before, after = (label_responsibilities(model, z, scan, observed, t)[0, 0].view(24, 24) for t in (theta, found))
    # where the structure is as bright as the background, half a weight had counted against it
    assert float(after[:, 16:].mean()) < 0.7 * float(before[:, 16:].mean())


def test_a_step_of_local_weights_is_blurred_responsibilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the classes that are named, at the old θ; other weights stay; what is not observed counts for nothing."""
    monkeypatch.setattr("ppl_seg.inference.expectation.LOCALISING_STEPS", 1)
    options = MapOptions(blur=0.8, pseudo_count=0.2)
    for maps in (False, True):
        problem = make_problem(num_scans=1, grid=(5, 4), class_of_label=(0, 1, 2), components=(2, 2, 2), maps=maps)
        model, z, theta = problem.model(), draws(problem), problem.theta().detach()
        found = localise(model, z, problem.scan, problem.observed, theta, [1], options, power=0.5).log_weight_maps
        labels = label_responsibilities(model, z, problem.scan, problem.observed, theta, power=0.5)
        flat = (problem.scan_flat, problem.observed_flat)
        of = slow.component_responsibilities(labels, *flat, theta, problem.class_of_label, problem.components)[0]
        of = of * problem.observed_flat[0].any(0)
        assert found is not None and found.shape == (6, 20)
        constant = theta.log_weight[0, :2, None].expand(-1, 20)
        torch.testing.assert_close(found[:2], constant if theta.log_weight_maps is None else theta.log_weight_maps)
        torch.testing.assert_close(found[2:4], weight_maps(of[2:4], (5, 4), options), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[4:], theta.log_weight[0, 4:, None].expand(-1, 20))
