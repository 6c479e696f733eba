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


@pytest.fixture(scope="module")
def bright() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A head's scan with a field, its brain, and what is found."""
    classes, affine = head_labels()
    brain = np.isin(classes, BRAIN)
    scan = np.maximum(scan_of(classes, affine, BRIGHT).data, 0) * np.exp(wave(classes.shape))
    return scan, brain, log_bias_field(scan, SPACINGS, brain)


def centred(field: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """A field's values in the brain: its mean is the scan's own affair."""
    return np.asarray(field[brain] - field[brain].mean())


def test_the_field_is_found(bright: tuple[np.ndarray, ...]) -> None:
    scan, brain, found = bright
    true = wave(scan.shape)
    assert found.shape == scan.shape and found.dtype == np.float32
    assert true[brain].std() > 0.1
    assert (centred(found, brain) - centred(true, brain)).std() < 0.05


def test_the_contrast_hardly_matters(bright: tuple[np.ndarray, ...]) -> None:
    _, brain, found = bright
    classes, affine = head_labels()
    scan = np.maximum(scan_of(classes, affine, INVERTED).data, 0) * np.exp(wave(classes.shape))
    other = log_bias_field(scan, SPACINGS, brain)
    assert (centred(other, brain) - centred(found, brain)).std() < 0.05


def test_voxels_that_hold_nothing_do_not_count_and_the_field_repeats_itself(bright: tuple[np.ndarray, ...]) -> None:
    scan, brain, found = bright
    assert np.array_equal(found, log_bias_field(scan, SPACINGS, brain))
    holes = np.random.default_rng(1).random(scan.shape) < 0.02
    holed = log_bias_field(np.where(holes, -5.0, scan), SPACINGS, brain)
    assert np.isfinite(holed).all()
    assert np.abs(centred(holed, brain) - centred(found, brain)).max() < 0.1


def test_a_region_too_small_to_tell_has_no_field() -> None:
    scan = np.full((40, 40, 40), 100.0)
    few = np.zeros(scan.shape, bool)
    few[:5, :5, :5] = True
    assert not log_bias_field(scan, SPACINGS, few).any()
    assert not log_bias_field(-scan, SPACINGS, np.ones(scan.shape, bool)).any()


def test_the_field_does_not_hang_on_how_a_header_rounds_its_spacing(bright: tuple[np.ndarray, ...]) -> None:
    scan, brain = (np.kron(part, np.ones((2, 2, 2))) for part in bright[:2])
    found = [log_bias_field(scan, (size,) * 3, brain > 0) for size in (SPACING / 2, SPACING / 2 * (1 + 1e-7))]
    assert np.abs(found[0] - found[1])[brain > 0].max() < 0.01
