"""Some of a grid's voxels: those that a scan observes are often a third, and the others take part in nothing."""

from __future__ import annotations

import torch
from torch import Tensor

Voxels = slice | Tensor  # a slice, or flat indices (n,), each once
EVERYWHERE = slice(None)


def seen_by_any(observed: Tensor) -> Voxels:
    """The voxels that any scan and channel observes, of (..., J); a slice, which is quicker, where all are."""
    seen = observed.flatten(0, -2).any(0)
    if seen.is_meta or bool(seen.all()):
        return EVERYWHERE
    return seen.nonzero()[:, 0]


def every_nth(voxels: Voxels, part: slice, total: int, like: Tensor) -> Tensor:
    """Those of the voxels, of `total` in all, that a slice with a step takes, flat, on a tensor's device."""
    if isinstance(voxels, slice):
        voxels = torch.arange(total, device=like.device)[voxels]
    return voxels[part]


def take(values: Tensor, voxels: Voxels) -> Tensor:
    """(..., J) at some of the voxels."""
    if isinstance(voxels, slice):
        return values[..., voxels]
    return values.gather(-1, voxels.expand(*values.shape[:-1], -1))  # twice as fast as an index


def put(values: Tensor, voxels: Voxels, new: Tensor) -> None:
    """Overwrite (..., J) at some of the voxels."""
    if isinstance(voxels, slice):
        values[..., voxels] = new
    else:
        values.scatter_(-1, voxels.expand(new.shape), new)
