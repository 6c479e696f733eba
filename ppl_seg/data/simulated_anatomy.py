"""Persons simulated from label maps: deformed, mirrored with the sides swapped, their fluid spaces grown."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ppl_seg.data.augmentation import UNKNOWN, Deformation, random_positions
from ppl_seg.data.labels import FLUID, LabelTable
from ppl_seg.data.mirror import mirror_plane, other_side

# Label maps lie where affine registration put them, and so will scans; people differ by more than these maps do.
DEFORMATION = Deformation(rotation=3.0, scale=0.04, shear=0.02, translation=2.0, elastic=2.0, elastic_spacing=16.0)
# Fluid spaces grow with age, some more than others, and push aside what is around: of a prior's persons few are old.
GROWTHS, GROWTH, REACH = 12, (-0.1, 0.6), (6.0, 12.0)  # how many places; by what share; sd, mm
LARGEST = 0.8  # share of all that are near: less than 1, so that nothing folds
STRIDE = 4  # voxels between which the growth is interpolated


class AnatomySimulator:
    """Draws label maps from label maps.

    Half of them are mirrored, sides swapped, where labels come in pairs that lie like mirror images.

    Args:
        label_maps: positions, (n, X, Y, Z), UNKNOWN where a map shows nothing. table: their labels. spacing: mm.
    """

    def __init__(self, label_maps: Tensor, table: LabelTable, spacing: float) -> None:
        self.label_maps, self.voxel = label_maps, spacing
        self.deformation = DEFORMATION.in_voxels(spacing)
        self.other_side = other_side(table)
        self.mirror = mirror_plane(label_maps, self.other_side, spacing)
        fluid = torch.tensor([kind.lower() == FLUID for kind in table.class_names])
        around = torch.tensor([label in table.outer_fluid for label in range(len(table))])
        self.fluid_spaces = fluid[torch.tensor(table.class_of_label)] & ~around

    def draw(self, box: tuple[slice, ...], generator: torch.Generator) -> Tensor:
        """The box of one map, chosen, mirrored or not, and deformed: long, UNKNOWN where it shows nothing."""
        label_map = self.label_maps[int(torch.randint(len(self.label_maps), (), generator=generator))]
        size = torch.tensor(label_map.shape)
        places = random_positions(1, label_map.shape, generator, self.deformation, box)[0]
        mirrored = bool(torch.rand((), generator=generator) < 0.5) and self.mirror is not None
        if mirrored and self.mirror is not None:
            normal, offset = self.mirror
            places = places - 2 * (places @ normal - offset).unsqueeze(1) * normal
        shape = [len(range(side.start, side.stop)) for side in box]
        places = self._grown(places.view(*shape, 3), label_map, generator).view(-1, 3)
        nearest = places.round().long()
        inside = ((nearest >= 0) & (nearest < size)).all(1)
        x, y, z = torch.minimum(nearest.clamp(min=0), size - 1).unbind(1)
        labels = torch.where(inside, label_map[x, y, z].long(), UNKNOWN)
        if mirrored:
            labels = torch.where(labels == UNKNOWN, UNKNOWN, self.other_side[labels])
        return labels.view(shape)

    def _grown(self, places: Tensor, label_map: Tensor, generator: torch.Generator) -> Tensor:
        """Where to look, (X, Y, Z, 3), when the fluid spaces have grown at a few places, or shrunk."""
        coarse_map = label_map[::2, ::2, ::2].long()
        candidates = (self.fluid_spaces[coarse_map] & (coarse_map != UNKNOWN)).nonzero()
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
