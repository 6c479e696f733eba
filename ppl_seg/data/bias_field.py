"""The smooth multiplicative bias field of a scan, by SimpleITK's N4 (Tustison et al., IEEE TMI 2010)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

_COARSE = 4.0  # mm: voxels that the field is fitted to
_ITERATIONS = (50, 50, 50, 30)  # of each level; control points are twice as close at the next
_FEWEST = 1000  # voxels of the region on the coarse grid; fewer do not tell a field from anatomy


def log_bias_field(intensities: np.ndarray, spacing: Sequence[float], region: np.ndarray) -> np.ndarray:
    """The logarithm of the field, float32 (X, Y, Z): intensities / exp(field) are without it.

    Args:
        intensities: (X, Y, Z). spacing: mm.
        region: bool, (X, Y, Z), where the field is fitted, a brain: what lies around it is dark or bright for other
            reasons. Voxels ≤ 0 do not count. Beyond it the field goes on smoothly; where it is too small, it is 0.
    """
    steps = [max(1, round(_COARSE / size)) for size in spacing]
    starts = [step // 2 for step in steps]
    # by slicing: what SimpleITK's Shrink takes hangs on rounded positions, and the field on which voxels are taken
    some = tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))
    counts = (region & (intensities > 0))[some]
    if counts.sum() < _FEWEST:
        return np.zeros(intensities.shape, np.float32)
    whole = _image(intensities, spacing, (0, 0, 0))
    coarse = [n * size for n, size in zip(steps, spacing, strict=True)]
    origin = [n * size for n, size in zip(starts, spacing, strict=True)]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)  # sums in one order: the same scan gives the same field
    n4.SetMaximumNumberOfIterations(_ITERATIONS)
    n4.SetConvergenceThreshold(0)  # a voxel more or less in the region must not stop it elsewhere
    mask = sitk.Cast(_image(counts, coarse, origin), sitk.sitkUInt8)
    n4.Execute(_image(intensities[some], coarse, origin), mask)
    return np.asarray(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(whole)).T, dtype=np.float32)


def _image(data: np.ndarray, spacing: Sequence[float], origin: Sequence[float]) -> sitk.Image:
    """As SimpleITK has it, axes in C order reversed; the axes point along themselves."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T, dtype=np.float32))
    image.SetSpacing([float(size) for size in spacing])
    image.SetOrigin([float(place) for place in origin])
    return image
