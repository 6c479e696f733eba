"""A scan's own voxels in blocks of neighbours, and where they lie on the prior's grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ppl_seg.models.interpolation import unravel

BLOCK = 4096  # voxels: a block's numbers stay in cache


def blocks(shape: Sequence[int], steps: Sequence[float]) -> Iterator[tuple[slice, ...]]:
    """The boxes of about `BLOCK` voxels that an array falls into, as even as they get in the world.

    steps: length of a voxel along each axis.
    """
    sides = list(shape)
    while math.prod(sides) > BLOCK:
        longest = max(range(len(sides)), key=lambda axis: sides[axis] * steps[axis] if sides[axis] > 1 else 0)
        sides[longest] = -(-sides[longest] // 2)
    starts = [range(0, n, side) for n, side in zip(shape, sides, strict=True)]
    for start in itertools.product(*starts):
        yield tuple(slice(first, first + side) for first, side in zip(start, sides, strict=True))


def positions(voxels: Tensor, shape: Sequence[int], matrix: np.ndarray) -> Tensor:
    """(V, 3) float64: where `matrix` takes the voxels of an array, given by flat index (V,)."""
    affine = torch.as_tensor(np.asarray(matrix, dtype=np.float64), device=voxels.device)
    return unravel(voxels, shape).double() @ affine[:3, :3].T + affine[:3, 3]
