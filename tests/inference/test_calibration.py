"""The calibrated prior: its coordinates, the guide's, and the shrunk covariance against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from pyro import distributions as dist
from sklearn.covariance import ledoit_wolf
from torch.distributions import kl_divergence

from ppl_seg.guides.families import FAMILIES, Family, kl_to_prior
from ppl_seg.inference.calibration import calibrate_prior, shrunk_covariance
from ppl_seg.inference.networks import build_label_map_guide, build_shape_prior

GRID, LABELS, LATENT = (8, 6, 4), 3, 4


@pytest.mark.parametrize("count", [5, 12, 200])
def test_shrunk_covariance_is_ledoit_and_wolf(count: int) -> None:
    codes = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ torch.diag(
        torch.tensor([2.0, 1.0, 0.5, 0.3, 0.1, 0.01], dtype=torch.float64)
    )
    expected, _ = ledoit_wolf(codes.numpy())
    torch.testing.assert_close(shrunk_covariance(codes), torch.from_numpy(expected), rtol=1e-10, atol=1e-14)


class Full(Family):
    """q(z) of a user's, with a full covariance."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.num_parameters = latent_dim, 2 * latent_dim + latent_dim**2

    def forward(self, raw: torch.Tensor) -> dist.Distribution:
        loc, _, rest = raw.split((self.latent_dim, self.latent_dim, self.latent_dim**2), -1)
        factor = rest.unflatten(-1, (self.latent_dim, -1)).tril(-1) + torch.eye(self.latent_dim)
        return dist.MultivariateNormal(loc, scale_tril=factor)


@pytest.mark.parametrize("family", ["mean-field", "low-rank", "full"])
def test_the_guide_follows_the_prior(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """u = m + L z for draws, KL to N(0, I) unchanged against the prior in u, and the same label probabilities."""
    monkeypatch.setitem(FAMILIES, "full", Full)
    torch.manual_seed(0)
    location = torch.full((LABELS, *GRID), 1 / LABELS)
    prior = build_shape_prior(location, "convolutional", LATENT, width=4)
    torch.nn.init.normal_(prior.decoder.to_scores.weight, std=0.1)
    guide = build_label_map_guide(family, LATENT, LABELS, GRID, width=4)
    labels = torch.randint(0, LABELS, (9, *GRID))
    observed = torch.ones(9, 1, *GRID, dtype=torch.bool)
    with torch.no_grad():
        before = guide.posterior(labels, observed)
        f_before = prior.log_label_probs(before.mean)
        calibrate_prior(prior, guide, labels, observed)
        after = guide.posterior(labels, observed)
        m, scale_tril = prior.latent_loc, prior.latent_scale_tril
        torch.testing.assert_close(m + after.mean @ scale_tril.T, before.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(prior.log_label_probs(after.mean), f_before, rtol=1e-3, atol=1e-3)
        full = dist.MultivariateNormal(before.mean, getattr(before, "covariance_matrix", before.variance.diag_embed()))
        expected = kl_divergence(full, dist.MultivariateNormal(m, scale_tril=scale_tril))
        torch.testing.assert_close(kl_to_prior(after, prior.prior()), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["mean-field", "low-rank", "full"])
def test_the_aggregated_posterior_is_the_prior(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many codes: in the calibrated coordinates they have mean 0, and covariance + mean covariance close to I."""
    monkeypatch.setitem(FAMILIES, "full", Full)
    torch.manual_seed(0)
    location = torch.full((LABELS, *GRID), 1 / LABELS)
    prior = build_shape_prior(location, "convolutional", LATENT, width=4)
    guide = build_label_map_guide(family, LATENT, LABELS, GRID, width=4)
    labels = torch.randint(0, LABELS, (400, *GRID))
    observed = torch.ones(400, 1, *GRID, dtype=torch.bool)
    calibrate_prior(prior, guide, labels, observed)
    with torch.no_grad():
        posterior = guide.posterior(labels, observed)
        mean = posterior.mean.mean(0)
        spread = torch.cov(posterior.mean.T) + posterior.covariance_matrix.mean(0)
    torch.testing.assert_close(mean, torch.zeros(LATENT), rtol=0, atol=1e-3)
    torch.testing.assert_close(spread, torch.eye(LATENT), rtol=0, atol=0.05)
