"""A label guide's factor beside p(x|m): what it multiplies, what it leaves alone, and the order of the bounds."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import Tensor

from ppl_seg.inference.expectation import label_responsibilities, update_theta
from ppl_seg.inference.objectives import build_objective
from ppl_seg.models.guided_intensity import (
    STRUCTURE_OUTSIDE,
    outside_log_factor,
    with_label_factor,
    with_log_factor,
)
from tests.reference import likelihood as slow
from tests.reference.problems import Problem, make_problem


def label_factor(problem: Problem) -> Tensor:
    """Some log u, (B, M, *grid)."""
    shape = (problem.num_scans, len(problem.class_of_label), *problem.grid)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).log_softmax(1)


def bound(problem: Problem, log_u: Tensor | None, beta: float) -> Tensor:
    """The marginal bound at the first scripted draw, with or without the factor."""
    model, data = problem.model(beta=beta), (problem.scan, problem.observed)
    if log_u is not None:
        model, data = with_label_factor(model), with_log_factor(*data, log_u)
    with pyro.get_param_store().scope():
        return -build_objective("marginal").differentiable_loss(model, problem.guide(), *data, problem.theta())


@pytest.mark.parametrize("mask", ["none", "some", "channel"])
@pytest.mark.parametrize("maps", [False, True])
def test_bounds_with_the_factor_are_below_the_exact_one(mask: str, maps: bool) -> None:
    problem, beta = make_problem(mask=mask, maps=maps), 0.3
    log_u, seen = label_factor(problem), problem.observed_flat.any(1)
    flat = torch.where(seen.unsqueeze(1), log_u.flatten(2), 0.0)
    log_f, ll, kl = problem.log_f(problem.z()), problem.label_ll(), problem.analytic_kl().sum()
    with_factor, exact = bound(problem, log_u, beta), bound(problem, None, beta)
    torch.testing.assert_close(with_factor, beta * slow.exact(log_f, ll + flat).sum() - kl, rtol=1e-12, atol=0.0)
    log_r = slow.responsibilities(log_f, ll).log()
    for t in (slow.responsibilities(log_f, ll + flat), ((log_r + flat) / 2).softmax(1)):  # the program's, the pool
        between = beta * ((t * (log_f + ll - t.log())).sum(1) * seen).sum() - kl
        assert bool(with_factor < between < exact)


def test_responsibilities_are_the_product_where_something_is_observed_and_f_elsewhere() -> None:
    problem = make_problem(mask="some", maps=True)
    log_u, seen = label_factor(problem), problem.observed_flat.any(1)
    model, theta, z = with_label_factor(problem.model()), problem.theta().detach(), problem.z()[None].detach()
    found = label_responsibilities(model, z, *with_log_factor(problem.scan, problem.observed, log_u), theta)
    log_f = problem.log_f(z[0])
    product = (log_f + problem.label_ll() + log_u.flatten(2)).softmax(1)
    wanted = torch.where(seen.unsqueeze(1), product, log_f.exp())
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_an_even_factor_changes_nothing_but_the_bound_by_a_constant(outliers: float) -> None:
    problem = make_problem(mask="channel", outliers=outliers)
    even = torch.zeros_like(label_factor(problem)).log_softmax(1)
    plain, data = problem.model(), (problem.scan, problem.observed)
    model, more = with_label_factor(problem.model()), with_log_factor(*data, even)
    theta, z = problem.theta().detach(), problem.z()[None].detach()
    mine, theirs = (update_theta(m, z, *d, theta)[0] for m, d in ((model, more), (plain, data)))
    for name in ("mean", "sd", "log_weight"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-11, atol=1e-13)
    constant = problem.observed_flat.any(1).sum() * even.flatten()[0]
    torch.testing.assert_close(bound(problem, even, 1.0), bound(problem, None, 1.0) + constant, rtol=1e-12, atol=0.0)


def test_what_a_mask_leaves_out_lies_around_the_brain() -> None:
    inside = torch.tensor([[[True, False, True]]])
    factor = outside_log_factor(inside, (0.2, 1.0, 0.4))
    expected = torch.tensor([0.8, STRUCTURE_OUTSIDE, 0.6]).log()
    assert factor.shape == (1, 3, 3)
    torch.testing.assert_close(factor[0, :, 1], expected)
    assert not factor[0, :, [0, 2]].any()


def test_a_factor_counts_where_it_is_said_to() -> None:
    problem = make_problem(mask="some")
    log_u, seen = label_factor(problem), problem.observed.any(1, keepdim=True)
    model, theta, z = with_label_factor(problem.model()), problem.theta().detach(), problem.z()[None].detach()
    everywhere = torch.ones_like(seen)
    found = label_responsibilities(model, z, *with_log_factor(problem.scan, problem.observed, log_u, everywhere), theta)
    log_f = problem.log_f(z[0])
    said = torch.where(seen.flatten(2), problem.label_ll(), 0.0) + log_u.flatten(2)
    torch.testing.assert_close(found, (log_f + said).softmax(1).detach(), rtol=1e-12, atol=1e-14)
