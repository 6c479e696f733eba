"""Drawn labels: marginals stay as they are, near voxels and labels of a class go together, others do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ppl_seg.results.label_noise import FAR, NEAR, NEAR_SHARE, LabelNoise, Noise, Waves
from ppl_seg.results.readout import read_out

from .test_readout import PLACES, SPACING, brain

DRAWS = 20_000
ALL = slice(None)
RARE = 1e-6  # how often a test below fails by chance


def places_along(millimetres: list[float], kind: torch.dtype = torch.float64) -> Tensor:
    """Places in voxels of SPACING, (V, 3)."""
    return torch.tensor([[mm / SPACING[0], 5.0, -3.0] for mm in millimetres], dtype=kind)


def assert_frequencies(counts: Tensor, r: Tensor, draws: int) -> None:
    """Numbers of independent draws against their probabilities, by binomial tails; Bonferroni's limit for RARE."""
    number, share = counts.double().numpy().ravel(), r.double().numpy().ravel()
    below, above = stats.binom.cdf(number, draws, share), stats.binom.sf(number - 1, draws, share)
    assert min(below.min(), above.min()) > RARE / (2 * number.size)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_each_label_wins_as_often_as_it_is_probable(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    r = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.2] * 5, [0.001, 0.999, 0.0, 0.0, 0.0]], dtype=kind).T
    places = places_along([0.0, 3.0, 90.0], kind)
    for classes in ((0, 1, 2, 3, 4), (0, 1, 1, 2, 1), (0, 0, 0, 0, 0)):
        noise = LabelNoise.draw(classes, DRAWS, SPACING, places)
        drawn = noise.winners(ALL, r.unsqueeze(-1).expand(5, 3, DRAWS), range(5), places)
        assert_frequencies(torch.stack([(drawn == m).sum(1) for m in range(5)]), r, DRAWS)


def test_a_label_alone_needs_no_race() -> None:
    places = places_along([0.0, 3.0])
    noise = LabelNoise.draw((0, 1, 1), DRAWS, SPACING, places)
    drawn = noise.winners(ALL, torch.full((1, 2, DRAWS), 0.3, dtype=places.dtype), [2], places)
    assert drawn.shape == (2, DRAWS) and bool((drawn == 2).all())


def test_labels_of_a_class_are_drawn_together() -> None:
    """Left and right: where they are one class their winning goes together, else not; the limits are 7 sd away."""
    torch.manual_seed(0)
    r = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64).T  # background, left, right
    places = places_along([0.0, 1.0])
    together = {}
    for classes in ((0, 1, 1), (0, 1, 2)):
        noise = LabelNoise.draw(classes, DRAWS, SPACING, places)
        drawn = noise.winners(ALL, r.unsqueeze(-1).expand(3, 2, DRAWS), range(3), places)
        together[classes] = float(np.corrcoef(drawn[0] == 1, drawn[1] == 2)[0, 1])
    assert together[0, 1, 1] > 0.6 > 0.45 > together[0, 1, 2], together  # the background's noise is shared


def test_the_correlation_of_waves_is_a_gaussian_of_distance() -> None:
    """Of the phase's cosine, exp(−d²/2L²), within 5 standard errors: by chance once in 10⁵ runs."""
    torch.manual_seed(1)
    length, distances = 14.0, [0.0, 3.0, 10.0, 14.0, 28.0, 80.0]
    places = places_along(distances)
    wave = (2 * math.pi * Waves.draw(1, DRAWS, SPACING, length, places).turns(places, 0, ALL)).cos()
    expected = [math.exp(-0.5 * (d / length) ** 2) for d in distances]
    np.testing.assert_allclose(2 * (wave * wave[:1]).mean(1), expected, atol=5 / math.sqrt(DRAWS))


def test_noise_is_exponential_everywhere_and_falls_off_in_two_steps() -> None:
    """Exp(1) by Kolmogorov and Smirnov; what near waves leave of the phase's cosine, within 5 standard errors."""
    torch.manual_seed(2)
    places = places_along([0.0, 3 * NEAR, 4 * FAR])
    noise = Noise.draw(1, DRAWS, SPACING, places).at(places, 0, ALL)
    assert min(stats.kstest(row, "expon").pvalue for row in noise.numpy()) > RARE / 3
    wave = (math.pi * (-noise).exp()).cos()  # minus the cosine of the phase, for the triangle wave is |2 t − 1|
    far = math.exp(-0.5 * (3 * NEAR / FAR) ** 2)
    left = np.sinc(NEAR_SHARE) ** 2  # of a phase that a triangle wave moves, at two places where it is another
    found = 2 * (wave * wave[:1]).mean(1)
    np.testing.assert_allclose(found, [1.0, far * left, 0.0], atol=5 / math.sqrt(DRAWS) + 0.01)  # exp(−4.5) of near


def test_volumes_vary_the_more_the_longer_the_noise_is_alike() -> None:
    """Voxels of a nanometre all go together, of a kilometre each by itself; marginals are the same."""
    model, theta = brain()
    matrix, own = PLACES["shifted"]
    scan, z = torch.rand(2, *own, dtype=torch.float64), torch.zeros(400, 3, dtype=torch.float64)
    seen, spread = torch.ones_like(scan, dtype=torch.bool), {}
    for side in (1e-6, 2.0, 1e6):
        torch.manual_seed(0)
        found = read_out(model, z, theta, scan, seen, matrix, (side,) * 3, keep_draws=True, keep_marginals=True)
        assert found.draws is not None and found.marginals is not None
        r = found.marginals.flatten(1)
        drawn = torch.stack([(found.draws.flatten(1) == m).sum(0) for m in range(len(r))])
        assert_frequencies(drawn, r.clamp(0, 1), len(z))
        spread[side] = found.counts.double().std(0)[1:] / (r * (1 - r)).sqrt().sum(1)[1:]
    assert bool((spread[1e-6] > 0.5).all()) and bool((spread[1e-6] > spread[2.0]).all())
    assert bool((spread[2.0] > spread[1e6]).all()) and bool((spread[1e6] < 0.1).all()), spread
