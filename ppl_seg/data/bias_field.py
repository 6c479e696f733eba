"""The smooth multiplicative bias field of a scan, by SimpleITK's N4 (Tustison et al., IEEE TMI 2010)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

_COARSE = 4.0  # mm: voxels that the field is fitted to
_ITERATIONS = (50, 50, 50, 30)  # at most, of each level; control points are twice as close at the next
_FEWEST = 1000  # voxels of the region on the coarse grid; fewer do not tell a field from anatomy


def log_bias_field(intensities: np.ndarray, spacing: Sequence[float], region: np.ndarray) -> np.ndarray:
    """The logarithm of the field, float32 (X, Y, Z): intensities / exp(field) are without it.

    Args:
        intensities: (X, Y, Z). spacing: mm.
        region: bool, (X, Y, Z), where the field is fitted, a brain: what lies around it is dark or bright for other
            reasons. Voxels ≤ 0 do not count. Beyond it the field goes on smoothly; where it is too small, it is 0.
    """
    steps = [max(1, round(_COARSE / size)) for size in spacing]
    region = region & (intensities > 0)
    scan = sitk.GetImageFromArray(np.ascontiguousarray(intensities.T, dtype=np.float32))
    mask = sitk.GetImageFromArray(np.ascontiguousarray(region.T, dtype=np.uint8))
    for image in (scan, mask):
        image.SetSpacing([float(size) for size in spacing])
    coarse = sitk.Shrink(mask, steps)
    if sitk.GetArrayViewFromImage(coarse).sum() < _FEWEST:
        return np.zeros(intensities.shape, np.float32)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)  # sums in one order: the same scan gives the same field
    n4.SetMaximumNumberOfIterations(_ITERATIONS)
    n4.Execute(sitk.Shrink(scan, steps), coarse)
    return np.asarray(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(scan)).T, dtype=np.float32)
