"""The identities of the model, at the same draw of z, with mask and likelihood power, value and gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from ppl_seg.guides.label_factors import LabelFactorGuide
from ppl_seg.inference.objectives import build_objective
from tests.reference import likelihood as slow
from tests.reference.problems import Problem, assert_same, make_problem

CASES = {
    f"beta {beta}, mask {mask}{', maps' if maps else ''}": (beta, {"mask": mask, "maps": maps})
    for beta, mask, maps in [
        (1.0, "none", False), (0.3, "some", False), (0.3, "channel", True), (2.5, "channel", False),
        (1.0, "all", False),
    ]
} | {"beta 0.3, outliers": (0.3, {"mask": "channel", "outliers": 0.05})}  # fmt: skip
cases = pytest.mark.parametrize(("beta", "options"), CASES.values(), ids=CASES)


def loss(elbo: Any, problem: Problem, beta: float, *, label_factor: str | None = None, detach: bool = False) -> Tensor:
    """The differentiable loss at the first scripted draw of z."""
    form = getattr(elbo, "form", "enumerated" if isinstance(elbo, TraceEnum_ELBO) else "collapsed")
    model = problem.model(form, beta)
    guide = problem.guide()
    if label_factor is not None:
        guide = LabelFactorGuide(guide, model, factor=label_factor, detach=detach)
    with pyro.get_param_store().scope():
        value: Tensor = elbo.differentiable_loss(model, guide, *problem.arguments())
    assert problem.script.next == 1, "exactly one draw of z"
    return value


def enumerate_labels() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=2)


@cases
def test_first_collapsed_is_labels_enumerated_in_the_model(beta: float, options: dict[str, Any]) -> None:
    problem = make_problem(**options)
    expected = loss(enumerate_labels(), problem, beta)
    assert_same(loss(Trace_ELBO(), problem, beta), expected, problem.leaves())


@cases
def test_second_jensen_is_the_guide_with_f(beta: float, options: dict[str, Any]) -> None:
    """Both without their KL: analytic there, sampled here."""
    problem = make_problem(**options)
    sampled = loss(enumerate_labels(), problem, beta, label_factor="prior")
    analytic = loss(build_objective("jensen"), problem, beta)
    if options["mask"] == "all":
        torch.testing.assert_close(sampled, problem.sampled_kl().sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(analytic, problem.analytic_kl().sum(), rtol=1e-12, atol=0)
        return
    assert_same(analytic - problem.analytic_kl().sum(), sampled - problem.sampled_kl().sum(), problem.leaves())


@cases
@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
def test_third_marginal_is_the_guide_with_r(beta: float, options: dict[str, Any], detach: bool) -> None:
    problem = make_problem(**options)
    sampled = loss(enumerate_labels(), problem, beta, label_factor="posterior", detach=detach)
    analytic = loss(build_objective("marginal"), problem, beta)
    if options["mask"] == "all":
        torch.testing.assert_close(sampled, problem.sampled_kl().sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(analytic, problem.analytic_kl().sum(), rtol=1e-12, atol=0)
        return
    assert_same(analytic - problem.analytic_kl().sum(), sampled - problem.sampled_kl().sum(), problem.leaves())


@cases
def test_trace_is_enum(beta: float, options: dict[str, Any]) -> None:
    problem = make_problem(**options)
    assert_same(
        loss(build_objective("trace"), problem, beta),
        loss(build_objective("enum"), problem, beta),
        problem.leaves(),
    )


@cases
def test_marginal_less_its_analytic_kl_is_enum_less_its_sampled_kl(beta: float, options: dict[str, Any]) -> None:
    problem = make_problem(**options)
    marginal = loss(build_objective("marginal"), problem, beta) - problem.analytic_kl().sum()
    enum = loss(build_objective("enum"), problem, beta) - problem.sampled_kl().sum()
    if options["mask"] == "all":
        torch.testing.assert_close(marginal, enum, rtol=0, atol=1e-12)
        return
    assert_same(marginal, enum, problem.leaves())


@cases
def test_every_objective_is_its_equation(beta: float, options: dict[str, Any]) -> None:
    """Against the equations written with loops, not against Pyro."""
    problem = make_problem(**options)
    for name, expected in problem.equations(beta).items():
        assert_same(loss(build_objective(name), problem, beta), expected, problem.leaves())


@cases
def test_marginal_less_jensen_is_the_kl_of_the_label_factors(beta: float, options: dict[str, Any]) -> None:
    problem = make_problem(**options)
    gap = loss(build_objective("jensen"), problem, beta) - loss(build_objective("marginal"), problem, beta)
    kl = beta * slow.kl_labels(problem.log_f(problem.z()), problem.label_ll()).sum()
    torch.testing.assert_close(gap, kl, rtol=1e-10, atol=1e-12)
    assert options["mask"] == "all" or float(gap.detach()) > 0


@pytest.mark.parametrize("mask", ["none", "channel"])
@pytest.mark.parametrize("maps", [False, True])
def test_brute_force_over_all_label_maps(mask: str, maps: bool) -> None:
    """3 voxels × 3 labels: the bounds of the four objectives from sums over all 27 label maps."""
    problem = make_problem(
        grid=(3, 1), class_of_label=(0, 1, 2), components=(2, 1, 2), mask=mask, maps=maps
    )  # fmt: skip
    log_f, ll = problem.log_f(problem.z()), problem.label_ll()
    exact = sum(slow.exact_by_enumeration(log_f[b], ll[b]) for b in range(2))
    jensen = sum(slow.jensen_by_enumeration(log_f[b], ll[b]) for b in range(2))
    kl, log_ratio = problem.analytic_kl().sum(), problem.sampled_kl().sum()
    expected = {
        "marginal": kl - exact,
        "trace": log_ratio - exact,
        "enum": log_ratio - exact,
        "jensen": kl - jensen,
    }
    for name, value in expected.items():
        assert_same(loss(build_objective(name), problem, 1.0), value, problem.leaves(), rtol=1e-10)
    for factor, bound in (("prior", jensen), ("posterior", exact)):
        value = loss(enumerate_labels(), problem, 1.0, label_factor=factor)
        assert_same(value, log_ratio - bound, problem.leaves(), rtol=1e-10)


def test_brute_force_of_the_label_factors() -> None:
    """E_q(s)[log p(s, x | z) − log q(s)] over all label maps: f gives jensen, r the exact value."""
    problem = make_problem(grid=(3, 1), class_of_label=(0, 1, 2), components=(1, 1, 1), mask="none", num_scans=1)
    log_f, ll = problem.log_f(problem.z())[0], problem.label_ll()[0]
    factors = {"prior": log_f, "posterior": slow.responsibilities(log_f, ll).log()}
    for name, log_q in factors.items():
        bound = torch.zeros((), dtype=torch.float64)
        for labels in itertools.product(range(3), repeat=3):
            pairs = list(enumerate(labels))
            log_joint = sum(log_f[m, j] + ll[m, j] for j, m in pairs)
            log_factor = sum(log_q[m, j] for j, m in pairs)
            bound = bound + log_factor.exp() * (log_joint - log_factor)
        value = loss(enumerate_labels(), problem, 1.0, label_factor=name)
        torch.testing.assert_close(value, problem.sampled_kl().sum() - bound, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["marginal", "trace", "enum", "jensen"])
def test_several_particles_are_the_mean_of_single_ones(name: str) -> None:
    problem = make_problem()
    form = build_objective(name).form
    problem.script.rewind()
    model, guide = problem.model(form, 0.7), problem.guide()
    singles = [build_objective(name).differentiable_loss(model, guide, *problem.arguments()) for _ in range(4)]
    problem.script.rewind()
    together = build_objective(name, num_particles=4).differentiable_loss(model, guide, *problem.arguments())
    assert_same(together, torch.stack(singles).mean(), problem.leaves(), rtol=1e-11)


@pytest.mark.parametrize("name", ["marginal", "trace", "enum", "jensen"])
def test_vectorised_particles_are_the_mean_of_single_ones(name: str) -> None:
    problem = make_problem(maps=True)
    objective = build_objective(name)
    nesting = problem.model(objective.form).max_plate_nesting
    model, guide = problem.model(objective.form, 0.7), problem.guide()
    singles = [objective.differentiable_loss(model, guide, *problem.arguments()) for _ in range(4)]
    problem.script.rewind()
    vectorised = build_objective(name, num_particles=4, vectorize_particles=True, max_plate_nesting=nesting)
    together = vectorised.differentiable_loss(model, guide, *problem.arguments())
    assert problem.script.next == 4
    assert_same(together, torch.stack(singles).mean(), problem.leaves(), rtol=1e-11)
