"""Volumes brought from one grid to another by a matrix, output voxel to input voxel, in torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ppl_seg.data.grids import is_signed_permutation

_WHOLE = 1e-4  # voxels: a map this close to whole voxels at all corners only moves values
_FWHM = 2 * math.sqrt(2 * math.log(2))  # full width at half maximum of a Gaussian of sd 1


def resample(
    volume: torch.Tensor,
    matrix: np.ndarray,
    shape_out: Sequence[int],
    mode: str = "linear",
) -> torch.Tensor:
    """`volume` (C, *in) on another grid: (C, *out), three axes each.

    `matrix` (4, 4) takes an output voxel to an input voxel (fractional). `mode` is linear (floating
    volumes) or nearest (any type). Beyond the input's field of view, half a voxel around its outer centres,
    the value is 0; within it nothing is mixed with that. Whole-voxel shifts, flips and
    transpositions move the input's values without touching them. Where linear takes larger steps than the
    input's voxels, the input is first blurred by a Gaussian whose width makes up the difference (Cardoso et
    al., MICCAI 2015).
    """
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode {mode!r}: expected linear or nearest")
    if volume.ndim != 4 or len(shape_out) != 3:
        raise ValueError(f"expected a volume (C, X, Y, Z) and three sizes, got {tuple(volume.shape)}, {shape_out}")
    whole = whole_voxels(np.asarray(matrix), shape_out)
    if whole is not None:
        return _move(volume, whole, shape_out)
    if mode == "linear":
        if not volume.is_floating_point():
            raise ValueError(f"linear resampling of {volume.dtype}: convert to a floating type or use nearest")
        volume = _blur(volume, blur_kernels(matrix))
    position = _positions(matrix, shape_out, volume.device)
    sizes = torch.tensor(volume.shape[1:], device=volume.device, dtype=position.dtype)
    if mode == "nearest":
        x, y, z = torch.minimum((position + 0.5).floor().clamp(min=0), sizes - 1).long().unbind(-1)
        sampled = volume[:, x, y, z]
    else:
        # grid_sample wants (z, y, x) in [-1, 1]; an axis of one voxel has no extent, any place is that voxel
        scaled = (2 * position / (sizes - 1).clamp(min=1) - 1).flip(-1).to(volume.dtype)
        sampled = F.grid_sample(volume[None], scaled[None], mode="bilinear", padding_mode="border", align_corners=True)[
            0
        ]
    return torch.where(within(position, sizes), sampled, torch.zeros((), dtype=volume.dtype))


def resample_labels(labels: torch.Tensor, matrix: np.ndarray, shape_out: Sequence[int]) -> torch.Tensor:
    """Label positions (*in) integer ≥ 0 on another grid: (*out), 0 outside, three axes each.

    A voxel gets the commonest label in it: that of up to 3 x 3 x 3 places spread over it, as many along an
    axis as its step takes input voxels; the label at its centre decides between equals. Nearest neighbour
    alone would miss thin structures when the output's voxels are larger.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    centre = resample(labels[None], matrix, shape_out, mode="nearest")[0]
    steps = np.linalg.norm(matrix[:3, :3], axis=0)
    counts = [min(3, math.ceil(step - 0.05)) if n > 1 else 1 for step, n in zip(steps, shape_out, strict=True)]
    if max(counts) <= 1:
        return centre
    flat = centre.reshape(-1)
    votes = flat.new_zeros(int(labels.max()) + 1, len(flat), dtype=torch.float32)
    for place in itertools.product(*[[(k + 0.5) / n - 0.5 for k in range(n)] for n in counts]):
        shifted = matrix.copy()
        shifted[:3, 3] += matrix[:3, :3] @ np.array(place)
        sample = resample(labels[None], shifted, shape_out, mode="nearest").reshape(1, -1)
        votes.scatter_add_(0, sample.long(), torch.ones_like(votes[:1]))
    votes.scatter_add_(0, flat[None].long(), torch.full_like(votes[:1], 0.5))
    return votes.argmax(0).to(labels.dtype).reshape(tuple(shape_out))


def inside(matrix: np.ndarray, shape_in: Sequence[int], shape_out: Sequence[int]) -> torch.Tensor:
    """(*out) bool: the output voxels whose centre lies in the input's field of view."""
    position = _positions(matrix, shape_out, torch.device("cpu"))
    return within(position, torch.tensor(list(shape_in), dtype=position.dtype))


def _positions(matrix: np.ndarray, shape_out: Sequence[int], device: torch.device) -> torch.Tensor:
    """(*out, 3) float64 input voxel of each output voxel."""
    affine = torch.as_tensor(np.asarray(matrix, dtype=np.float64)[:3], device=device)
    x, y, z = (torch.arange(n, dtype=torch.float64, device=device) for n in shape_out)
    linear, offset = affine[:, :3], affine[:, 3]
    return (
        x[:, None, None, None] * linear[:, 0]
        + y[None, :, None, None] * linear[:, 1]
        + z[None, None, :, None] * linear[:, 2]
        + offset
    )


def within(position: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Which positions (..., 3) lie in the field of view of an array of those sizes, half a voxel around its centres."""
    return ((position >= -0.5 - _WHOLE) & (position <= sizes - 0.5 + _WHOLE)).all(-1)


def whole_voxels(matrix: np.ndarray, shape_out: Sequence[int]) -> np.ndarray | None:
    """`matrix` rounded, where it only permutes, flips and shifts by whole voxels; else None."""
    if not is_signed_permutation(matrix[:3, :3], 1e-2):
        return None
    rounded = np.round(matrix)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape_out], indexing="ij")).reshape(3, -1)
    difference = (matrix - rounded)[:3]
    gap = np.abs(difference[:, :3] @ corners + difference[:, 3:]).max()
    return rounded.astype(np.int64) if gap <= _WHOLE else None


def _move(volume: torch.Tensor, matrix: np.ndarray, shape_out: Sequence[int]) -> torch.Tensor:
    """Transposes, flips and shifts by slicing: no value is computed."""
    source = np.abs(matrix[:3, :3]).argmax(axis=0)  # the input axis that each output axis runs along
    volume = volume.permute(0, *(int(axis) + 1 for axis in source))
    result = volume.new_zeros((volume.shape[0], *shape_out))
    to_slices: list[slice] = [slice(None)]
    from_slices: list[slice] = [slice(None)]
    for axis in range(3):
        size, n_out = volume.shape[axis + 1], shape_out[axis]
        shift = int(matrix[source[axis], 3])
        if matrix[source[axis], axis] < 0:
            volume = volume.flip(axis + 1)
            shift = size - 1 - shift
        start, stop = max(0, -shift), min(n_out, size - shift)
        to_slices.append(slice(start, max(start, stop)))
        from_slices.append(slice(start + shift, max(start, stop) + shift))
    result[tuple(to_slices)] = volume[tuple(from_slices)]
    return result


def blur_kernels(matrix: np.ndarray) -> list[list[float]]:
    """Weights of the Gaussian that `resample` blurs its input with along each input axis; [1.0] where none is due."""
    kernels = []
    for step in np.linalg.norm(np.asarray(matrix)[:3, :3], axis=1):
        width = math.sqrt(max(step * step - 1, 0)) / _FWHM  # sd, voxels
        radius = math.ceil(3 * width) if width >= 0.1 else 0  # below, the kernel is a single voxel in float32
        weights = [math.exp(-0.5 * (k / width) ** 2) if k else 1.0 for k in range(-radius, radius + 1)]
        kernels.append([weight / sum(weights) for weight in weights])
    return kernels


def _blur(volume: torch.Tensor, kernels: Sequence[Sequence[float]]) -> torch.Tensor:
    """(C, X, Y, Z) convolved with a kernel an axis, edges continued."""
    for axis, weights in enumerate(kernels):
        if len(weights) == 1 or volume.shape[axis + 1] == 1:
            continue
        radius, size = len(weights) // 2, volume.shape[axis + 1]
        index = torch.arange(-radius, size + radius, device=volume.device).clamp(0, size - 1)
        padded = volume.index_select(axis + 1, index)
        volume = torch.zeros_like(volume)
        for k, weight in enumerate(weights):  # a few shifted sums: faster than a convolution so short
            volume.add_(padded.narrow(axis + 1, k, size), alpha=weight)
    return volume
