"""The label factors f and r of the enumerated guide."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import nn

from ppl_seg.guides.label_factors import LabelFactorGuide
from tests.reference import likelihood as slow
from tests.reference.problems import Problem, make_problem


def factor_probs(problem: Problem, factor: str, **options: bool) -> torch.Tensor:
    """The guide's label probabilities at the first scripted draw, (B, M, J)."""
    guide = LabelFactorGuide(problem.guide(), problem.model("enumerated", 0.3), factor=factor, **options)
    site = poutine.trace(guide).get_trace(*problem.arguments()).nodes["labels"]
    assert site["infer"].get("enumerate") == "parallel"
    assert float(site["scale"]) == 0.3
    expected_mask = problem.observed_flat.any(1).T
    assert torch.equal(torch.as_tensor(site["mask"]).expand(expected_mask.shape), expected_mask)
    fn = site["fn"]
    probs = fn.probs if hasattr(fn, "probs") else fn.base_dist.probs
    return probs.permute(1, 2, 0)


@pytest.mark.parametrize("mask", ["none", "some", "channel"])
@pytest.mark.parametrize("maps", [False, True])
def test_factors_are_f_and_r(mask: str, maps: bool) -> None:
    problem = make_problem(mask=mask, maps=maps)
    log_f, ll = problem.log_f(problem.z()), problem.label_ll()
    f, r = factor_probs(problem, "prior"), factor_probs(problem, "posterior")
    torch.testing.assert_close(f, log_f.exp(), rtol=1e-12, atol=1e-14)
    # never tempered, and f where nothing is observed
    torch.testing.assert_close(r, slow.responsibilities(log_f, ll), rtol=1e-12, atol=1e-14)
    nobody = ~problem.observed_flat.any(1)
    torch.testing.assert_close(r.movedim(1, -1)[nobody], f.movedim(1, -1)[nobody], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factor", ["prior", "posterior"])
def test_detached_factors_have_no_gradient(factor: str) -> None:
    problem = make_problem()
    assert factor_probs(problem, factor).requires_grad
    assert not factor_probs(problem, factor, detach=True).requires_grad


def test_unknown_factor_is_refused() -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="posterior"):
        LabelFactorGuide(problem.guide(), problem.model("enumerated"), factor="half")  # type: ignore[arg-type]


class Says(nn.Module):
    """Label scores that do not depend on the scan."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, scan: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        return self.scores


def network_bound(problem: Problem, scores: torch.Tensor, beta: float) -> torch.Tensor:
    """The bound with q(s|x) = u, by Pyro."""
    model = problem.model("enumerated", beta)
    guide = LabelFactorGuide(problem.guide(), model, factor=Says(scores))
    with pyro.get_param_store().scope():
        return -TraceEnum_ELBO(max_plate_nesting=2).differentiable_loss(model, guide, *problem.arguments())


@pytest.mark.parametrize("mask", ["none", "some", "channel"])
@pytest.mark.parametrize("maps", [False, True])
def test_a_networks_factor_gives_a_bound_that_is_tight_at_r(mask: str, maps: bool) -> None:
    """E_q[β Σ o Σ u (log f + log p(x|m) − log u)] − KL, below the exact one by β Σ o KL(u ‖ r)."""
    problem, beta = make_problem(mask=mask, maps=maps), 0.3
    log_f, ll, seen = problem.log_f(problem.z()), problem.label_ll(), problem.observed_flat.any(1)
    location = problem.location_prior.log().flatten(1)
    grid = problem.grid
    scores = torch.randn(log_f.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_u = (scores + location).log_softmax(1)
    kl = problem.sampled_kl().sum()
    by_hand = beta * ((log_u.exp() * (log_f + ll - log_u)).sum(1) * seen).sum() - kl
    found = network_bound(problem, scores.unflatten(-1, grid), beta)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0.0)

    exact = beta * slow.exact(log_f, ll).sum() - kl
    log_r = slow.responsibilities(log_f, ll).log()
    gap = beta * ((log_u.exp() * (log_u - log_r)).sum(1) * seen).sum()
    assert bool(gap > 0.1)
    torch.testing.assert_close(exact - found, gap, rtol=1e-9, atol=0.0)
    tight = network_bound(problem, (log_r - location).unflatten(-1, grid).detach(), beta)
    torch.testing.assert_close(tight, exact, rtol=1e-12, atol=0.0)
