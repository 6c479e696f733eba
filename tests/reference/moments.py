"""The M-step by other people's code: scikit-learn's moments for each scan, class and channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.mixture._gaussian_mixture import _estimate_gaussian_parameters
from torch import Tensor


def sklearn_moments(
    responsibilities: Tensor, scan: Tensor, observed: Tensor, components: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean (B,Q,C), sd (B,Q,C), weight within the class (B,Q) from (B,Q,J), (B,C,J), (B,C,J).

    Channel by channel, since each has its own observed voxels; weights from the voxels with any channel.
    """
    B, C, _ = scan.shape
    Q = responsibilities.shape[1]
    mean, sd, weight = np.zeros((B, Q, C)), np.zeros((B, Q, C)), np.zeros((B, Q))
    for b in range(B):
        resp = responsibilities[b].T.double().numpy()
        for c in range(C):
            keep = observed[b, c].numpy()
            x = scan[b, c].double().numpy()[keep, None]
            _, means, variances = _estimate_gaussian_parameters(x, resp[keep], 0.0, "diag")
            mean[b, :, c], sd[b, :, c] = means[:, 0], np.sqrt(variances[:, 0])
        anywhere = observed[b].any(0).numpy()
        counts, _, _ = _estimate_gaussian_parameters(np.zeros((anywhere.sum(), 1)), resp[anywhere], 0.0, "diag")
        start = 0
        for k in components:
            weight[b, start : start + k] = counts[start : start + k] / counts[start : start + k].sum()
            start += k
    return mean, sd, weight
