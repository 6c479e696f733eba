"""N4 against fields that are known."""

from __future__ import annotations

import numpy as np
import pytest

from ppl_seg.data.bias_field import log_bias_field
from tests.data.heads import BRAIN, BRIGHT, INVERTED, SPACING, head_labels, scan_of

SPACINGS = (SPACING,) * 3


def wave(shape: tuple[int, ...]) -> np.ndarray:
    """A smooth field's logarithm, sd 0.16, about 200 mm from crest to trough."""
    x, y, z = np.meshgrid(*[np.linspace(0, np.pi, n) for n in shape], indexing="ij")
    return np.asarray(0.25 * np.cos(x + 0.4) * np.cos(y) + 0.2 * np.cos(z))


@pytest.mark.parametrize("contrast", [BRIGHT, INVERTED])
def test_the_field_is_found_in_any_contrast(contrast: tuple[float, ...]) -> None:
    classes, affine = head_labels()
    brain, field = np.isin(classes, BRAIN), wave(classes.shape)
    scan = np.maximum(scan_of(classes, affine, contrast).data, 0)
    found = log_bias_field(scan * np.exp(field), SPACINGS, brain)
    assert found.shape == scan.shape and found.dtype == np.float32
    unfound = (found - log_bias_field(scan, SPACINGS, brain) - field)[brain]  # what N4 makes of anatomy alone left out
    assert field[brain].std() > 0.1
    assert unfound.std() < 0.04


def test_voxels_that_hold_nothing_do_not_count_and_the_field_repeats_itself() -> None:
    classes, affine = head_labels()
    brain = np.isin(classes, BRAIN)
    scan = np.maximum(scan_of(classes, affine, BRIGHT).data, 0) * np.exp(wave(classes.shape))
    found = log_bias_field(scan, SPACINGS, brain)
    assert np.array_equal(found, log_bias_field(scan, SPACINGS, brain))
    holes = np.random.default_rng(1).random(scan.shape) < 0.02
    holed = log_bias_field(np.where(holes, -5.0, scan), SPACINGS, brain)
    assert np.isfinite(holed).all()
    assert np.abs(holed - found)[brain].max() < 0.1


def test_a_region_too_small_to_tell_has_no_field() -> None:
    scan = np.full((40, 40, 40), 100.0)
    few = np.zeros(scan.shape, bool)
    few[:5, :5, :5] = True
    assert not log_bias_field(scan, SPACINGS, few).any()
    assert not log_bias_field(-scan, SPACINGS, np.ones(scan.shape, bool)).any()
