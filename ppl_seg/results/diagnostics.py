"""Reliability: do labels that get probability p turn out right in a share p of the cases?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Reliability:
    """Binned predictions against outcomes; `+` pools scans.

    Attributes:
        edges: (bins + 1,) borders of the bins of predicted probability.
        counts: (bins,) predictions in each bin.
        predicted_sums: (bins,) sums of their probabilities.
        observed_sums: (bins,) how many of them were right.
    """

    edges: np.ndarray
    counts: np.ndarray
    predicted_sums: np.ndarray
    observed_sums: np.ndarray

    def __add__(self, other: Reliability) -> Reliability:
        """Pool the predictions of two sets of voxels."""
        if not np.array_equal(self.edges, other.edges):
            raise ValueError(f"expected the same bins, found {len(self.counts)} and {len(other.counts)}")
        return Reliability(
            self.edges,
            self.counts + other.counts,
            self.predicted_sums + other.predicted_sums,
            self.observed_sums + other.observed_sums,
        )

    @property
    def predicted(self) -> np.ndarray:
        """(bins,) mean predicted probability, NaN in empty bins."""
        return _ratio(self.predicted_sums, self.counts)

    @property
    def observed(self) -> np.ndarray:
        """(bins,) observed frequency, NaN in empty bins."""
        return _ratio(self.observed_sums, self.counts)

    @property
    def expected_calibration_error(self) -> float:
        """Σ_b n_b / n · |predicted_b − observed_b| (Naeini et al., AAAI 2015); NaN without predictions."""
        total = self.counts.sum()
        gaps = np.abs(self.predicted_sums - self.observed_sums)
        return float(gaps.sum() / total) if total else float("nan")


def reliability(
    probabilities: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None, bins: int = 15
) -> Reliability:
    """Each label's probability at each voxel is one prediction (one label against the rest).

    Args:
        probabilities: (M, ...) label marginals.
        truth: (...) true labels as positions of the table.
        where: (...) bool, the voxels that count; all by default. Easy background dilutes the error: give the
            neighbourhood of the structures.
        bins: equal bins on [0, 1].

    Raises:
        ValueError: shapes that do not fit, positions outside the table.
    """
    if probabilities.shape[1:] != truth.shape:
        raise ValueError(f"expected probabilities (M, {truth.shape}), found {probabilities.shape}")
    if truth.size and (truth.min() < 0 or truth.max() >= len(probabilities)):
        raise ValueError(f"expected positions 0 to {len(probabilities) - 1}, found up to {truth.max()}")
    chosen = np.ones(truth.shape, bool) if where is None else np.asarray(where, bool)
    positions = truth[chosen]
    edges = np.linspace(0.0, 1.0, bins + 1)
    counts, predicted, observed = np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins)
    for label, volume in enumerate(probabilities):
        values = volume[chosen].astype(np.float64)
        index = np.clip((values * bins).astype(np.int64), 0, bins - 1)
        counts += np.bincount(index, minlength=bins)
        predicted += np.bincount(index, weights=values, minlength=bins)
        observed += np.bincount(index, weights=positions == label, minlength=bins)
    return Reliability(edges, counts, predicted, observed)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
