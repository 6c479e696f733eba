"""Linear registration of volumes by SimpleITK, on arrays and affines; what it calls LPS stays in this file.

A *world matrix* (4, 4) takes RAS mm of the fixed volume to RAS mm of the moving one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from ppl_seg.data.geometry import spacing_of
from ppl_seg.data.resampling import resample

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS mm to LPS mm and back
_SEED = 1
_SLACK = 1e-3  # of a voxel: rounding of affines must not add a slice
_LEAST_INFORMATION = 0.02  # nats; less is chance
_BINS_AROUND = 4  # bins that Mattes' histogram keeps free


@dataclass(frozen=True, eq=False)
class Volume:
    """`data` (X, Y, Z) float32 and `affine` (4, 4), voxel to RAS mm, of any orientation; shear is allowed."""

    data: np.ndarray
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        x, y, z = self.data.shape
        return x, y, z


@dataclass(frozen=True)
class Level:
    """A step of a registration: spacing (mm) of the moving volume, how many fixed voxels are used, iterations."""

    spacing: float
    points: int
    iterations: int = 100


def register(
    fixed: Volume,
    moving: Volume,
    start: np.ndarray,
    metric: str,
    level: Level,
    region: np.ndarray | None = None,
) -> np.ndarray:
    """Improve a world matrix by a turn and a shift (6 parameters; its own scales stay): gradient steps on a metric.

    Args:
        fixed, moving: what is compared; `fixed` is read at its own voxels only, so it may hold classes.
        start: world matrix.
        metric: `mutual-information` (Mattes) or `squares` (mean squared difference).
        level: the moving volume is brought to its spacing first. region: voxels of `fixed` that count, (X, Y, Z).

    Raises:
        RuntimeError: the volumes do not overlap at the start.
    """
    fixed_image, moving_image = _image(fixed), _image(coarse(moving, level.spacing))
    method = _method(metric, fixed, level, region)
    if region is not None:
        method.SetMetricFixedMask(_image(Volume(region.astype(np.uint8), fixed.affine)))
    centre = (_LPS @ _middle(fixed, region))[:3]
    step = sitk.Euler3DTransform()
    step.SetCenter(centre)  # the step is applied first, in the fixed volume's world
    method.SetMovingInitialTransform(_transform(start))
    method.SetInitialTransform(step, inPlace=True)
    # plain gradient descent stops in the valley where turns and stretches trade places; line searches go along it
    method.SetOptimizerAsConjugateGradientLineSearch(
        learningRate=1.0,
        numberOfIterations=level.iterations,
        convergenceMinimumValue=1e-6,
        convergenceWindowSize=10,
        lineSearchLowerLimit=0.0,
        lineSearchUpperLimit=5.0,
        lineSearchEpsilon=0.01,
        lineSearchMaximumIterations=20,
        estimateLearningRate=method.EachIteration,
        maximumStepSizeInPhysicalUnits=level.spacing / 2,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.Execute(fixed_image, moving_image)
    linear, shift = np.array(step.GetMatrix()).reshape(3, 3), np.array(step.GetTranslation())
    found = np.eye(4)
    found[:3, :3], found[:3, 3] = linear, shift + centre - linear @ centre
    return np.asarray(start @ _LPS @ found @ _LPS)


def write_transform(path: str | Path, world: np.ndarray) -> None:
    """Write a world matrix as SimpleITK reads it (.tfm): points of the prior → points of the scan, LPS mm."""
    sitk.WriteTransform(_transform(world), str(path))


def coarse(volume: Volume, spacing: float) -> Volume:
    """The volume with voxels of at least `spacing` mm along each axis, blurred as it should be for that."""
    factors = np.maximum(1.0, spacing / np.array(spacing_of(volume.affine)))
    factors[np.array(volume.shape) == 1] = 1.0
    if (factors < 1.05).all():
        return volume
    shape = [max(1, int(np.ceil(n / factor - _SLACK))) for n, factor in zip(volume.shape, factors, strict=True)]
    matrix = np.diag([*factors, 1.0])
    matrix[:3, 3] = (np.array(volume.shape) - 1) / 2 - factors * (np.array(shape) - 1) / 2
    data = torch.from_numpy(np.ascontiguousarray(volume.data, dtype=np.float32))[None]
    return Volume(resample(data, matrix, shape)[0].numpy(), volume.affine @ matrix)


def rigid_move(rotation: Rotation, middle: np.ndarray, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """(4, 4): a turn about a point (3,) and a shift (3,) after it, mm."""
    move = np.eye(4)
    move[:3, :3] = rotation.as_matrix()
    move[:3, 3] = middle - move[:3, :3] @ middle + shift
    return move


def gain(information: Callable[[np.ndarray], float], world: np.ndarray, away: float) -> float:
    """Information at a world matrix over the mean of that of six places `away` mm along the axes."""
    elsewhere = []
    for shift in np.concatenate([np.eye(3), -np.eye(3)]):
        move = np.eye(4)
        move[:3, 3] = away * shift
        elsewhere.append(information(world @ move))
    return information(world) / max(float(np.mean(elsewhere)), _LEAST_INFORMATION)


def centroid(weight: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(3,) RAS mm."""
    weight = weight.astype(np.float64)
    sums = [weight.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    voxel = [float(np.average(np.arange(len(along)), weights=along)) for along in sums]
    return np.asarray((affine @ [*voxel, 1.0])[:3])


def padded(volume: Volume, margin: float, value: float) -> Volume:
    """The volume with `margin` mm of `value` around it: a metric ignores what lies outside the moving volume."""
    widths = np.ceil(margin / np.array(spacing_of(volume.affine))).astype(int)
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ widths
    data = np.pad(volume.data, [(int(w), int(w)) for w in widths], constant_values=value)
    return Volume(data, affine)


def _method(metric: str, fixed: Volume, level: Level, region: np.ndarray | None) -> Any:
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # threads add up in the order in which they end: two runs would differ
    method.SetNumberOfWorkUnits(1)
    if metric == "mutual-information":
        classes = int(np.ptp(fixed.data)) + 1
        method.SetMetricAsMattesMutualInformation(max(32, classes + _BINS_AROUND))
    else:
        method.SetMetricAsMeanSquares()
    share = level.points / (fixed.data.size if region is None else max(1, int(region.sum())))
    if share < 1:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(share, _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([1])
    method.SetSmoothingSigmasPerLevel([0])
    return method


def _transform(world: np.ndarray) -> Any:
    """A world matrix as SimpleITK has it."""
    lps = _LPS @ world @ _LPS
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel())
    transform.SetTranslation(lps[:3, 3])
    return transform


def _image(volume: Volume) -> Any:
    """The volume as SimpleITK has it: axes in C order reversed, millimetres to the left, back, up."""
    data = volume.data
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    lps, spacing = _LPS @ volume.affine, np.array(spacing_of(volume.affine))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def _middle(fixed: Volume, region: np.ndarray | None) -> np.ndarray:
    """(4,) RAS mm of the middle of the region, or of the volume."""
    where = (np.array(fixed.shape) - 1) / 2 if region is None else np.argwhere(region).mean(0)
    return np.asarray(fixed.affine @ [*where, 1.0])
