"""Sleep: −log q(z|x) of scans that the program simulates."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from ppl_seg.guides.per_scan import PerScanGuide
from ppl_seg.inference.objectives import build_objective
from ppl_seg.models.segmentation import SegmentationModel
from tests.reference.problems import Problem, make_problem


def sleep_problem() -> tuple[Problem, SegmentationModel, PerScanGuide]:
    problem = make_problem(mask="channel")
    return problem, problem.model(), problem.guide("mean-field")


def test_sleep_is_minus_log_q_of_the_simulated_z() -> None:
    """A guide that ignores the scan: on average the cross-entropy E_p(z)[−log q(z)], which has a closed form.

    400 simulations of two scans, within 4 standard errors: failure rate 6e-5; fixed seed.
    """
    problem, model, guide = sleep_problem()
    objective = build_objective("sleep")
    with torch.no_grad():
        values = torch.stack([objective.differentiable_loss(model, guide, *problem.arguments()) for _ in range(400)])
        posterior = guide.posterior().base_dist
        loc, scale = posterior.loc, posterior.scale
        # E_p[−log N(z; μ, σ²)] = ½ log 2πσ² + (1 + μ²) / 2σ²
        expected = (0.5 * (2 * math.pi * scale**2).log() + (1 + loc**2) / (2 * scale**2)).sum()
    assert abs(float(values.mean() - expected)) < 4 * float(values.std()) / math.sqrt(400)


def test_sleep_trains_the_guide_and_not_the_model() -> None:
    problem, model, guide = sleep_problem()
    value = build_objective("sleep").differentiable_loss(model, guide, *problem.arguments())
    grads = torch.autograd.grad(value, [problem.raw, *problem.decoder.parameters()], allow_unused=True)
    assert bool(grads[0].ne(0).all()) and grads[1:] == (None, None)


def test_sleep_does_not_read_the_scan() -> None:
    problem, model, guide = sleep_problem()
    values = []
    for scan in (problem.scan, torch.full_like(problem.scan, math.nan)):
        pyro.set_rng_seed(4)
        loss = build_objective("sleep").differentiable_loss(model, guide, scan, problem.observed, problem.theta())
        values.append(loss)
    assert torch.equal(*values)


def seen_by_the_encoder(problem: Problem, model: SegmentationModel) -> Tensor:
    """What `sleep` shows the guide, (B, C, *grid)."""
    seen: list[Tensor] = []

    class Spy(PyroModule):
        def forward(self, scan: Tensor, observed: Tensor, theta: Any = None) -> Tensor:
            seen.append(scan)
            with pyro.plate("scans", scan.shape[0], dim=-1):
                zero = torch.zeros(2, dtype=torch.float64)
                z: Tensor = pyro.sample("z", pyro.distributions.Normal(zero, zero + 1).to_event(1))
                return z

    build_objective("sleep").differentiable_loss(model, Spy(), *problem.arguments())
    return seen[0]


def test_sleep_gives_the_encoder_what_real_scans_would_look_like() -> None:
    """The guide sees a normalised scan: within the clipping range, zero where unobserved."""
    problem, model, _ = sleep_problem()
    with torch.no_grad():
        problem.mean.mul_(100.0)
    seen = seen_by_the_encoder(problem, model)
    assert not seen[~problem.observed].any()
    assert float(seen.min()) >= -0.5 and float(seen.max()) <= 1.5 and bool(seen.isfinite().all())


def test_sleep_normalises_by_the_region_that_real_scans_are_normalised_by() -> None:
    """Heads, by their brain: of few voxels the 2nd and the 98th percentile are the darkest and the brightest."""
    problem = make_problem(grid=(4, 5), mask="none")
    region = torch.zeros(4, 5, dtype=torch.bool)
    region[1:3, 1:4] = True
    model = problem.model()
    model.region = region
    seen = seen_by_the_encoder(problem, model)
    torch.testing.assert_close(seen[..., region].amin(-1), torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(seen[..., region].amax(-1), torch.ones(2, 2, dtype=torch.float64))
    assert float(seen.min()) < 0 or float(seen.max()) > 1  # what lies around has another range
