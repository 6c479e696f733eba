"""Objectives by name: forms and refusals, and gradients by every door that Pyro has."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from ppl_seg.inference.objectives import OBJECTIVES, build_objective
from tests.reference.problems import make_problem

BOUNDS = ["marginal", "trace", "enum", "jensen"]


def test_registry() -> None:
    assert set(OBJECTIVES) == {"marginal", "trace", "enum", "jensen", "iwae", "sleep"}
    with pytest.raises(ValueError, match="marginal"):
        build_objective("margnal")


WRONG = [(name, "collapsed" if name == "enum" else "enumerated") for name in OBJECTIVES]


@pytest.mark.parametrize(("name", "form"), WRONG, ids=[name for name, _ in WRONG])
def test_the_other_form_of_the_program_is_refused(name: str, form: str) -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match=r"form"):
        problem.loss(build_objective(name), form=form)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_differentiable_loss_and_loss_and_grads_agree(name: str) -> None:
    problem = make_problem()
    objective = build_objective(name)
    model, guide = problem.model(objective.form), problem.guide()
    values, gradients = [], []
    for door in ("loss", "differentiable_loss", "loss_and_grads"):
        pyro.set_rng_seed(0)
        guide = problem.guide()
        problem.raw.grad = None
        value = getattr(objective, door)(model, guide, *problem.arguments())
        if door == "differentiable_loss":
            value.backward()
        if door != "loss":
            gradients.append(problem.raw.grad)
        values.append(float(value.detach() if isinstance(value, Tensor) else value))
    assert values[0] == pytest.approx(values[1], rel=1e-12) and values[1] == pytest.approx(values[2], rel=1e-12)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_plain_svi_steps(name: str) -> None:
    problem = make_problem(draws=64)
    objective = build_objective(name)
    model, guide = problem.model(objective.form), problem.guide()
    before = problem.raw.detach().clone()
    theta = problem.theta().detach()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective)
    losses = [svi.step(problem.scan, problem.observed, theta) for _ in range(2)]
    assert all(isinstance(value, float) and math.isfinite(value) for value in losses)
    assert bool((problem.raw != before).all())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_as_a_module_of_model_and_guide(name: str) -> None:
    """`elbo(model, guide)`, Pyro's door for torch optimisers."""
    problem = make_problem(draws=64)
    objective = build_objective(name)
    module = objective(problem.model(objective.form), problem.guide())
    before = problem.raw.detach().clone()
    theta = problem.theta().detach()
    module(problem.scan, problem.observed, theta)
    assert any(p is problem.raw for p in module.parameters())
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    module(problem.scan, problem.observed, theta).backward()
    optimiser.step()
    assert bool((problem.raw != before).all())


@pytest.mark.parametrize("name", BOUNDS)
def test_one_forward_pass_a_step(name: str) -> None:
    """No objective runs model or guide a second time to guess plates: that would consume random numbers."""
    problem = make_problem(draws=2)
    problem.loss(build_objective(name))
    assert problem.script.next == 1
