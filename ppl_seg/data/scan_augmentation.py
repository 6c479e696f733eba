"""Scans and the label probabilities that go with them, deformed together; intensities changed by monotone maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ppl_seg.data.augmentation import Deformation, random_positions


@dataclass(frozen=True)
class Recolouring:
    """How much normalised intensities (0 to 1) are changed; standard deviations."""

    gamma: float = 0.25  # of the exponent's logarithm
    contrast: float = 0.1  # of the factor around 1
    brightness: float = 0.1
    bias: float = 0.1  # of the smooth multiplicative field's logarithm
    noise: float = 0.05  # of the noise's own sd, which is drawn for each scan


BIAS_POINTS = 3  # along each axis, between which the field is interpolated


def deform_scans(
    scan: Tensor,
    observed: Tensor,
    targets: Tensor,
    box: Sequence[slice],
    generator: torch.Generator,
    spacing: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A box of each scan under its own random affine map and smooth displacement: (scan, observed, targets).

    Args:
        scan: (B, C, *grid), 0 where unobserved. observed: bool, (B, C or 1, *grid). targets: label probabilities,
            (B, M, *grid). box: the part of the grid that is wanted. generator: on any device. spacing: mm.

    Interpolated linearly; a voxel is observed where most of its weight is.
    """
    shape = [len(range(n)[side]) for n, side in zip(scan.shape[2:], box, strict=True)]
    grid = [n for n in scan.shape[2:] if n > 1]  # an axis of one voxel stays as it is
    sides = [side for n, side in zip(scan.shape[2:], box, strict=True) if n > 1]
    places = random_positions(len(scan), grid, generator, Deformation().in_voxels(spacing), sides).to(scan.device)
    relative = ((2 * places + 1) / torch.tensor(grid, device=scan.device) - 1).flip(-1)  # as `grid_sample` wants them
    relative = relative.view(len(scan), *(n for n, m in zip(shape, scan.shape[2:], strict=True) if m > 1), len(grid))
    seen = observed.expand_as(scan).to(scan.dtype)
    volumes = torch.cat([scan * seen, seen, targets.to(scan.dtype)], 1)
    there = functional.grid_sample(volumes.reshape(*volumes.shape[:2], *grid), relative, align_corners=False)
    parts = [scan.shape[1], scan.shape[1], targets.shape[1]]
    moved, weight, labels = there.view(*there.shape[:2], *shape).split(parts, 1)
    inside = weight > 0.5
    total = labels.sum(1, keepdim=True)
    background = torch.zeros_like(labels)
    background[:, 0] = 1.0
    labels = torch.where(total > 0.5, labels / total.clamp(min=0.5), background)  # also beyond the grid
    return torch.where(inside, moved / weight.clamp(min=0.5), 0.0), inside, labels


def recolour(
    scan: Tensor, observed: Tensor, generator: torch.Generator, recolouring: Recolouring | None = None
) -> Tensor:
    """Normalised scans (B, C, *grid) through random monotone maps, with a bias field and noise; 0 where unobserved."""
    how = recolouring or Recolouring()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device).to(scan)

    dims = scan.dim() - 2
    one = (*scan.shape[:2], *[1] * dims)
    changed = scan.sign() * scan.abs().clamp(min=1e-4) ** (how.gamma * normal(*one)).exp()
    changed = changed * (1 + how.contrast * normal(*one)) + how.brightness * normal(*one)
    changed = changed * _smooth(how.bias * normal(*one[:2], *[BIAS_POINTS] * dims), scan.shape[2:]).exp()
    changed = changed + how.noise * normal(*one).abs() * normal(*scan.shape)
    return torch.where(observed, changed, 0.0)


def _smooth(points: Tensor, shape: Sequence[int]) -> Tensor:
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return functional.interpolate(points, tuple(shape), mode=mode, align_corners=True)


Augment = Callable[[Tensor, Tensor, Tensor, Sequence[slice], torch.Generator], tuple[Tensor, Tensor, Tensor]]


def augmentation(spacing: float) -> Augment:
    """Both, on a grid of voxels of `spacing` mm: what one training step does to its scans."""

    def augment(
        scan: Tensor, observed: Tensor, targets: Tensor, box: Sequence[slice], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        moved, seen, labels = deform_scans(scan, observed, targets, box, generator, spacing)
        return recolour(moved, seen, generator), seen, labels

    return augment
