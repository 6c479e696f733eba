"""Scans and label probabilities deformed together, intensities through monotone maps."""

from __future__ import annotations

import math

import pytest
import torch

from ppl_seg.data.scan_augmentation import Recolouring, augmentation, deform_scans, recolour

GRID = (16, 14, 12)
BOX = (slice(2, 14), slice(0, 12), slice(0, 12))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(grid: tuple[int, ...] = GRID) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth scans in 0..1, their lower third unobserved, and targets (x, 1 − x)."""
    axes = torch.meshgrid(*[torch.linspace(0, 3, n) for n in grid], indexing="ij")
    scan = (0.5 + 0.5 * torch.sin(sum(axes[1:], axes[0]))).expand(2, 1, *grid).clone()
    observed = torch.ones(2, 1, *grid, dtype=torch.bool)
    observed[:, :, : grid[0] // 3] = False
    return scan, observed, torch.cat([scan, 1 - scan], 1)


CASES = [(GRID, BOX), ((16, 14), BOX[:2]), ((16, 1, 14), (BOX[0], slice(0, 48), BOX[1]))]


@pytest.mark.parametrize(("grid", "box"), CASES)
def test_scan_and_targets_move_together(grid: tuple[int, ...], box: tuple[slice, ...]) -> None:
    scan, observed, targets = pictures(grid)
    moved, seen, labels = deform_scans(scan, observed, targets, box, generator())
    assert moved.shape[2:] == tuple(len(range(n)[side]) for n, side in zip(grid, box, strict=True))
    torch.testing.assert_close(labels.sum(1), torch.ones_like(labels[:, 0]))
    assert 0.3 < float(seen.float().mean()) < 0.9
    there = (slice(None), slice(None), *box)
    assert float((moved - scan[there])[seen].abs().mean()) > 0.02  # something moved
    # the border of what is observed has part of its weight outside, where the scan is 0 by definition
    assert float((moved - labels[:, :1])[seen].abs().quantile(0.9)) < 0.05
    assert float(moved[~seen].abs().max()) == 0
    again = deform_scans(scan, observed, targets, box, generator())
    assert torch.equal(again[0], moved) and torch.equal(again[2], labels)


def test_recolouring_keeps_the_order_of_intensities_without_field_and_noise() -> None:
    scan, observed, _ = pictures()
    changed = recolour(scan, observed, generator(3), Recolouring(bias=0.0, noise=0.0))
    for before, after in zip(scan, changed, strict=True):
        known = observed[0]
        order = before[known].argsort()
        assert bool((after[known][order].diff() >= -1e-6).all())
    assert float(changed[~observed].abs().max()) == 0
    assert float((changed - scan)[observed].abs().mean()) > 0.02


def test_one_step_is_both_and_hears_no_unobserved_intensity() -> None:
    scan, observed, targets = pictures()
    augment = augmentation(1.0)
    found = augment(scan, observed, targets, BOX, generator())
    assert all(bool(torch.isfinite(part).all()) for part in found)
    hidden = torch.where(observed, scan, 7.0)
    again = augment(hidden, observed, targets, BOX, generator())
    assert all(torch.equal(*pair) for pair in zip(again, found, strict=True))
    assert math.prod(found[0].shape[2:]) == 12**3
