"""Mirror images of label maps: which label is on the other side, and where the plane between the sides lies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ppl_seg.data.augmentation import UNKNOWN
from ppl_seg.data.labels import LabelTable, other_sides

TOLERANCE = 10.0  # mm between a label's mirror image and its namesake on the other side
SMALLEST = 100.0  # mm³ of a label, for its place to count


def other_side(table: LabelTable) -> Tensor:
    """(M,) the position of each label's mirror image: its namesake on the other side, or itself."""
    return torch.tensor(other_sides(table))


def mirror_plane(label_maps: Tensor, other: Tensor, spacing: float) -> tuple[Tensor, float] | None:
    """Unit normal (3,) and offset of the plane between the sides, voxels: x · normal = offset.

    None where no labels come in pairs, or one's mirror image lies elsewhere than its namesake on the other side, as
    where maps show a single side.

    Args:
        label_maps: positions, (n, X, Y, Z). other: see `other_side`. spacing: mm.
    """
    counts, centres = centroids(label_maps, len(other))
    there = (counts * spacing**3 > SMALLEST * len(label_maps)).index_fill(0, torch.tensor(0), False)
    paired = there & there[other] & (other > torch.arange(len(other)))
    if not bool(paired.any()):
        return None
    apart, weight = (centres[other] - centres)[paired], counts[paired]
    # which side comes first in the table is not said
    apart = apart * (apart @ apart[weight.argmax()]).sign().unsqueeze(1)
    normal = functional.normalize(weight @ functional.normalize(apart, dim=1), dim=0)
    offset = float(weight @ (0.5 * (centres + centres[other])[paired] @ normal) / weight.sum())
    image = centres - 2 * (centres @ normal - offset).unsqueeze(1) * normal
    astray = (image - centres[other]).norm(dim=1) * spacing > TOLERANCE
    return None if bool((astray & there).any()) else (normal, offset)


def reflection(normal: Tensor, offset: float) -> np.ndarray:
    """(4, 4), voxel → its mirror image, of the plane x · normal = offset."""
    matrix, across = np.eye(4), normal.double().numpy()
    matrix[:3, :3] -= 2 * np.outer(across, across)
    matrix[:3, 3] = 2 * offset * across
    return matrix


def centroids(label_maps: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Voxels of each label in all maps, (M,), and its centroid, voxels, (M, 3)."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in label_maps.shape[1:]), indexing="ij")
    totals = torch.zeros(4, num_labels)
    for one in label_maps:
        known = one != UNKNOWN
        labels = one[known].long()
        totals[0] += torch.bincount(labels, minlength=num_labels)
        for total, axis in zip(totals[1:], axes, strict=True):
            total += torch.bincount(labels, axis[known], minlength=num_labels)
    return totals[0], (totals[1:] / totals[0].clamp(min=1)).T
