"""Normalisation: percentiles, invariance, and blindness to what is not observed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppl_seg.models.normalisation import normalise

GENERATOR = torch.Generator().manual_seed(0)
SCAN = torch.randn(2, 2, 20, 15, generator=GENERATOR, dtype=torch.float64) * 40 + 300
OBSERVED = torch.rand(2, 1, 20, 15, generator=GENERATOR) > 0.3


def test_percentiles_go_to_zero_and_one() -> None:
    """The 2nd and 98th percentiles (numpy's, of nearest order) of each scan and channel, then clipping."""
    out = normalise(SCAN, OBSERVED)
    for b in range(2):
        for c in range(2):
            seen = SCAN[b, c][OBSERVED[b, 0]].numpy()
            low, high = np.percentile(seen, [2, 98], method="nearest")
            expected = np.clip((seen - low) / (high - low), -0.5, 1.5)
            assert np.abs(out[b, c][OBSERVED[b, 0]].numpy() - expected).max() < 0.02
    assert float(out.min()) >= -0.5 and float(out.max()) <= 1.5
    assert not out[~OBSERVED.expand_as(SCAN)].any()


@given(a=st.floats(1e-3, 1e3), b=st.floats(-1e4, 1e4))
def test_affine_maps_do_not_matter(a: float, b: float) -> None:
    once, again = normalise(SCAN, OBSERVED), normalise(a * SCAN + b, OBSERVED)
    # rounding of a·x + b itself, relative to the scan's range
    tolerance = 1e-13 * (1 + abs(b) / (a * 40))
    torch.testing.assert_close(once, again, rtol=0, atol=max(tolerance, 1e-12))


@pytest.mark.parametrize("exponent", [-20, -3, 1, 17])
def test_powers_of_two_change_no_bit(exponent: int) -> None:
    assert torch.equal(normalise(SCAN, OBSERVED), normalise(2.0**exponent * SCAN, OBSERVED))


@pytest.mark.parametrize("content", [float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
def test_unobserved_content_does_not_matter(content: float) -> None:
    other = torch.where(OBSERVED, SCAN, content)
    assert torch.equal(normalise(SCAN, OBSERVED), normalise(other, OBSERVED))


def test_channels_have_their_own_mask() -> None:
    observed = torch.cat([OBSERVED, ~OBSERVED], 1)
    out = normalise(SCAN, observed)
    assert torch.equal(out[:, :1], normalise(SCAN[:, :1], OBSERVED))
    assert torch.equal(out[:, 1:], normalise(SCAN[:, 1:], ~OBSERVED))


@pytest.mark.parametrize("scan", [torch.full((1, 1, 4, 4), 7.0), torch.full((1, 1, 4, 4), float("nan"))])
def test_constant_or_nothing_observed_is_zero(scan: torch.Tensor) -> None:
    for observed in (torch.zeros(1, 1, 4, 4, dtype=torch.bool), ~scan.isnan()):
        assert not normalise(scan, observed).any()


def test_a_few_bright_voxels_do_not_set_the_range() -> None:
    scan = SCAN.clone()
    scan[..., 0, :3] = 1e5
    observed = torch.ones_like(OBSERVED)
    torch.testing.assert_close(
        normalise(scan, observed)[..., 1:, :], normalise(SCAN, observed)[..., 1:, :], rtol=0, atol=0.1
    )


def test_a_batch_is_its_scans() -> None:
    out = normalise(SCAN, OBSERVED)
    for b in range(2):
        assert torch.equal(out[b : b + 1], normalise(SCAN[b : b + 1], OBSERVED[b : b + 1]))


def test_a_region_sets_the_range_of_all_observed_voxels() -> None:
    region = torch.zeros_like(OBSERVED)
    region[..., ::2, :] = True
    inside = normalise(SCAN, OBSERVED & region)
    out = normalise(SCAN, OBSERVED, region)
    assert torch.equal(torch.where(region, out, 0.0), inside)
    assert torch.where(OBSERVED & ~region, out, 0.0).any() and not torch.where(OBSERVED, 0.0, out).any()
    assert torch.equal(normalise(SCAN, OBSERVED, torch.ones_like(OBSERVED)), normalise(SCAN, OBSERVED))
