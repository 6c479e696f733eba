"""`infer` on a part of the voxels at a time ends where it ends on all of them."""

from __future__ import annotations

import pytest
import torch

from ppl_seg.guides.families import build_family
from ppl_seg.inference import posterior
from ppl_seg.inference.recipes import build_recipe
from tests.reference.problems import make_problem

GRID = (24, 20)


def inferred(large: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[float, torch.Tensor]:
    """Bound per scan by 200 draws, and mean of q(z), after 60 steps from z = 0."""
    monkeypatch.setattr(posterior, "LARGE_GRID", 0 if large else 10**9)
    torch.manual_seed(0)
    problem = make_problem(grid=GRID)
    recipe = build_recipe("default", intensity="shared")  # θ stays: so few voxels a part would not do for it
    model = problem.model(beta=0.2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    family = build_family("mean-field", problem.latent_dim).double()
    raw = torch.zeros(problem.num_scans, family.num_parameters, dtype=torch.float64)
    theta = problem.theta().detach()
    found = posterior.infer(model, family, raw, problem.scan, problem.observed, theta, recipe, 60)
    return found.bound(model, "marginal", problem.scan, problem.observed, 200), found.q.mean


def test_parts_of_the_voxels_end_where_all_of_them_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a nat of 400, and z to less than its sd."""
    bound, mean = inferred(False, monkeypatch)
    in_parts, near = inferred(True, monkeypatch)
    assert in_parts != bound
    assert in_parts == pytest.approx(bound, abs=0.1)
    torch.testing.assert_close(near, mean, atol=0.2, rtol=0)
