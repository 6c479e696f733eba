"""Densities against loops, the M-step against scikit-learn and against what it must maximise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_seg.models.intensity import IntensityModel, IntensityParameters, PseudoCounts
from ppl_seg.models.intensity_prior import IntensityPrior, SharedIntensity
from tests.reference import likelihood as slow
from tests.reference.moments import sklearn_moments
from tests.reference.problems import Problem, make_problem

PROBLEMS = {
    "shared class": {},
    "maps": {"maps": True},
    "maps of all classes": {"maps": "all"},
    "channel mask": {"mask": "channel", "grid": (6, 5)},
    "three classes, 3-D": {
        "class_of_label": (0, 2, 1, 2),
        "components": (3, 1, 2),
        "channels": 1,
        "grid": (4, 3, 2),
    },
    "all observed": {"mask": "none"},
    "outliers": {"outliers": 0.1, "mask": "channel"},
}
each_problem = pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)


def flat(problem: Problem) -> tuple[Tensor, Tensor, IntensityParameters]:
    return problem.scan_flat, problem.observed_flat, problem.theta().detach()


def label_responsibilities(problem: Problem) -> Tensor:
    with torch.no_grad():
        return slow.responsibilities(problem.log_f(problem.z()), problem.label_ll())


@each_problem
def test_densities_are_those_of_the_loops(options: dict) -> None:
    problem = make_problem(**options)
    scan, observed, theta = flat(problem)
    intensity = problem.intensity()
    B, C, J = scan.shape
    joint = intensity.component_log_joint(scan, observed, theta)
    assert joint.shape == (B, sum(problem.components), J)
    for b in range(B):
        for q in range(joint.shape[1]):
            for j in range(J):
                expected = slow.component_log_joint(scan, observed, theta, b, q, j)
                torch.testing.assert_close(joint[b, q, j], expected, rtol=1e-12, atol=1e-13)
    ll = intensity.label_log_prob(scan, observed, theta)
    torch.testing.assert_close(ll, problem.label_ll().detach(), rtol=1e-12, atol=1e-13)
    of_class = intensity.class_log_prob(scan, observed, theta)
    for m, n in enumerate(problem.class_of_label):
        assert torch.equal(of_class[:, n], ll[:, m])


@each_problem
def test_component_responsibilities_are_those_of_the_loops(options: dict) -> None:
    problem = make_problem(**options)
    labels = label_responsibilities(problem)
    actual = problem.intensity().component_responsibilities(labels, *flat(problem))
    arguments = (labels, *flat(problem), *problem.classes, problem.outliers)
    torch.testing.assert_close(actual, slow.component_responsibilities(*arguments), rtol=1e-12, atol=1e-14)
    if not problem.outliers:
        torch.testing.assert_close(actual.sum(1), torch.ones_like(actual[:, 0]), rtol=1e-12, atol=0)


@each_problem
def test_m_step_without_pseudo_counts_is_scikit_learns(options: dict) -> None:
    problem = make_problem(**options)
    scan, observed, theta = flat(problem)
    intensity = problem.intensity()
    resp = intensity.component_responsibilities(label_responsibilities(problem), scan, observed, theta)
    new = intensity.m_step(resp, scan, observed, theta)
    mean, sd, weight = (torch.from_numpy(a) for a in sklearn_moments(resp, scan, observed, problem.components))
    # scikit-learn adds 10 eps to each count, and takes E[x²] − E[x]² in places: 1e-9, not 1e-15
    torch.testing.assert_close(new.mean, mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(new.sd, sd, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(new.log_weight.exp(), weight, rtol=1e-9, atol=1e-11)


def test_m_step_is_pure() -> None:
    problem = make_problem(maps=True)
    scan, observed, theta = flat(problem)
    resp = problem.intensity().component_responsibilities(label_responsibilities(problem), scan, observed, theta)
    inputs = (resp, scan, observed, theta.mean, theta.sd, theta.log_weight, theta.log_weight_maps)
    copies = [t.clone() for t in inputs]
    first, second = (problem.intensity().m_step(resp, scan, observed, theta) for _ in range(2))
    assert all(torch.equal(t, c) for t, c in zip(inputs, copies, strict=True))
    assert torch.equal(first.mean, second.mean) and torch.equal(first.sd, second.sd)
    assert torch.equal(first.log_weight_maps, theta.log_weight_maps)


PSEUDO = PseudoCounts(weight=0.7, mean_count=1.5, mean=0.2, sd_count=2.5, sd=0.4)


def expected_complete_log_prob(problem: Problem, resp: Tensor, theta: IntensityParameters) -> Tensor:
    """Σ_j o_j Σ_q r_qj log(w_q N(x_j; μ_q, σ²_q)), (B,); the quantity that an M-step raises."""
    total = []
    for b in range(problem.num_scans):
        terms = [
            resp[b, q, j] * slow.component_log_joint(problem.scan_flat, problem.observed_flat, theta, b, q, j)
            for q in range(resp.shape[1])
            for j in range(resp.shape[2])
            if bool(problem.observed_flat[b, :, j].any())
        ]
        total.append(torch.stack(terms).sum())
    return torch.stack(total)


@pytest.mark.parametrize("power", [1.0, 0.3])
@pytest.mark.parametrize("pseudo", [PseudoCounts(), PSEUDO], ids=["no pseudo-counts", "pseudo-counts"])
@pytest.mark.parametrize("maps", [False, True])
def test_m_step_is_where_the_gradient_vanishes(maps: bool, pseudo: PseudoCounts, power: float) -> None:
    """power × expected complete log-likelihood + log p(θ) is stationary and below at every neighbour."""
    problem = make_problem(maps=maps, mask="channel", grid=(5, 4))
    scan, observed, theta = flat(problem)
    intensity = problem.intensity()
    resp = intensity.component_responsibilities(label_responsibilities(problem), scan, observed, theta)
    new = intensity.m_step(resp, scan, observed, theta, pseudo, power)
    log_sd = new.sd.log().requires_grad_()
    mean, weight = new.mean.clone().requires_grad_(), new.log_weight.clone().requires_grad_()

    def objective(mean: Tensor, log_sd: Tensor, weight: Tensor) -> Tensor:
        log_weight = torch.cat([w.log_softmax(-1) for w in weight.split(problem.components, -1)], -1)
        at = IntensityParameters(mean, log_sd.exp(), log_weight, theta.log_weight_maps)
        return power * expected_complete_log_prob(problem, resp, at) + intensity.log_penalty(at, pseudo)

    best = objective(mean, log_sd, weight)
    assert best.shape == (2,)
    for gradient in torch.autograd.grad(best.sum(), (mean, log_sd, weight)):
        assert float(gradient.abs().max()) < 1e-9
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(10):
            moved = (
                t + 0.05 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (mean, log_sd, weight)
            )
            assert bool((objective(*moved) < best).all())


def test_penalty_is_the_conjugate_density() -> None:
    """Up to a constant: Σ weight · log w − Σ [mean_count/2 (μ−m)²/σ² + sd_count/2 (log σ² + sd²/σ²)]."""
    problem = make_problem()
    theta = problem.theta().detach()
    expected = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for q in range(4):
            expected[b] += PSEUDO.weight * theta.log_weight[b, q]
            for c in range(2):
                mu, var = theta.mean[b, q, c], theta.sd[b, q, c] ** 2
                expected[b] -= PSEUDO.mean_count / 2 * (mu - PSEUDO.mean) ** 2 / var
                expected[b] -= PSEUDO.sd_count / 2 * (var.log() + PSEUDO.sd**2 / var)
    torch.testing.assert_close(problem.intensity().log_penalty(theta, PSEUDO), expected, rtol=1e-12, atol=0)


def test_a_component_that_nothing_belongs_to_stays_finite() -> None:
    problem = make_problem(mask="none")
    scan, observed, theta = flat(problem)
    resp = problem.intensity().component_responsibilities(label_responsibilities(problem), scan, observed, theta)
    resp[:, 2:] = 0  # a whole class without voxels
    resp[:, 1] = 0  # and one component of the other
    new = problem.intensity().m_step(resp, scan, observed, theta)
    for tensor in (new.mean, new.sd, new.log_weight):
        assert bool(tensor.isfinite().all())
    weight = torch.stack([w.exp().sum(-1) for w in new.log_weight.split(problem.components, -1)], -1)
    torch.testing.assert_close(weight, torch.ones_like(weight))
    ll = problem.intensity().label_log_prob(scan, observed, new)
    assert bool(ll.isfinite().all())


@each_problem
def test_m_step_does_not_read_unobserved_voxels(options: dict) -> None:
    problem = make_problem(**options)
    scan, observed, theta = flat(problem)
    intensity = problem.intensity()
    resp = intensity.component_responsibilities(label_responsibilities(problem), scan, observed, theta)
    other = torch.where(observed, scan, 1e6)
    nobody = ~observed.any(1, keepdim=True)
    other_resp = torch.where(nobody, torch.full_like(resp, 0.9), resp)
    new, same = (
        intensity.m_step(resp, scan, observed, theta),
        intensity.m_step(other_resp, other, observed, theta),
    )
    for a, b in ((new.mean, same.mean), (new.sd, same.sd), (new.log_weight, same.log_weight)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_bad_classes_are_refused() -> None:
    for classes, components in (((1, 0), (1, 1)), ((0, 2), (1, 1, 1)), ((0, 1), (1, 0)), ((0, 1), (1, 1, 1))):
        with pytest.raises(ValueError):
            IntensityModel(classes, components)


def test_intensity_prior() -> None:
    intensity = IntensityModel((0, 1, 2, 1), (3, 1, 2), channels=2)
    prior = IntensityPrior(intensity)
    draws = [prior.sample(500, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    theta = draws[0]
    assert theta.mean.shape == theta.sd.shape == (500, 6, 2) and theta.log_weight.shape == (500, 6)
    assert torch.equal(draws[0].mean, draws[1].mean) and not torch.equal(draws[0].mean, draws[2].mean)
    assert bool((theta.sd > 0).all()) and theta.log_weight_maps is None
    for weight in theta.log_weight.split((3, 1, 2), -1):
        torch.testing.assert_close(weight.exp().sum(-1), torch.ones(500))
    # any contrast: each of two classes is the brighter one in a good part of the draws
    brighter = (theta.mean[:, 3, 0] > theta.mean[:, 4, 0]).float().mean()
    assert 0.3 < float(brighter) < 0.7


def test_shared_intensity_starts_where_it_is_told_and_takes_gradients() -> None:
    problem = make_problem()
    shared = SharedIntensity(problem.intensity(), problem.theta().detach())
    theta = shared()
    for name in ("mean", "sd", "log_weight"):
        torch.testing.assert_close(getattr(theta, name), getattr(problem.theta(), name)[:1].detach())
    ll = problem.intensity().label_log_prob(problem.scan_flat, problem.observed_flat, theta)
    ll.exp().sum().backward()
    assert len(list(shared.parameters())) == 3
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, dtype=parameter.dtype))
    moved = shared()
    for weight in moved.log_weight.split(problem.components, -1):
        torch.testing.assert_close(weight.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert bool((moved.sd > 0).all()) and moved.mean.shape[0] == 1
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in shared.parameters())


def test_weights_of_half_a_million_voxels_do_not_drown_in_float32() -> None:
    """Sums over a real grid in float32 against float64: 1e-4 of the sd."""
    generator = torch.Generator().manual_seed(0)
    scan = torch.randn(1, 1, 500_000, generator=generator) * 0.01 + 1.0
    intensity = IntensityModel((0,), (1,))
    start = IntensityParameters(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1))
    new = intensity.m_step(torch.ones(1, 1, 500_000), scan, torch.ones_like(scan, dtype=torch.bool), start)
    assert float(new.mean) == pytest.approx(float(scan.double().mean()), rel=1e-5)
    assert float(new.sd) == pytest.approx(float(scan.double().std()), rel=1e-3)
    assert math.isclose(float(new.log_weight), 0.0, abs_tol=1e-6)


def test_what_lies_around_a_brain_is_seldom_observed_behind_a_mask() -> None:
    problem = make_problem(mask="some")
    scan, observed, theta = flat(problem)
    plain = problem.intensity()
    classes = plain.class_of_label.tolist()
    rates = [0.2, 0.4, *[1.0] * (len(classes) - 2)]
    behind = IntensityModel(classes, plain.components, plain.channels, rates)
    difference = behind.label_log_prob(scan, observed, theta) - plain.label_log_prob(scan, observed, theta)
    expected = torch.where(observed.any(1)[:, None], torch.tensor(rates, dtype=scan.dtype).log()[:, None], 0.0)
    torch.testing.assert_close(difference, expected)
    with pytest.raises(ValueError, match="observed_rates"):
        IntensityModel(classes, plain.components, plain.channels, rates[:-1])


def test_an_outlier_says_nothing_of_its_label_and_nothing_to_theta() -> None:
    problem = make_problem(mask="none", outliers=0.01)
    scan, observed, theta = flat(problem)
    labels, far = label_responsibilities(problem), scan + 100.0
    intensity = problem.intensity()
    ll = intensity.label_log_prob(far, observed, theta)
    torch.testing.assert_close(ll, torch.full_like(ll, math.log(0.01 / 4)))  # of two channels, each from -0.5 to 1.5
    assert float(intensity.component_responsibilities(labels, far, observed, theta).max()) < 1e-12
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="outliers"):
            IntensityModel(*problem.classes, outliers=share)
    nowhere = torch.zeros_like(observed)  # nothing is said there with outliers or without
    torch.testing.assert_close(intensity.label_log_prob(scan, nowhere, theta), torch.zeros_like(ll))
