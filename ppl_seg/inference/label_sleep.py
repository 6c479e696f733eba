"""The label network's training on simulated scans ("sleep"): their labels are known, and no scan is needed.

Label maps of the prior are deformed and drawn as scans of random contrast. Minimising the cross-entropy of such scans'
labels is minimising KL(p(s|x) ‖ q(s|x)) over scans of the program with these label maps as its shapes, as in
wake-sleep (Hinton et al., Science 1995).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ppl_seg.data.augmentation import Deformation, random_positions
from ppl_seg.data.simulated_scans import ScanSimulator

from .label_training import PATCH
from .task import Batch, Task

# Label maps lie where affine registration put them, and so will scans; people differ by more than these maps do.
DEFORMATION = Deformation(rotation=3.0, scale=0.04, shear=0.02, translation=2.0, elastic=2.0, elastic_spacing=16.0)
# Fluid spaces grow with age, some more than others, and push aside what is around: of a prior's persons few are old.
GROWTHS, GROWTH, REACH = 12, (-0.1, 0.6), (6.0, 12.0)  # how many places; by what share; sd, mm
LARGEST = 0.8  # share of all that are near: less than 1, so that nothing folds
STRIDE = 4  # voxels between which the growth is interpolated
OVERLAP = 0.5  # weight of the soft Dice coefficient, without which small structures are learned last
FEWEST = 20.0  # voxels of a structure in a patch, for it to count there


class SimulatedScanTask(Task):
    """Patches of scans simulated from label maps of half the grid's voxel size, with the labels of each voxel.

    Args:
        label_maps: positions, (n, X, Y, Z), twice as many along each axis as the grid has.
        log_location: what the network's scores are added to, (M, *grid). spacing: of the grid, mm.
        simulator: draws the scans. left_right: the axis of the grid from side to side.
    """

    def __init__(
        self, label_maps: Tensor, log_location: Tensor, spacing: float, simulator: ScanSimulator, left_right: int = 0
    ) -> None:
        self.label_maps, self.log_location = label_maps, log_location
        self.simulator, self.left_right = simulator, left_right
        self.grid = tuple(n // 2 for n in label_maps.shape[1:])
        self.deformation, self.voxel = DEFORMATION.in_voxels(spacing / 2), spacing / 2

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """A patch of one label map, chosen, mirrored or not, deformed and drawn at random."""
        chosen = int(torch.randint(len(self.label_maps), (), generator=generator))
        starts = [int(torch.randint(max(0, n - PATCH) + 1, (), generator=generator)) for n in self.grid]
        box = tuple(slice(start, min(n, start + PATCH)) for start, n in zip(starts, self.grid, strict=True))
        labels = self._deformed(self.label_maps[chosen], box, generator)
        scan, observed, labels = self.simulator.draw(labels, generator)
        targets = label_shares(labels, len(self.log_location)).unsqueeze(0)
        there = self.log_location[(slice(None), *box)]
        device = there.device
        args = scan.to(device), observed.to(device), there, targets.to(device), box
        return Batch(args, 1, max(1, int(observed.sum())))

    def _deformed(self, label_map: Tensor, box: tuple[slice, ...], generator: torch.Generator) -> Tensor:
        """The box of a label map, of its nearest labels, long, twice as many voxels along each axis."""
        size = torch.tensor(label_map.shape)
        sides = [slice(2 * side.start, 2 * side.stop) for side in box]
        places = random_positions(1, label_map.shape, generator, self.deformation, sides)[0]
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        if mirrored:
            places[:, self.left_right] = size[self.left_right] - 1 - places[:, self.left_right]
        shape = [len(range(side.start, side.stop)) for side in sides]
        places = self._grown(places.view(*shape, 3), label_map, generator).view(-1, 3)
        nearest = places.round().long()
        inside = ((nearest >= 0) & (nearest < size)).all(1)
        x, y, z = torch.minimum(nearest.clamp(min=0), size - 1).unbind(1)
        labels = torch.where(inside, label_map[x, y, z].long(), 0)
        if mirrored:
            labels = self.simulator.other_side[labels]
        return labels.view(shape)

    def _grown(self, places: Tensor, label_map: Tensor, generator: torch.Generator) -> Tensor:
        """Where to look, (X, Y, Z, 3), when the fluid spaces have grown at a few places, or shrunk."""
        candidates = self.simulator.fluid_spaces[label_map[::2, ::2, ::2].long()].nonzero()
        if not len(candidates):
            return places
        centres = 2.0 * candidates[torch.randint(len(candidates), (GROWTHS,), generator=generator)]
        share, reach = (low + (high - low) * torch.rand(GROWTHS, generator=generator) for low, high in (GROWTH, REACH))
        share = share * torch.rand((), generator=generator)  # in one person much, in another little
        coarse = places[::STRIDE, ::STRIDE, ::STRIDE]
        away = coarse.unsqueeze(-2) - centres
        near = share * (-0.5 * (away * self.voxel / reach.unsqueeze(-1)).square().sum(-1)).exp()
        near = near * (LARGEST / near.abs().sum(-1, keepdim=True).clamp(min=LARGEST))
        shift = -(near.unsqueeze(-1) * away).sum(-2).movedim(-1, 0)
        # the coarse places are the first of every four: beyond the last one nothing is interpolated
        padded = functional.pad(shift.unsqueeze(0), (0, 1) * 3, mode="replicate")
        size = [STRIDE * n + 1 for n in shift.shape[1:]]
        fine = functional.interpolate(padded, size, mode="trilinear", align_corners=True)[0]
        return places + fine[(slice(None), *(slice(n) for n in places.shape[:3]))].movedim(0, -1)


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
