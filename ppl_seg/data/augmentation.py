"""Label maps deformed at random: a prior is learned from tens of maps, which small deformations make many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

UNKNOWN = -1


@dataclass(frozen=True)
class Deformation:
    """How much label maps are deformed; standard deviations, millimetres where not said otherwise."""

    rotation: float = 4.0  # degrees, in each plane
    scale: float = 0.05  # of the logarithm, along each axis
    shear: float = 0.03  # off-diagonal elements
    translation: float = 1.0
    elastic: float = 0.8
    elastic_spacing: float = 10.0  # between the control points of the elastic displacement

    def in_voxels(self, spacing: float) -> Deformation:
        """The same deformation of a grid with voxels of `spacing` mm, lengths in voxels."""
        lengths = {"translation": self.translation, "elastic": self.elastic, "elastic_spacing": self.elastic_spacing}
        return replace(self, **{name: length / spacing for name, length in lengths.items()})


def deform(
    labels: torch.Tensor,
    observed: torch.Tensor,
    generator: torch.Generator,
    spacing: float = 1.0,
    deformation: Deformation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label map of a batch under its own random affine map and smooth displacement: (labels, observed).

    `labels` (B, *grid) integer, `observed` (B, 1, *grid) bool, 2-D or 3-D, `spacing` mm; same shapes and types out. A
    voxel gets the label with the largest weight when one-hot maps are interpolated linearly, which keeps
    borders smooth. Voxels that come from beyond the grid, or mostly from unobserved ones, are label 0,
    unobserved. Deterministic given `generator`, whose device need not be the labels'.
    """
    deformation = (deformation or Deformation()).in_voxels(spacing)
    batch, *grid = labels.shape
    active = [size for size in grid if size > 1]  # an axis of one voxel stays as it is
    if len(active) < 2:
        raise ValueError(f"expected a grid with two or three axes of more than one voxel, got {grid}")
    places = random_positions(batch, active, generator, deformation).to(labels.device)
    known = torch.where(observed.reshape(batch, *active), labels.reshape(batch, *active).to(torch.int16), UNKNOWN)
    drawn = _interpolate_labels(known, places)
    return drawn.clamp(min=0).to(labels.dtype).reshape(labels.shape), (drawn != UNKNOWN).reshape(observed.shape)


def _interpolate_labels(labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The label with the largest linear weight, the smallest of equals, (B, J), at places (B, J, d) in voxels.

    UNKNOWN where less than half of the weight is known. Only voxels whose corners differ need the weights: this
    takes half the time of interpolating one-hot maps, for any number of labels.
    """
    grid = labels.shape[1:]
    rim = functional.pad(labels, [1] * (2 * len(grid)), value=UNKNOWN).flatten(1)
    size = torch.tensor(grid, device=places.device)
    places = torch.minimum(places.clamp(min=-1), size)
    low = torch.minimum(places.floor().long(), size - 1)
    strides = [math.prod(n + 2 for n in grid[axis + 1 :]) for axis in range(len(grid))]
    first = ((low + 1) * torch.tensor(strides, device=places.device)).sum(-1)
    steps = list(itertools.product((0, 1), repeat=len(grid)))
    corners = torch.stack([rim.gather(1, first + sum(map(int.__mul__, step, strides))) for step in steps])
    result = corners[0].clone()
    mixed = (corners != result).any(0)
    candidates, fraction = corners[:, mixed], (places - low)[mixed].unbind(-1)
    shares = torch.stack(
        [torch.stack([f if s else 1 - f for f, s in zip(fraction, step, strict=True)]) for step in steps]
    )
    weights = shares.prod(1)
    weights = weights * (candidates != UNKNOWN)
    winner, best = torch.full_like(candidates[0], UNKNOWN), torch.zeros_like(weights[0])
    for label in candidates:
        total = ((candidates == label) * weights).sum(0)
        better = (total > best) | (total == best) & (label < winner)
        winner, best = torch.where(better, label, winner), torch.where(better, total, best)
    result[mixed] = torch.where(weights.sum(0) >= 0.5, winner, UNKNOWN)
    return result


def random_positions(
    batch: int,
    grid: Sequence[int],
    generator: torch.Generator,
    deformation: Deformation,
    box: Sequence[slice] | None = None,
) -> torch.Tensor:
    """(B, J, d) where in the original each voxel is looked up, all lengths in voxels; of a box of the grid alone."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    d = len(grid)
    linear = torch.eye(d, device=generator.device).repeat(batch, 1, 1)
    for i, j in itertools.combinations(range(d), 2):
        angle = math.radians(deformation.rotation) * normal(batch)
        plane = torch.eye(d, device=generator.device).repeat(batch, 1, 1)
        plane[:, i, i] = plane[:, j, j] = angle.cos()
        plane[:, i, j], plane[:, j, i] = -angle.sin(), angle.sin()
        linear = linear @ plane
    linear = linear @ torch.diag_embed((deformation.scale * normal(batch, d)).exp())
    linear = linear @ (torch.eye(d, device=generator.device) + deformation.shear * normal(batch, d, d).tril(-1))
    centre = (torch.tensor(grid, device=generator.device) - 1) / 2
    sides = box or [slice(None)] * d
    axes = [torch.arange(n, device=generator.device)[side] - c for n, c, side in zip(grid, centre, sides, strict=True)]
    around = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, d)
    shift = deformation.translation * normal(batch, 1, d)
    moved = around @ linear.transpose(1, 2) + centre + shift
    return moved + _smooth_field(batch, grid, normal, deformation, sides).reshape(batch, -1, d)


def _smooth_field(
    batch: int,
    grid: Sequence[int],
    normal: Callable[..., torch.Tensor],
    deformation: Deformation,
    box: Sequence[slice],
) -> torch.Tensor:
    """(B, *box, d) random displacement: cubic B-splines over a coarse lattice of normal control points."""
    bases = [_spline_basis(n, deformation.elastic_spacing)[side] for n, side in zip(grid, box, strict=True)]
    field = deformation.elastic * normal(batch, *(basis.shape[1] for basis in bases), len(grid))
    for basis in bases:
        # contracts the first lattice axis and puts the grid axis behind the others
        field = torch.tensordot(field, basis.to(field.device), dims=([1], [1]))
    d = len(grid)
    return field.permute(0, *range(2, 2 + d), 1)


def _spline_basis(size: int, spacing: float) -> torch.Tensor:
    """(size, control points) weights of a cubic B-spline, scaled to keep the variance of control points."""
    points = max(2, math.ceil((size - 1) / spacing) + 1)
    step = (size - 1) / (points - 1)
    place = torch.arange(size, dtype=torch.float64)[:, None] / step
    distance = (place - torch.arange(-1, points + 1, dtype=torch.float64)[None]).abs()
    weights = torch.where(
        distance < 1,
        2 / 3 - distance**2 + distance**3 / 2,
        (2 - distance).clamp(min=0) ** 3 / 6,
    )
    return (weights / (weights**2).sum(1).mean().sqrt()).float()
