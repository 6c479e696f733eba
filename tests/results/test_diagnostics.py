from __future__ import annotations

import numpy as np
import pytest

from ppl_seg.results.diagnostics import reliability


def test_bins_by_hand():
    probabilities = np.array([[0.9, 0.9, 0.4, 0.3], [0.1, 0.1, 0.6, 0.7]])
    result = reliability(probabilities, np.array([0, 1, 1, 1]), bins=2)
    assert result.counts.tolist() == [4, 4]
    assert result.predicted == pytest.approx([(0.1 + 0.1 + 0.4 + 0.3) / 4, (0.9 + 0.9 + 0.6 + 0.7) / 4])
    assert result.observed == pytest.approx([1 / 4, 3 / 4])
    assert result.expected_calibration_error == pytest.approx(0.5 * 0.025 + 0.5 * 0.025)


def test_labels_drawn_from_the_probabilities_are_calibrated():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet([0.5, 0.5, 0.5], 40_000).T
    truth = (random.random(40_000) > probabilities.cumsum(0)).sum(0)
    honest = reliability(probabilities, truth)
    sharp = probabilities**3 / (probabilities**3).sum(0)
    assert honest.expected_calibration_error < 0.01
    assert reliability(sharp, truth).expected_calibration_error > 0.05


def test_a_certain_prediction_is_in_the_last_bin():
    result = reliability(np.array([[1.0], [0.0]]), np.array([0]), bins=10)
    assert result.counts[-1] == 1 and result.counts[0] == 1
    assert result.expected_calibration_error == 0.0


def test_pooling_and_choosing_voxels_agree():
    random = np.random.default_rng(1)
    probabilities = random.dirichlet([1.0, 1.0], (6, 5)).transpose(2, 0, 1)
    truth = random.integers(0, 2, (6, 5))
    half = np.zeros((6, 5), bool)
    half[:3] = True
    whole = reliability(probabilities, truth)
    pooled = reliability(probabilities, truth, half) + reliability(probabilities, truth, ~half)
    assert np.array_equal(whole.counts, pooled.counts)
    assert whole.observed_sums == pytest.approx(pooled.observed_sums)
    assert whole.expected_calibration_error == pytest.approx(pooled.expected_calibration_error)


def test_nothing_predicted_is_nan():
    result = reliability(np.ones((1, 2)), np.zeros(2, int), np.zeros(2, bool))
    assert np.isnan(result.expected_calibration_error) and np.isnan(result.predicted).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected probabilities"):
        reliability(np.ones((2, 3)), np.zeros(4, int))
    with pytest.raises(ValueError, match="positions 0 to 1"):
        reliability(np.ones((2, 3)), np.full(3, 2))
    with pytest.raises(ValueError, match="same bins"):
        reliability(np.ones((1, 1)), np.zeros(1, int)) + reliability(np.ones((1, 1)), np.zeros(1, int), bins=3)
