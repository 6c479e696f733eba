"""Surface distances the plain way: SciPy's erosion and distance transform on the whole arrays."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def boundary(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a face neighbour outside it (beyond the array is outside)."""
    return mask & ~ndimage.binary_erosion(mask, border_value=0)


def directed_distances(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """mm from each boundary voxel of `first` to the nearest one of `second`."""
    return ndimage.distance_transform_edt(~boundary(second), sampling=spacing)[boundary(first)]


def hd95(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> float:
    """The larger of the two directed 95th percentiles."""
    there, back = directed_distances(first, second, spacing), directed_distances(second, first, spacing)
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def average_distance(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Mean over the voxels of both boundaries."""
    there, back = directed_distances(first, second, spacing), directed_distances(second, first, spacing)
    return float(np.concatenate([there, back]).mean())
