"""IWAE: fixed log-weights in blocks, the plain expression, Pyro's RenyiELBO, the evidence."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import RenyiELBO

from ppl_seg.inference.objectives import build_objective
from tests.reference import likelihood as slow
from tests.reference.problems import assert_same, make_problem
from tests.reference.quadrature import ByQuadrature

ONE_SCAN_ONE_LATENT = {"latent_dim": 1, "num_scans": 1, "channels": 1, "draws": 4096}


def test_iwae_in_blocks_does_not_decrease() -> None:
    """Eight fixed log-weights a scan; the mean over blocks of log-mean-exp grows with the block, surely."""
    problem = make_problem()
    model, guide = problem.model(), problem.guide()
    means = []
    for size in (1, 2, 4, 8):
        guide = problem.guide()  # rewinds
        bounds = [
            -build_objective("iwae", num_particles=size).differentiable_loss(model, guide, *problem.arguments())
            for _ in range(8 // size)
        ]
        assert problem.script.next == 8
        means.append(float(torch.stack(bounds).mean().detach()))
    assert means == sorted(means) and means[0] < means[-1]
    log_f = torch.stack([problem.log_f(problem.z(d)) for d in range(8)])
    weights = slow.exact(log_f, problem.label_ll()) - torch.stack([problem.sampled_kl(d) for d in range(8)])
    for mean, size in zip(means, (1, 2, 4, 8), strict=True):
        by_hand = weights.reshape(8 // size, size, 2).exp().mean(1).log().sum(-1).mean()
        assert mean == pytest.approx(float(by_hand.detach()), rel=1e-10)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_iwae_value_and_gradient_are_the_plain_expression(beta: float) -> None:
    problem = make_problem(maps=True)
    value = problem.loss(build_objective("iwae", num_particles=8), beta)
    log_f = torch.stack([problem.log_f(problem.z(d)) for d in range(8)])
    kl = torch.stack([problem.sampled_kl(d) for d in range(8)])
    weights = beta * slow.exact(log_f, problem.label_ll()) - kl
    assert_same(value, -weights.exp().mean(0).log().sum(), problem.leaves(), rtol=1e-10)


def test_iwae_refuses_a_guide_of_all_scans_at_once() -> None:
    """Its log q would count once for each scan, as it does in Pyro's RenyiELBO."""
    problem = make_problem()

    def guide(*_: object) -> None:
        z = pyro.sample("together", dist.Normal(problem.raw.new_zeros(problem.raw.shape[0]), 1.0).to_event(1))
        with pyro.plate("scans", len(problem.scan), dim=-1):
            z = z[..., : len(problem.scan), None].expand(*z.shape[:-1], -1, problem.latent_dim)
            pyro.sample("z", dist.Delta(z, event_dim=1))

    with pytest.raises(ValueError, match="IWAE weighs each of 2 scans by itself; site 'together' has"):
        build_objective("iwae").loss(problem.model(), guide, *problem.arguments())


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("mask", ["none", "some"])
def test_iwae_is_renyi_at_zero(beta: float, mask: str) -> None:
    """Same draws; value, and gradient as RenyiELBO leaves it in the parameters."""
    problem = make_problem(mask=mask)
    ours = problem.loss(build_objective("iwae", num_particles=8), beta)
    gradient = torch.autograd.grad(ours, (problem.raw, problem.decoder.weight), retain_graph=True)
    for vectorised in (False, True):
        renyi = RenyiELBO(alpha=0, num_particles=8, vectorize_particles=vectorised, max_plate_nesting=1)
        problem.raw.grad = problem.decoder.weight.grad = None
        with pyro.get_param_store().scope():
            value = renyi.loss_and_grads(problem.model(beta=beta), problem.guide(), *problem.arguments())
        assert value == pytest.approx(float(ours.detach()), rel=1e-12)
        torch.testing.assert_close(problem.raw.grad, gradient[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(problem.decoder.weight.grad, gradient[1], rtol=1e-10, atol=1e-12)


def test_iwae_of_many_draws_is_the_evidence() -> None:
    """4096 draws, within 4 standard errors (delta method) of quadrature: failure rate 6e-5; fixed draws."""
    problem = make_problem(**ONE_SCAN_ONE_LATENT, mask="some")
    with torch.no_grad():
        problem.raw.copy_(torch.tensor([[0.2, -0.1]]))  # wide enough for weights of finite variance
    objective = build_objective("iwae", num_particles=4096)
    bound = -float(problem.loss(objective).detach())
    with torch.no_grad():
        log_weights = objective.log_weights(problem.model(), problem.guide(), *problem.arguments())[:, 0]
    relative = (log_weights - log_weights.max()).exp()
    error = float(relative.std() / relative.mean()) / 64
    assert abs(bound - ByQuadrature(problem).evidence) < 4 * error < 0.2
