"""Linear interpolation of many volumes at the same places, as weighted sums of the rows of a table.

Which rows, and how much of each, holds for every draw and label.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .voxels import EVERYWHERE

Rows = tuple[Tensor, Tensor]  # index (V, T) int32 and weight (V, T): which rows of a table, and how much of each


def linear_rows(places: Tensor, shape: Sequence[int], kernels: Sequence[Sequence[float]] = ()) -> Rows:
    """Multilinear interpolation of an array at `places` (V, axes), fractional voxels; beyond the edge, the edge.

    kernels: weights (odd number) that the array is convolved with along each axis before that, edges continued.
    """
    index = places.new_zeros(len(places), 1, dtype=torch.int32)
    weight = places.new_ones(len(places), 1)
    for axis, size in enumerate(shape):
        at = places[:, axis].clamp(0, size - 1)
        low = at.floor().clamp(max=max(size - 2, 0))
        rest = at - low
        kernel = kernels[axis] if kernels and size > 1 else (1.0,)
        radius = len(kernel) // 2
        taps = torch.tensor([0.0, *kernel, 0.0], dtype=places.dtype, device=places.device)
        own = (1 - rest[:, None]) * taps[1:] + rest[:, None] * taps[:-1]
        steps = torch.arange(-radius, radius + 2, device=places.device)
        if not bool(rest.any()):
            own, steps = own[:, :-1], steps[:-1]  # whole voxels
        chosen = (low[:, None].int() + steps.int()).clamp(0, size - 1)
        index = (index[:, :, None] * size + chosen[:, None]).flatten(1)
        weight = (weight[:, :, None] * own[:, None]).flatten(1)
    return index, weight


def between(values: Tensor, offset: Sequence[float], planes: slice = EVERYWHERE) -> Tensor:
    """Values (..., *grid) at places moved by less than a voxel along each axis, linear; beyond the edge, the edge.

    planes: across the last axis, that are wanted.
    """
    for axis, part in zip(range(-1, -1 - len(offset), -1), reversed(offset), strict=True):
        places = torch.arange(values.shape[axis], device=values.device)
        here = places[planes] if axis == -1 else places
        beside = (here + (1 if part > 0 else -1)).clamp(0, len(places) - 1)
        values = values.index_select(axis, here).lerp_(values.index_select(axis, beside), abs(part))
    return values


def compact(index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that an index into rows touches, rising (N,), and the index into those."""
    first, last = index.aminmax()
    moved = (index - first).long()
    touched = torch.zeros(int(last - first) + 1, dtype=torch.bool, device=index.device)
    touched[moved.flatten()] = True
    rows = touched.nonzero()[:, 0]
    place = torch.empty(len(touched), dtype=torch.int32, device=index.device)
    place[rows] = torch.arange(len(rows), dtype=torch.int32, device=index.device)
    return rows + first, place[moved]


def weighted_rows(tables: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Σ_t weight_vt · row index_vt of each of the tables (M, N, G): (M, V, G).

    weight: (V, T) for all tables, or (M, V, T).
    """
    count, rows, _ = tables.shape
    offset = rows * torch.arange(count, dtype=torch.int32, device=index.device)
    everywhere = (index + offset[:, None, None]).flatten(0, 1)
    weights = weight.expand(count, *index.shape).flatten(0, 1)
    summed = functional.embedding_bag(everywhere, tables.flatten(0, 1), mode="sum", per_sample_weights=weights)
    return summed.unflatten(0, (count, len(index)))


def unravel(voxels: Tensor, shape: Sequence[int]) -> Tensor:
    """Places (V, axes) of flat indices (V,)."""
    places = []
    for size in reversed(shape):
        places.append(voxels % size)
        voxels = voxels // size
    return torch.stack(places[::-1], -1)


def ravel(places: Tensor, shape: Sequence[int]) -> Tensor:
    """Flat index (V,) of whole places (V, axes)."""
    flat = torch.zeros_like(places[:, 0])
    for axis, size in enumerate(shape):
        flat = flat * size + places[:, axis]
    return flat
