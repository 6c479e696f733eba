"""Drawn labels: each voxel's marginals are exact, near voxels are alike, far ones are not."""

from __future__ import annotations

import math

import numpy as np
import torch

from ppl_seg.results.label_noise import FAR, NEAR, NEAR_SHARE, LabelNoise, Waves
from ppl_seg.results.readout import read_out

from .test_readout import PLACES, brain

DRAWS = 20_000


def places_along(millimetres: list[float]) -> torch.Tensor:
    """Places in voxels of 2 mm."""
    return torch.tensor([[mm / 2, 5.0, -3.0] for mm in millimetres], dtype=torch.float64)


def test_each_label_wins_as_often_as_it_is_probable() -> None:
    """20,000 draws are independent: within 5 standard deviations; fails by chance once in 10⁵ runs (15 numbers)."""
    torch.manual_seed(0)
    r = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.2] * 5, [0.001, 0.999, 0.0, 0.0, 0.0]], dtype=torch.float64).T
    noise = LabelNoise.draw(5, DRAWS, (2.0, 2.0, 2.0))
    drawn = noise.winners(r.unsqueeze(-1).expand(5, 3, DRAWS), places_along([0.0, 3.0, 90.0]))
    frequency = torch.stack([(drawn == m).double().mean(1) for m in range(5)])
    assert bool(((frequency - r).abs() <= 5 * (r * (1 - r) / DRAWS).sqrt()).all()), frequency


def test_the_correlation_of_waves_is_a_gaussian_of_distance() -> None:
    """Of cos(2π phase), exp(−d²/2L²), within 5 standard errors: fails by chance once in 10⁵ runs."""
    torch.manual_seed(1)
    length, distances = 14.0, [0.0, 3.0, 10.0, 14.0, 28.0, 80.0]
    turns = Waves.draw(1, DRAWS, (2.0, 2.0, 2.0), length).turns(places_along(distances), 0)
    wave = (2 * math.pi * turns).cos()
    expected = [math.exp(-0.5 * (d / length) ** 2) for d in distances]
    np.testing.assert_allclose(2 * (wave * wave[:1]).mean(1), expected, atol=5 / math.sqrt(DRAWS))


def test_noise_is_exponential_everywhere_and_falls_off_in_two_steps() -> None:
    """Moments of Exp(1), 5 standard errors as above. Of the phase's cosine, what near waves leave, and far ones."""
    torch.manual_seed(2)
    distances = [0.0, 3 * NEAR, 4 * FAR]
    noise = LabelNoise.draw(1, DRAWS, (2.0, 2.0, 2.0)).at(places_along(distances), 0)
    error = 5 / math.sqrt(DRAWS)
    np.testing.assert_allclose(noise.mean(1), 1, atol=error)
    np.testing.assert_allclose((noise - 1).square().mean(1), 1, atol=error * math.sqrt(8))
    wave = (math.pi * (-noise).exp()).cos()  # minus the cosine of the phase, for the triangle wave is |2 t − 1|
    far = math.exp(-0.5 * (3 * NEAR / FAR) ** 2)
    left = np.sinc(NEAR_SHARE) ** 2  # of a phase that a triangle wave moves, at two places where it is another
    found = 2 * (wave * wave[:1]).mean(1)
    np.testing.assert_allclose(found, [1.0, far * left, 0.0], atol=error + 0.01)  # exp(−4.5) of near waves is left


def test_volumes_vary_the_more_the_longer_the_noise_is_alike() -> None:
    """Over 1e6 voxels all voxels go together, over 1e-6 each by itself; marginals are the same."""
    model, theta = brain()
    matrix, own = PLACES["shifted"]
    scan, z = torch.rand(2, *own, dtype=torch.float64), torch.zeros(400, 3, dtype=torch.float64)
    spread = {}
    for spacing in (1e-6, 2.0, 1e6):
        torch.manual_seed(0)
        seen = torch.ones_like(scan, dtype=torch.bool)
        found = read_out(
            model, z, theta, scan, seen, matrix, keep_draws=True, keep_marginals=True, spacing=(spacing,) * 3
        )
        assert found.draws is not None and found.marginals is not None
        r = found.marginals.flatten(1)
        frequency = torch.stack([(found.draws.flatten(1) == m).double().mean(0) for m in range(len(r))])
        # 5.5 standard deviations for some ten thousand numbers: by chance once in a thousand runs
        assert bool(((frequency - r).abs() <= 5.5 * (r * (1 - r) / len(z)).sqrt() + 1 / len(z)).all())
        spread[spacing] = found.counts.double().std(0)[1:] / (r * (1 - r)).sqrt().sum(1)[1:]
    assert bool((spread[1e-6] > 0.5).all()) and bool((spread[1e-6] > spread[2.0]).all())
    assert bool((spread[2.0] > spread[1e6]).all()) and bool((spread[1e6] < 0.1).all()), spread
