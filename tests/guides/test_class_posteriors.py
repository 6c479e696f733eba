"""Posteriors of the intensity classes: against EM in plain loops, and the same for every contrast."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ppl_seg.guides.class_posteriors import (
    ENOUGH,
    FEWEST,
    FLOOR,
    ITERATIONS,
    PSEUDO,
    blurred,
    class_log_likelihood,
    class_posteriors,
    class_weights,
)

GRID = (12, 11, 10)
CLASSES = (0, 1, 2, 1)


def location() -> Tensor:
    """(M, *grid): four slabs with soft borders."""
    x = torch.arange(GRID[0], dtype=torch.float64).view(-1, 1, 1).expand(GRID)
    return (-((x - torch.tensor([1.0, 4.0, 7.0, 10.0], dtype=torch.float64).view(4, 1, 1, 1)) ** 2) / 6).softmax(0)


def scan_of(means: list[float], seed: int = 0) -> Tensor:
    """(1, 1, *grid): each slab of its class's brightness, with noise."""
    values = torch.tensor(means, dtype=torch.float64)[torch.tensor(CLASSES)][location().argmax(0)]
    return (values + 0.05 * torch.randn(GRID, generator=torch.Generator().manual_seed(seed)))[None, None]


def weights() -> Tensor:
    """(N, *grid)."""
    p = location()
    return torch.stack([p[0], p[1] + p[3], p[2]])


def test_weights_are_sums_over_labels() -> None:
    torch.testing.assert_close(class_weights(location().log(), torch.tensor(CLASSES)), weights())


def test_em_in_plain_loops() -> None:
    x = scan_of([0.1, 0.9, 0.5]).flatten()
    observed = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    found = class_log_likelihood(x, observed, weights().flatten(1))
    w, seen, where = weights().flatten(1).numpy(), x.numpy(), np.flatnonzero(observed.numpy())
    assert FEWEST < len(where) < ENOUGH
    r = {j: w[:, j] ** 2 / (w[:, j] ** 2).sum() for j in where}
    overall = np.mean(seen[where])
    for iteration in range(ITERATIONS + 1):
        gaussians = []
        for n in range(3):
            count = sum(r[j][n] for j in where) + PSEUDO
            mean = (sum(r[j][n] * seen[j] for j in where) + PSEUDO * overall) / count
            variance = (sum(r[j][n] * (seen[j] - mean) ** 2 for j in where) + PSEUDO * 0.01) / count
            gaussians.append((mean, max(math.sqrt(variance), FLOOR)))
        if iteration < ITERATIONS:
            for j in where:
                p = [w[n, j] * math.exp(-0.5 * ((seen[j] - m) / s) ** 2) / s for n, (m, s) in enumerate(gaussians)]
                r[j] = np.array(p) / sum(p)
    for n, (mean, sd) in enumerate(gaussians):
        expected = -0.5 * ((seen - mean) / sd) ** 2 - math.log(sd)
        np.testing.assert_allclose(found[n].numpy(), expected, rtol=1e-9)


def test_posteriors_are_the_same_in_the_opposite_contrast() -> None:
    scan, observed = scan_of([0.1, 0.9, 0.5]), torch.ones(1, 1, *GRID, dtype=torch.bool)
    there, opposite = (class_posteriors(x, observed, weights()) for x in (scan, 1 - scan))
    assert there.shape == (1, 6, *GRID)
    torch.testing.assert_close(opposite, there, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(there.view(1, 2, 3, *GRID).sum(2), torch.ones(1, 2, *GRID, dtype=torch.float64))
    right = there[0, 3:].argmax(0) == torch.tensor(CLASSES)[location().argmax(0)]
    assert right.double().mean() > 0.95


def test_what_is_unobserved_says_nothing() -> None:
    scan, observed = scan_of([0.1, 0.9, 0.5]), torch.ones(1, 1, *GRID, dtype=torch.bool)
    observed[..., 4] = False
    found = class_posteriors(scan, observed, weights())
    changed = torch.where(observed, scan, 5.0)
    torch.testing.assert_close(found, class_posteriors(changed, observed, weights()))
    assert not found[..., 4].any() and bool(found[..., 3].sum(1).sub(2).abs().max() < 1e-9)


def test_a_scan_of_nothing_says_nothing() -> None:
    scan = scan_of([0.1, 0.9, 0.5])
    observed = torch.zeros(1, 1, *GRID, dtype=torch.bool)
    observed[..., 0, 0] = True
    found = class_posteriors(scan, observed, weights())
    seen = observed[0, 0]
    torch.testing.assert_close(found[0, :3, seen], torch.full((3, int(seen.sum())), 1 / 3, dtype=torch.float64))


def test_a_blurred_location_prior_is_one() -> None:
    log_p = location().log()
    soft = blurred(log_p, 2.0).exp()
    torch.testing.assert_close(soft.sum(0), torch.ones(GRID, dtype=torch.float64), rtol=1e-9, atol=0)
    assert soft.min() >= 1e-3 / 4 and soft.max() < log_p.exp().max()
