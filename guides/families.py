"""Families of q(z): from a raw parameter vector to a distribution, with their analytic KL to N(0, I)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
    register_kl,
)
from torch.nn import functional

SCALE_FLOOR = 1e-3
KL_DRAWS = 64
_UNIT = 0.541324854612918  # softplus(_UNIT) = 1: raw zeros give the prior


def _scale(raw: Tensor) -> Tensor:
    return functional.softplus(raw + _UNIT) + SCALE_FLOOR


class Family(nn.Module):
    """A family of q(z): `num_parameters` raw numbers a scan to a distribution with event shape (D,)."""

    latent_dim: int
    num_parameters: int

    def raw_at(self, loc: Tensor, scale: float) -> Tensor:
        """Raw parameters (..., P) of a q(z) around `loc` (..., D) with sd `scale` in every dimension."""
        raw = loc.new_zeros(*loc.shape[:-1], self.num_parameters)
        raw[..., : self.latent_dim] = loc
        raw[..., self.latent_dim : 2 * self.latent_dim] = math.log(math.expm1(scale - SCALE_FLOOR)) - _UNIT
        return raw


class MeanField(Family):
    """Independent normals; raw = (loc, scale), 2 D numbers. Raw zeros give (nearly) N(0, I)."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.num_parameters = 2 * latent_dim

    def forward(self, raw: Tensor) -> dist.Distribution:
        """q(z) with event shape (D,) from raw parameters (..., 2 D)."""
        z_loc, z_scale = raw.split(self.latent_dim, -1)
        return dist.Normal(z_loc, _scale(z_scale)).to_event(1)


class LowRank(Family):
    """N(loc, W Wᵀ + diag(d)) with W of D × rank; raw = (loc, d, columns of W), D (2 + rank) numbers.

    All of raw is D numbers after D numbers, so that an encoder can say at a place what belongs to it.
    """

    start: Tensor

    def __init__(self, latent_dim: int, rank: int = 4) -> None:
        super().__init__()
        self.latent_dim, self.rank = latent_dim, min(rank, latent_dim)
        self.num_parameters = latent_dim * (2 + self.rank)
        # W = 0 is a saddle: its gradient vanishes there.
        self.register_buffer("start", 0.1 * torch.eye(latent_dim, self.rank), persistent=False)

    def forward(self, raw: Tensor) -> dist.Distribution:
        """q(z) with event shape (D,) from raw parameters (..., D (2 + rank))."""
        d = self.latent_dim
        z_loc, z_scale, factor = raw.split([d, d, d * self.rank], -1)
        factor = factor.unflatten(-1, (self.rank, d)).mT + self.start.to(raw.dtype)
        with _full_precision(raw):
            return _LowRankNormal(z_loc, factor, _scale(z_scale).square())


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class _LowRankNormal(dist.LowRankMultivariateNormal):
    """Its matrix products keep the parameters' precision under autocast: the KL is a difference of large terms."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        with _full_precision(self.loc):
            drawn: Tensor = super().rsample(sample_shape)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        with _full_precision(self.loc):
            density: Tensor = super().log_prob(value)
        return density


def _kl_to_normals(q: Any, log_det: Tensor, p: Independent[Any]) -> Tensor:
    """½ Σ_i [(Σ_ii + (μ_i − m_i)²)/s_i² − 1 + log s_i²] − ½ log det Σ: a normal to independent normals."""
    if not isinstance(p.base_dist, Normal) or p.reinterpreted_batch_ndims != 1:
        return kl_divergence(q, p.base_dist)  # torch knows no formula and says so; Pyro's objectives then sample it
    variance = p.base_dist.scale.square()
    spread = q.variance + (q.loc - p.base_dist.loc).square()
    return 0.5 * ((spread / variance - 1 + variance.log()).sum(-1) - log_det)


@register_kl(LowRankMultivariateNormal, Independent)
def _kl_low_rank_to_normals(q: LowRankMultivariateNormal, p: Independent[Any]) -> Tensor:
    identity = torch.eye(q.cov_factor.shape[-1], dtype=q.loc.dtype, device=q.loc.device)
    scaled = q.cov_factor / q.cov_diag.unsqueeze(-1)
    with _full_precision(q.loc):
        capacitance = identity + q.cov_factor.mT @ scaled  # matrix determinant lemma
    return _kl_to_normals(q, q.cov_diag.log().sum(-1) + torch.linalg.slogdet(capacitance).logabsdet, p)


@register_kl(MultivariateNormal, Independent)
def _kl_full_to_normals(q: MultivariateNormal, p: Independent[Any]) -> Tensor:
    return _kl_to_normals(q, 2 * q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1), p)


FAMILIES: dict[str, Callable[..., Family]] = {"mean-field": MeanField, "low-rank": LowRank}


def build_family(name: str, latent_dim: int, **options: int) -> Family:
    """A family by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown guide family {name!r}; choose one of {sorted(FAMILIES)}")
    return FAMILIES[name](latent_dim, **options)


def covariance_of(posterior: Any) -> Tensor:
    """Covariance, (..., D, D), of a normal of event shape (D,).

    Raises:
        ValueError: another distribution.
    """
    base = posterior.base_dist if isinstance(posterior, Independent) else posterior
    if not isinstance(base, Normal | MultivariateNormal | LowRankMultivariateNormal):
        raise ValueError(f"a guide of decoders must be a normal; found {type(base).__name__}")
    covariance = torch.diag_embed(posterior.variance) if isinstance(base, Normal) else base.covariance_matrix
    return torch.as_tensor(covariance)


def analytic_kl(q: dist.Distribution, p: dist.Distribution) -> Tensor | None:
    """KL(q ‖ p) in closed form; None where torch has none registered, which is how it says so."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def kl_to_prior(posterior: dist.Distribution, prior: dist.Distribution) -> Tensor:
    """KL(q ‖ p) per scan, analytic; of a family whose KL torch does not know, from draws."""
    prior = prior.expand(posterior.batch_shape)
    known = analytic_kl(posterior, prior)
    if known is not None:
        return known
    z = posterior.rsample(torch.Size((KL_DRAWS,)))
    ratio: Tensor = posterior.log_prob(z) - prior.log_prob(z)
    return ratio.mean(0)
