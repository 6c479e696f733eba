"""Families of q(z): where they start, and their analytic KL three ways."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from ppl_seg.guides.families import FAMILIES, build_family
from tests.reference.quadrature import gaussian_kl

D = 5


def posterior(name: str, batch: tuple[int, ...] = (3,), **options: int) -> dist.Distribution:
    family = build_family(name, D, **options).double()
    generator = torch.Generator().manual_seed(2)
    raw = torch.randn(*batch, family.num_parameters, generator=generator, dtype=torch.float64, requires_grad=True)
    return family(raw)


def standard_normal() -> dist.Distribution:
    zero = torch.zeros(D, dtype=torch.float64)
    return dist.Normal(zero, zero + 1).to_event(1)


def moments(q: dist.Distribution) -> tuple[Tensor, Tensor]:
    """Mean (..., D) and full covariance (..., D, D)."""
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else q.variance.diag_embed()
    return q.mean, covariance


@pytest.mark.parametrize("batch", [(), (3,), (4, 3)])
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes(name: str, batch: tuple[int, ...]) -> None:
    q = posterior(name, batch)
    assert q.batch_shape == batch and q.event_shape == (D,)
    z = q.rsample(torch.Size((7,)))
    assert z.shape == (7, *batch, D) and z.requires_grad and q.log_prob(z).shape == (7, *batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_zeros_are_close_to_the_prior(name: str) -> None:
    family = build_family(name, D)
    mean, covariance = moments(family(torch.zeros(family.num_parameters)))
    assert not mean.any()
    torch.testing.assert_close(covariance, torch.eye(D), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_at_gives_the_mean_and_the_scale(name: str) -> None:
    family, loc = build_family(name, D).double(), torch.randn(3, D, dtype=torch.float64)
    mean, covariance = moments(family(family.raw_at(loc, 0.2)))
    torch.testing.assert_close(mean, loc)
    torch.testing.assert_close(covariance.diagonal(dim1=-2, dim2=-1).min(-1).values, torch.full_like(loc[:, 0], 0.04))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_raw_number_matters_from_the_start(name: str) -> None:
    """No saddle at raw zeros: the gradient of a generic function of the moments reaches every number."""
    family = build_family(name, D).double()
    raw = torch.zeros(family.num_parameters, dtype=torch.float64, requires_grad=True)
    q = family(raw)
    z = torch.randn(D, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(q.log_prob(z), raw)
    assert bool(gradient.ne(0).all())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [-30.0, -5.0, 30.0, 300.0])
def test_extreme_raw_numbers_are_valid(name: str, size: float) -> None:
    family = build_family(name, D)
    raw = torch.full((2, family.num_parameters), size)
    q = family(raw)
    kl = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1))
    assert bool(q.rsample().isfinite().all()) and bool(kl.isfinite().all()) and bool((kl >= 0).all())


@pytest.mark.parametrize(("name", "options"), [("mean-field", {}), *(("low-rank", {"rank": r}) for r in (1, 4, 50))])
def test_kl_is_torchs_between_full_normals(name: str, options: dict[str, int]) -> None:
    """And our closed form."""
    q = posterior(name, **options)
    kl = torch.distributions.kl_divergence(q, standard_normal())
    assert kl.shape == (3,)
    mean, covariance = moments(q)
    full = torch.distributions.MultivariateNormal(mean, covariance)
    zero = torch.distributions.MultivariateNormal(torch.zeros(D).double(), torch.eye(D).double())
    expected = torch.distributions.kl_divergence(full, zero)
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kl, gaussian_kl(mean, covariance), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_of_the_kl_in_raw_numbers(name: str) -> None:
    family = build_family(name, D).double()
    raw = torch.randn(2, family.num_parameters, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(torch.distributions.kl_divergence(family(raw), standard_normal()).sum(), raw)
    (expected,) = torch.autograd.grad(gaussian_kl(*moments(family(raw))).sum(), raw)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_is_its_monte_carlo_estimate(name: str) -> None:
    """20 000 draws, 3 comparisons within 4 standard errors: failure rate 2e-4 over seeds; fixed seed."""
    q = posterior(name)
    with torch.no_grad():
        z = q.rsample(torch.Size((20_000,)))
        ratio = q.log_prob(z) - standard_normal().log_prob(z)
        kl = torch.distributions.kl_divergence(q, standard_normal())
    error = ratio.std(0) / math.sqrt(20_000)
    assert bool(((ratio.mean(0) - kl).abs() < 4 * error).all())
    assert bool((error < 0.05 * kl).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_have_the_moments(name: str) -> None:
    """20 000 draws, 15 means within 5 errors, covariances within 5 %: failure rate < 1e-4; fixed seed."""
    q = posterior(name)
    with torch.no_grad():
        z = q.rsample(torch.Size((20_000,)))
        mean, covariance = moments(q)
    assert bool(((z.mean(0) - mean).abs() < 5 * z.std(0) / math.sqrt(20_000)).all())
    for b in range(3):
        found = torch.cov(z[:, b].T)
        assert float((found - covariance[b]).norm()) < 0.05 * float(covariance[b].norm())


def test_kl_to_another_prior_is_sampled() -> None:
    """The registered formula speaks of Independent(Normal, 1) only; for others Pyro's objective takes draws."""
    q = posterior("low-rank")
    zero = torch.zeros(D, dtype=torch.float64)
    prior = dist.Laplace(zero, zero + 1).to_event(1)

    def sample_from(z: dist.Distribution) -> None:
        with pyro.plate("scans", 3):
            pyro.sample("z", z)

    pyro.set_rng_seed(0)
    drawn = q.rsample()
    pyro.set_rng_seed(0)
    loss = TraceMeanField_ELBO().loss(lambda: sample_from(prior), lambda: sample_from(q))
    assert loss == pytest.approx(float((q.log_prob(drawn) - prior.log_prob(drawn)).sum()), rel=1e-9)


def test_families_are_built_by_name() -> None:
    with pytest.raises(ValueError, match="low-rank"):
        build_family("full", D)
