"""p(z) p(s | z) as an atlas that z deforms: for few label maps, of which a decoder learns little.

z is white noise on control points. Filtered, it is a velocity field, smooth as the label maps taught; its flow carries
the location prior. The flow of a stationary velocity is invertible: nothing folds, and exp(−v) leads back
(Arsigny et al., MICCAI 2006; Ashburner, NeuroImage 2007).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from .decoders import Lattice, enlarge
from .interpolation import unravel
from .shape_prior import LabelPrior, gaussian_blur
from .voxels import EVERYWHERE, Voxels

SQUARINGS = 6  # of exp(v) = exp(v / 2⁶)^(2⁶)
BLUR = 0.5  # voxels, of the template: maps lie on each other; what is left of their differences is to stay visible
TRUST = 0.01  # of a template made for one scan: how often a label occurs beside what the label maps show
FLOOR = 1e-30  # of probabilities: a label that cannot be has a finite logarithm, and no gradient
START_SPEED, START_SMOOTHNESS = 3.0, 8.0  # mm: sd of the velocity, and of the Gaussian that filters it, before learning


class WarpedAtlas(LabelPrior):
    """f_j(z) = p_loc(φ_z(j)), with φ_z = exp(v), v = Cᵀ diag(`velocity_sd`) C z, C a cosine transform, p(z) = N(0, I).

    Args:
        location_prior: p_loc, (M, *grid), positive.
        control: voxels of the grid from one control point to the next.
        spacing: mm of a voxel of the grid; how smooth deformations are before label maps have taught it.
        label_maps: how many it keeps of those that it learned from, see `carry`.
    """

    label_maps: Tensor  # (n, *grid) int16: positions of labels, each map as it lies on the template
    frequency: Tensor  # (*control grid): of the cosines, cycles per voxel of the grid
    velocity_sd: Tensor  # (*control grid): sd of each frequency's coefficient, voxels of the grid

    def __init__(self, location_prior: Tensor, control: int = 6, spacing: float = 1.0, label_maps: int = 0) -> None:
        grid = tuple(location_prior.shape[1:])
        coarse = tuple(-(-n // control) for n in grid)
        super().__init__(location_prior, len(grid) * math.prod(coarse))
        self._kept: tuple[tuple[int, int], Tensor] | None = None
        self.control_grid, self.flow_grid = coarse, tuple(-(-n // 2) for n in grid)
        dtype = location_prior.dtype
        for axis, (c, fine) in enumerate(zip(coarse, self.flow_grid, strict=True)):
            for name, points in (("analysis", c), ("synthesis", fine)):
                self.register_buffer(f"{name}_{axis}", _cosines(c, points).to(dtype), persistent=False)
        axes = [torch.arange(c) / (2 * n) for c, n in zip(coarse, grid, strict=True)]
        squares = torch.meshgrid(*[axis.square() for axis in axes], indexing="ij")
        self.register_buffer("frequency", torch.stack(squares).sum(0).sqrt().to(dtype), persistent=False)
        decay = torch.exp(-0.5 * (2 * math.pi * START_SMOOTHNESS / spacing * self.frequency).square()) + 1e-3
        kept = torch.zeros(label_maps, *grid, dtype=torch.int16)
        self.register_buffer("label_maps", kept, persistent=label_maps > 0)
        self.register_buffer("velocity_sd", START_SPEED / spacing * decay / decay.square().mean().sqrt())

    @property
    def at_once(self) -> int:
        """How many z are decoded together quickest."""
        return 1

    def deformed_by(self, strength: float) -> WarpedAtlas:
        """This atlas with velocities of `strength` times the sd; the location prior is shared."""
        atlas = copy.copy(self)
        atlas._buffers = {**self._buffers, "velocity_sd": strength * self.velocity_sd}
        return atlas

    def carry(self, labels: Tensor, z: Tensor) -> None:
        """Keep label maps (n, *grid), each carried to the template from where its own deformation z (n, D) has it."""
        for kept, own, shape in zip(self.label_maps, labels, z, strict=True):
            edge = torch.tensor(self.grid, device=z.device)[:, None] - 1
            there = self.places(-shape, EVERYWHERE).round().long().clamp(min=0).minimum(edge)
            kept.copy_(own[tuple(there)].view(self.grid))

    def reweighted(self, weights: Tensor) -> WarpedAtlas:
        """This atlas with a template in which label map i counts `weights`_i(y) times at y; all else is shared.

        p(y) ∝ p_loc(y) (Σ_i w_i h_i + ε) / (mean_i h_i + ε), h_i the one-hot label maps, both sums blurred as p_loc is:
        equal weights give p_loc, whose maps were interpolated and not, as these are, brought to the nearest voxel.

        Args:
            weights: (n, *grid), summing to 1 over the maps.
        """
        index = self.label_maps.long()
        equal = torch.full_like(weights, 1 / len(weights))
        counted = [torch.zeros_like(self.log_location_prior).scatter_add_(0, index, w) for w in (weights, equal)]
        now, before = (gaussian_blur(c[None], BLUR)[0] + TRUST for c in counted)
        location = self.log_location_prior.exp() * now / before
        atlas = copy.copy(self)
        atlas._buffers = {**self._buffers, "log_location_prior": (location / location.sum(0)).log()}
        return atlas

    def without(self, labels: Tensor) -> Self:
        """As a prior's; the label maps, too."""
        atlas = super().without(labels)
        atlas.label_maps = torch.where(labels.to(self.label_maps.device)[self.label_maps.long()], 0, self.label_maps)
        return atlas

    def coefficients(self, z: Tensor) -> Tensor:
        """Coefficients of the velocity's cosines, (..., d, *control grid), voxels of the grid, of z (..., D)."""
        white = z.unflatten(-1, (len(self.grid), *self.control_grid))
        return self._transformed(white, "analysis") * self.velocity_sd

    def z_of(self, coefficients: Tensor) -> Tensor:
        """The inverse of `coefficients`: z (..., D)."""
        white = self._transformed(coefficients / self.velocity_sd, "analysis", back=True)
        return white.flatten(-1 - len(self.grid))

    def _transformed(self, values: Tensor, name: str, back: bool = False) -> Tensor:
        """Points to frequencies along each axis of the grid, or back."""
        for axis in range(len(self.grid)):
            basis = getattr(self, f"{name}_{axis}")  # (frequencies, points)
            values = _along(values, basis if back else basis.mT, axis - len(self.grid))
        return values

    def displacement(self, z: Tensor) -> Tensor:
        """φ_z(j) − j in voxels, (..., d, *grid), of z (..., D); φ_z⁻¹ is that of −z."""
        return enlarge(self.flow(z), self.grid)

    def flow(self, z: Tensor) -> Tensor:
        """`displacement` on every other voxel, where it is computed, (..., d, *flow grid)."""
        dims = len(self.grid)
        flow = self._transformed(self.coefficients(z.reshape(-1, z.shape[-1])), "synthesis", back=True)
        flow = flow / 2**SQUARINGS
        axes = [(2 * torch.arange(n, dtype=z.dtype, device=z.device) + 1) / n - 1 for n in self.flow_grid]
        identity = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        # voxels of the grid to the −1..1 of grid_sample
        scale = (2 / torch.tensor(self.grid, dtype=z.dtype, device=z.device)).view(dims, *[1] * dims)
        for _ in range(SQUARINGS):
            there = (identity + flow * scale).flip(1).movedim(1, -1)
            flow = flow + functional.grid_sample(flow, there, padding_mode="border", align_corners=False)
        return flow.view(*z.shape[:-1], *flow.shape[1:])

    def places(self, z: Tensor, voxels: Voxels) -> Tensor:
        """φ_z(j) of some voxels j, (..., d, n)."""
        own = unravel(torch.arange(math.prod(self.grid), device=z.device)[voxels], self.grid).mT
        return self.displacement(z).flatten(-len(self.grid))[..., voxels] + own

    def flat_scores(self, z: Tensor, voxels: Voxels) -> Tensor:
        """log f − log p_loc at some voxels, (..., M, n)."""
        places = self.places(z.reshape(-1, z.shape[-1]), voxels)  # (·, d, n)
        warped = self._sampled(self._probabilities().expand(len(places), -1, *self.grid), places)
        scores = warped.clamp(min=FLOOR).log().sub_(self.log_location_prior.flatten(1)[:, voxels])
        return scores.view(*z.shape[:-1], *scores.shape[1:])

    def sketch(self, z: Tensor) -> Tensor:
        """The flow, (..., d, *flow grid)."""
        return self.flow(z)

    def sketched_probs(self, sketches: Tensor, voxels: Tensor, labels: Tensor) -> Tensor:
        """As a prior's; neighbouring voxels come from a small part of the atlas."""
        places = self.at_voxels(sketches, voxels)
        places += unravel(voxels, self.grid).mT.unsqueeze(-1)
        places = places.flatten(1)
        edge = torch.tensor(self.grid, dtype=places.dtype, device=places.device)[:, None] - 1
        places.clamp_(min=0).clamp_(max=edge)
        low, high = places.amin(1).floor(), places.amax(1).ceil()
        box = [slice(int(first), int(last) + 1) for first, last in zip(low, high, strict=True)]
        part = self._probabilities()[(slice(None), *box)][labels]
        return self._sampled(part[None], (places - low[:, None])[None]).view(len(labels), len(voxels), -1)

    def on_template(self, volumes: Tensor, z: Tensor) -> Tensor:
        """What a scan of deformation z (D,) has on the grid, (C, *grid), where the template has it."""
        return self._sampled(volumes[None], self.places(-z, EVERYWHERE)[None]).view(volumes.shape)

    def _sampled(self, volumes: Tensor, places: Tensor) -> Tensor:
        """(B, C, *sizes) at places (B, d, n), linearly: (B, C, n). Beyond the volumes their edge."""
        sizes = torch.tensor(volumes.shape[2:], dtype=places.dtype, device=places.device)[:, None]
        there = ((2 * places + 1) / sizes - 1).flip(1).mT.unflatten(1, (*[1] * (len(self.grid) - 1), -1))
        return functional.grid_sample(volumes, there, padding_mode="border", align_corners=False).flatten(2)

    def _probabilities(self) -> Tensor:
        """p_loc; kept, as long as its logarithm stays what it is.

        In 3-D with a voxel's labels side by side: places far from each other are sampled three times quicker.
        """
        location = self.log_location_prior
        made = (id(location), location._version)
        if self._kept is None or self._kept[0] != made:
            probabilities = location.exp()[None]
            if len(self.grid) == 3:
                probabilities = probabilities.to(memory_format=torch.channels_last_3d)
            self._kept = (made, probabilities[0])
        return self._kept[1]

    def label_log_prob(self, z: Tensor, labels: Tensor, voxels: Tensor) -> Tensor:
        """log f_j(s_j) of label positions (n,) at voxels (n,), of one z (D,): (n,); of no other labels."""
        row = labels.long() * math.prod(self.grid)
        atlas = self.log_location_prior.flatten()
        probability: Tensor | float = 0.0
        for index, weight in corners_of(self.places(z, voxels), self.grid):
            probability = probability + atlas[row + index].exp() * weight
        return torch.as_tensor(probability).log()

    def label_scores(self, z: Tensor, lattice: Lattice | None = None) -> Tensor:
        """log f − log p_loc, (..., M, *grid), or on the lattice's voxels alone."""
        if lattice is None:
            return self.flat_scores(z, EVERYWHERE).unflatten(-1, self.grid)
        index = torch.arange(math.prod(self.grid), device=z.device).view(self.grid)[lattice]
        return self.flat_scores(z, index.flatten()).unflatten(-1, index.shape)


def _cosines(frequencies: int, points: int) -> Tensor:
    """The orthonormal cosine transform's first frequencies at the middles of evenly spaced points, (F, P).

    Orthonormal over F points; over more, the same cosines.
    """
    k = torch.arange(frequencies, dtype=torch.float64)
    place = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    norm = ((2 - (k == 0).double()) / frequencies).sqrt()
    return norm[:, None] * torch.cos(math.pi * k[:, None] * place)


def _along(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """`values` with its `axis` multiplied by a matrix (old, new)."""
    return (values.movedim(axis, -1) @ matrix).movedim(-1, axis)


def corners_of(places: Tensor, grid: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The voxels around places (d, n): of each corner flat index and weight, (n,). Beyond the grid its edge."""
    edge = torch.tensor([[n - 1] for n in grid], dtype=places.dtype, device=places.device)
    at = places.clamp(min=0).minimum(edge)
    low = at.detach().floor().minimum((edge - 1).clamp(min=0))
    for corner in itertools.product((0, 1), repeat=len(grid)):
        index, weight = torch.zeros_like(low[0], dtype=torch.long), torch.ones_like(at[0])
        for axis, (size, one) in enumerate(zip(grid, corner, strict=True)):
            index = index * size + (low[axis].long() + one).clamp(max=size - 1)
            rest = at[axis] - low[axis]
            weight = weight * (rest if one else 1 - rest)
        yield index, weight
