"""What must not matter: intensity units, unobserved content, batching, a third axis of length one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_seg.inference.expectation import (
    MapOptions,
    expectation_maximisation,
    initial_theta,
    label_responsibilities,
)
from ppl_seg.inference.objectives import OBJECTIVES, build_objective
from ppl_seg.models.normalisation import normalise
from tests.reference.problems import Problem, grads, make_problem

SAME_DRAW = [name for name in OBJECTIVES if name != "sleep"]  # sleep draws its own scans
NO_SCAN = {"mean", "log_sd", "weight_scores", "raw"}


def build(name: str) -> object:
    return build_objective(name, **({"num_particles": 4} if name == "iwae" else {}))


# a·x + b


def segment(problem: Problem, scan: Tensor) -> Tensor:
    """Normalise, EM from p_loc, then with maps, argmax of the label marginals: what a user sees."""
    model = problem.model()
    scan = normalise(scan, problem.observed)
    z = torch.stack([problem.z(d) for d in range(3)]).detach()
    theta = initial_theta(model.intensity, problem.location_prior, scan, problem.observed)
    for maps in (None, MapOptions()):
        theta = expectation_maximisation(model, scan, problem.observed, theta, z, iterations=10, maps=maps)
    return label_responsibilities(model, z, scan, problem.observed, theta).argmax(1)


@pytest.mark.parametrize(("a", "b"), [(2.0, 0.0), (1.0, 1000.0), (3.7e-3, -11.0), (812.5, 3e4)])
def test_intensity_units_do_not_matter(a: float, b: float) -> None:
    problem = make_problem(grid=(16, 12), components=(2, 2), class_of_label=(0, 1, 1))
    expected = segment(problem, problem.scan)
    assert len(expected.unique()) == 3
    assert torch.equal(segment(problem, a * problem.scan + b), expected)


# Unobserved content


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e30, -7.0])
@pytest.mark.parametrize("mask", ["some", "channel"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_unobserved_content_changes_no_value_and_no_gradient(name: str, mask: str, content: float) -> None:
    problem = make_problem(mask=mask, maps=True)
    original = problem.scan
    results = []
    for scan in (original, torch.where(problem.observed, original, content)):
        problem.scan = scan
        torch.manual_seed(3)
        value = problem.loss(build(name), 0.7)
        results.append((value, grads(value, problem.leaves())))
    assert torch.equal(results[0][0], results[1][0])
    for leaf, gradient in results[0][1].items():
        assert bool(gradient.isfinite().all()) and torch.equal(gradient, results[1][1][leaf]), leaf


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("mask", ["some", "channel"])
@pytest.mark.parametrize("factor", ["posterior", "prior"])
def test_unobserved_content_changes_no_em(factor: str, mask: str, content: float) -> None:
    problem = make_problem(mask=mask, maps=True)
    other = torch.where(problem.observed, problem.scan, content)
    z = torch.stack([problem.z(d) for d in range(3)]).detach()
    theta, same = (
        expectation_maximisation(
            problem.model(), scan, problem.observed, problem.theta().detach(), z, 4, factor, maps=MapOptions()
        )
        for scan in (problem.scan, other)
    )
    for name in ("mean", "sd", "log_weight", "log_weight_maps"):
        assert torch.equal(getattr(theta, name), getattr(same, name))
        assert bool(getattr(theta, name).isfinite().all())


# Batches


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", SAME_DRAW)
def test_a_batch_is_the_sum_of_its_scans(name: str, maps: bool, beta: float) -> None:
    problem = make_problem(num_scans=3, maps=maps, mask="channel")
    together = problem.loss(build(name), beta)
    singles = [problem.select(b) for b in range(3)]
    apart = [one.loss(build(name), beta) for one in singles]
    torch.testing.assert_close(together, torch.stack(apart).sum(), rtol=1e-12, atol=0)
    batched = grads(together, problem.leaves())
    alone = [grads(value, one.leaves()) for value, one in zip(apart, singles, strict=True)]
    for leaf, gradient in batched.items():
        parts = [g[leaf] for g in alone]
        expected = torch.cat(parts) if leaf in NO_SCAN else torch.stack(parts).sum(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", ["posterior", "prior"])
def test_em_of_a_batch_is_em_of_its_scans(factor: str) -> None:
    problem = make_problem(num_scans=3, maps=True, mask="channel", grid=(5, 4))
    z = torch.stack([problem.z(d) for d in range(3)]).detach()
    theta = problem.theta().detach()
    together = expectation_maximisation(problem.model(), problem.scan, problem.observed, theta, z, 5, factor)
    for b in range(3):
        one = problem.select(b)
        alone = expectation_maximisation(
            one.model(), one.scan, one.observed, one.theta().detach(), z[:, b : b + 1], 5, factor
        )
        for name in ("mean", "sd", "log_weight"):
            torch.testing.assert_close(getattr(together, name)[b : b + 1], getattr(alone, name), rtol=1e-9, atol=1e-11)


# Two and three dimensions


def as_3d(options: dict) -> tuple[Problem, Problem]:
    """The same numbers on a grid and on that grid with a third axis of length 1."""
    flat, deep = make_problem(grid=(6, 5), **options), make_problem(grid=(6, 5, 1), **options)
    assert torch.equal(flat.scan, deep.scan[..., 0]) and torch.equal(flat.decoder.weight, deep.decoder.weight)
    return flat, deep


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", SAME_DRAW)
def test_one_slice_is_two_dimensional_for_objectives(name: str, maps: bool) -> None:
    flat, deep = as_3d({"maps": maps, "mask": "channel"})
    a, b = flat.loss(build(name), 0.4), deep.loss(build(name), 0.4)
    assert torch.equal(a, b)
    for (leaf, x), y in zip(grads(a, flat.leaves()).items(), grads(b, deep.leaves()).values(), strict=True):
        assert torch.equal(x, y), leaf


def test_one_slice_is_two_dimensional_for_normalisation_and_em() -> None:
    flat, deep = as_3d({"maps": False, "mask": "some"})
    thetas = []
    for problem in (flat, deep):
        scan = normalise(problem.scan, problem.observed)
        z = torch.stack([problem.z(d) for d in range(3)]).detach()
        model = problem.model()
        theta = initial_theta(model.intensity, problem.location_prior, scan, problem.observed)
        thetas.append(
            expectation_maximisation(model, scan, problem.observed, theta, z, iterations=8, maps=MapOptions(blur=1.5))
        )
    for name in ("mean", "sd", "log_weight", "log_weight_maps"):
        assert torch.equal(getattr(thetas[0], name), getattr(thetas[1], name)), name
