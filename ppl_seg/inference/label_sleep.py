"""The label network's training on simulated scans ("sleep"): their labels are known, and no scan is needed.

Label maps of the prior are deformed and drawn as scans of random contrast. Minimising the cross-entropy of such scans'
labels is minimising KL(p(s|x) ‖ q(s|x)) over scans of the program with these label maps as its shapes, as in
wake-sleep (Hinton et al., Science 1995).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .label_training import PATCH
from .task import Batch, Task

Simulate = Callable[[tuple[slice, ...], torch.Generator], tuple[Tensor, Tensor, Tensor]]
OVERLAP = 0.5  # weight of the soft Dice coefficient, without which small structures are learned last
FEWEST = 20.0  # voxels of a structure in a patch, for it to count there


class SimulatedScanTask(Task):
    """Patches of simulated scans, with the labels of each voxel.

    Args:
        simulate: for a box of voxels half as large as the grid's, draws the labels in it, positions, and at half as
            many voxels along each axis the scan and where it is observed, (1, 1, ...): scan, observed, labels.
        log_location: what the network's scores are added to, (M, *grid).
    """

    def __init__(self, simulate: Simulate, log_location: Tensor) -> None:
        self.simulate, self.log_location = simulate, log_location

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """A patch somewhere in the grid."""
        grid = self.log_location.shape[1:]
        starts = [int(torch.randint(max(0, n - PATCH) + 1, (), generator=generator)) for n in grid]
        box = tuple(slice(start, min(n, start + PATCH)) for start, n in zip(starts, grid, strict=True))
        halves = tuple(slice(2 * side.start, 2 * side.stop) for side in box)
        scan, observed, labels = self.simulate(halves, generator)
        targets = label_shares(labels, len(self.log_location)).unsqueeze(0)
        there = self.log_location[(slice(None), *box)]
        device = there.device
        args = scan.to(device), observed.to(device), there, targets.to(device), box
        return Batch(args, 1, max(1, int(observed.sum())))


def label_shares(labels: Tensor, num_labels: int) -> Tensor:
    """(M, X/2, Y/2, Z/2) of (X, Y, Z): how much of each 2 x 2 x 2 voxels has each label."""
    x, y, z = (n // 2 for n in labels.shape)
    shares = torch.zeros(num_labels, x * y * z)
    eighth = shares.new_full((1, x * y * z), 1 / 8)
    for i, j, k in itertools.product((0, 1), repeat=3):
        shares.scatter_add_(0, labels[i::2, j::2, k::2].reshape(1, -1), eighth)
    return shares.view(num_labels, x, y, z)


class LabelOverlapLoss:
    """Cross-entropy of the observed voxels, and for each 1 − the soft Dice coefficient of the patch's structures."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The sum over observed voxels; the model has no part in it."""
        scan, observed, location, targets, box = args
        seen = observed.any(1)
        scores = guide(scan, observed, box)
        start = location.movedim(0, -1).expand(*seen.shape, -1)[seen]
        log_u = (scores.movedim(1, -1)[seen].float() + start).log_softmax(-1)
        wanted = targets.movedim(1, -1)[seen]
        loss: Tensor = -(wanted * log_u).sum()
        u = log_u.exp()
        present = wanted.sum(0) > FEWEST
        present[0] = False
        if bool(present.any()):
            dice = 2 * (u * wanted).sum(0) / (u.square() + wanted.square()).sum(0).clamp(min=1.0)
            loss = loss + OVERLAP * len(wanted) * (1 - dice[present]).mean()
        return loss
