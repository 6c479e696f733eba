"""`infer` on a part of the voxels at a time ends where it ends on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from pyro import distributions as dist
from scipy.spatial import cKDTree

from ppl_seg.guides.families import build_family
from ppl_seg.inference import posterior
from ppl_seg.inference.objectives import OBJECTIVES, Marginal
from ppl_seg.inference.posterior import Posterior
from ppl_seg.inference.recipes import build_recipe
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.segmentation import SegmentationModel
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


class OfUsers(Marginal):
    """With the arguments of the program and no more."""

    def differentiable_loss(  # type: ignore[override]
        self, model: Any, guide: Any, scan: torch.Tensor, observed: torch.Tensor, theta: IntensityParameters
    ) -> torch.Tensor:
        loss: torch.Tensor = super().differentiable_loss(model, guide, scan, observed, theta)
        return loss


@pytest.mark.parametrize("grid", [(16, 12, 8), (10, 9, 13), (24, 20)])
@pytest.mark.parametrize("fewest", [4, 9])
def test_voxels_of_a_part_lie_far_from_each_other(grid: tuple[int, ...], fewest: int) -> None:
    places = torch.cartesian_prod(*[torch.arange(n) for n in grid]).double().numpy()

    def nearest(stride: int) -> float:
        some = places[::stride]
        return float(cKDTree(some).query(some, k=2)[0][:, 1].min())

    strides = range(fewest, fewest * 3 // 2 + 1)
    assert nearest(posterior.evenly(grid, fewest)) == max(map(nearest, strides))


def test_parts_hold_so_many_voxels_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(grid=GRID)
    words = (problem.model(), Marginal(), problem.observed)
    assert posterior.parts_of(*words) == 1
    monkeypatch.setattr(posterior, "LARGE_GRID", 0)
    assert posterior.parts_of(*words) == posterior.evenly(GRID, posterior.FEWEST_PARTS)
    monkeypatch.setattr(posterior, "LARGEST_PART", 20)
    seen = int(problem.observed.flatten(2).any(0).any(0).sum())
    assert -(-seen // 20) <= posterior.parts_of(*words) <= -(-seen // 20) * 3 // 2


def test_all_parts_together_have_the_whole_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all draws are the same, each voxel counts once; the parts alone differ."""
    problem = make_problem(grid=GRID, mask="channel")
    model, z = problem.model(beta=0.2), torch.randn(problem.num_scans, problem.latent_dim, dtype=torch.float64)
    found = Posterior(dist.Normal(z, 1e-12).to_event(1), problem.theta().detach())
    words = (model, "marginal", problem.scan, problem.observed)
    whole = found.bound(*words)
    monkeypatch.setattr(posterior, "LARGE_GRID", 0)
    assert found.bound(*words) == pytest.approx(whole, rel=1e-9)
    one_part = partial(model, part=slice(0, None, 8))
    monkeypatch.setattr(posterior, "_hearing", lambda *_: one_part)
    assert found.bound(*words) != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(("name", "in_parts"), [("mine:OfUsers", True), ("iwae", False)])
def test_who_hears_parts_of_the_voxels(
    name: str, in_parts: bool, registries: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any objective of the program's arguments, but one whose mean over parts is not the whole; EM ends with all."""
    OBJECTIVES["mine:OfUsers"] = OfUsers
    monkeypatch.setattr(posterior, "LARGE_GRID", 0)
    problem = make_problem(grid=GRID, draws=64)
    model, heard, updated = problem.model(), [], []
    forward, update = SegmentationModel.forward, posterior.update_theta

    def spied(self: SegmentationModel, *args: Any, part: slice | None = None) -> torch.Tensor:
        heard.append(None if part is None else part.start)
        return forward(self, *args, part=part)

    def spied_update(*args: Any) -> Any:
        updated.append(None if args[-1] is None else args[-1].start)
        return update(*args)

    monkeypatch.setattr(SegmentationModel, "forward", spied)
    monkeypatch.setattr(posterior, "update_theta", spied_update)
    family = build_family("mean-field", problem.latent_dim).double()
    raw = torch.zeros(problem.num_scans, family.num_parameters, dtype=torch.float64)
    recipe = build_recipe("default", objective=name)
    posterior.infer(model, family, raw, problem.scan, problem.observed, problem.theta().detach(), recipe, 8)
    parts = posterior.evenly(GRID, posterior.FEWEST_PARTS)
    assert heard == [step % parts if in_parts else None for step in range(8)]
    assert updated == ([0, 1, 2, None] if in_parts else [None] * 4)
    updated.clear()
    posterior.start_theta(model, problem.scan, problem.observed, replace(recipe, maps=None, em_iterations=3))
    assert updated == ([0, 1, None] if in_parts else [None] * 3)
