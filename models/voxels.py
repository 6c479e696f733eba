"""Some of a grid's voxels: those that a scan observes are often a third, and the others take part in nothing."""

from __future__ import annotations

from torch import Tensor

Voxels = slice | Tensor  # a slice, or flat indices (n,), each once
EVERYWHERE = slice(None)


def seen_by_any(observed: Tensor, part: slice | None = None) -> Voxels:
    """The voxels that any scan and channel observes, of (..., J); a slice, which is quicker, where all are.

    part: which of them, in their order; None takes all.
    """
    seen = observed.flatten(0, -2).any(0)
    if part is None and (seen.is_meta or bool(seen.all())):
        return EVERYWHERE
    voxels = seen.nonzero()[:, 0]
    return voxels if part is None else voxels[part]


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
