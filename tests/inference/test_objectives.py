"""Objectives by name: forms and refusals, and gradients by every door that Pyro has."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI
from torch import Tensor

from ppl_seg.guides.families import Family, kl_to_prior
from ppl_seg.guides.per_scan import PerScanGuide
from ppl_seg.inference.objectives import OBJECTIVES, Jensen, Marginal, build_objective
from ppl_seg.inference.posterior import factor_of
from tests.reference.problems import Problem, make_problem

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


class Curved(Family):
    """q(z) of a transformed normal: torch knows no KL of it."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.num_parameters = latent_dim, 2 * latent_dim

    def forward(self, raw: Tensor) -> dist.Distribution:
        loc, scale = raw.split(self.latent_dim, -1)
        normal = dist.Normal(loc, torch.nn.functional.softplus(scale))
        return dist.TransformedDistribution(normal, [dist.transforms.AffineTransform(0.5, 2.0)]).to_event(1)


def curved_guide(problem: Problem) -> PerScanGuide:
    family = Curved(problem.latent_dim)
    raw = 0.3 * torch.randn(problem.num_scans, family.num_parameters, dtype=torch.float64)
    return PerScanGuide(family, raw)


@pytest.mark.parametrize("name", ["marginal", "jensen"])
def test_an_analytic_kl_that_nobody_knows_is_refused(name: str) -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match=r"needs KL\(q ‖ p\) in closed form.*use the objective trace"):
        build_objective(name).loss(problem.model(), curved_guide(problem), *problem.arguments())


def test_trace_and_the_reported_kl_do_without() -> None:
    """Twice a normal and a half: the KL by draws is that of the normal it is, within 5 standard errors (1e-6)."""
    problem = make_problem()
    guide = curved_guide(problem)
    assert math.isfinite(build_objective("trace").loss(problem.model(), guide, *problem.arguments()))
    q = guide.posterior()
    loc, scale = guide.raw.detach().split(problem.latent_dim, -1)
    normal = dist.Normal(0.5 + 2 * loc, 2 * torch.nn.functional.softplus(scale)).to_event(1)
    prior = dist.Normal(torch.zeros(problem.latent_dim).double(), 1.0).to_event(1)
    found = torch.stack([kl_to_prior(q, prior).detach() for _ in range(100)])
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - kl_to_prior(normal, prior)).abs() < 5 * error).all())


def test_the_factor_that_an_objective_learns_theta_from(registries: Callable[[], None]) -> None:
    """One of a user's says it, or inherits it."""
    OBJECTIVES["mine:Likewise"] = type("Likewise", (Jensen,), {})
    OBJECTIVES["mine:Own"] = type("Own", (Marginal,), {"factor": "prior"})
    names = ["marginal", "trace", "enum", "jensen", "iwae", "mine:Likewise", "mine:Own"]
    expected = ["posterior", "posterior", "posterior", "prior", "posterior", "prior", "prior"]
    assert [factor_of(name) for name in names] == expected
