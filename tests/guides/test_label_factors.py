"""The label factors f and r of the enumerated guide."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

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
