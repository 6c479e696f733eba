"""Linear registration by mutual information that is smooth in the transform: its optimum does not depend on the start.

Mattes et al., "PET-CT image registration in the chest using free-form deformations" (IEEE TMI 2003): a histogram of
classes and intensities with cubic B-splines along the intensities. Three things remove what a search gets stuck in: the
scan is blurred, the points do not lie on a lattice, and what is not seen fades out instead of vanishing. Gradients are
exact (autograd), so that quasi-Newton steps end at the optimum, to a few hundredths of a millimetre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from ppl_seg.data.geometry import spacing_of
from ppl_seg.data.registration import Volume, coarse

_BINS = 32
_SEED = 1
_BLUR = 0.7  # voxels of the coarse scan, at least
_REACH = 60.0  # mm; a turn or stretch is measured by how far it moves what lies so far from the middle
_PRECISION = {"gtol": 1e-8, "maxcor": 20}
FINE, ROUGH = 1e-11, 1e-7  # relative change of the information below which a search ends
_LEAST_SEEN = 1e-3
_SMALLEST = 1e-12  # share of the histogram
FREEDOM = {"rigid": 3, "similarity": 4, "affine": 9}  # of the generators, besides shifts
# generators of linear maps: turns, one scale, shears, stretches
_GENERATORS = np.array([
    [[0, 0, 0], [0, 0, -1], [0, 1, 0]], [[0, 0, 1], [0, 0, 0], [-1, 0, 0]], [[0, -1, 0], [1, 0, 0], [0, 0, 0]],
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 1], [0, 1, 0]],
    [[1, 0, 0], [0, -1, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0], [0, 0, -1]],
], dtype=np.float64)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Comparison:
    """Points of the prior with their classes, and the scan that is looked up there. All float64.

    Attributes:
        points: (n, 3) RAS mm of the prior. classes: (n,) numbers from 0.
        scan: (1, 2, X, Y, Z) intensities from 0 to 1 where seen, and how much is seen.
        to_voxel: (4, 4), RAS mm of the scan → its voxel.
    """

    points: Tensor
    classes: Tensor
    scan: Tensor
    to_voxel: Tensor

    @classmethod
    def of(
        cls,
        classes: Volume,
        moving: Volume,
        seen: Volume,
        regions: Sequence[tuple[np.ndarray, int]],
        spacing: float,
        blur: float = 0.0,
    ) -> Comparison:
        """Points at random in each region (X, Y, Z) of the class volume, so many; the scan in voxels of `spacing` mm.

        Args:
            blur: sd of a Gaussian, mm. Steps of the voxels are blurred away in any case.
            moving: intensities from 0 to 1, 0 where not seen. seen: 0 to 1, on the same grid.
        """
        random = np.random.default_rng(_SEED)
        drawn = []
        for region, number in regions:
            voxels = np.argwhere(region)
            few = len(voxels) <= number
            drawn.append(voxels if few else voxels[random.choice(len(voxels), number, replace=False)])
        voxels = np.concatenate(drawn)
        _, numbers = np.unique(classes.data[tuple(voxels.T)], return_inverse=True)
        places = voxels + random.uniform(-0.5, 0.5, voxels.shape)
        points = places @ classes.affine[:3, :3].T + classes.affine[:3, 3]
        small = coarse(moving, spacing)
        sd = np.maximum(_BLUR, blur / np.array(spacing_of(small.affine)))
        both = np.stack([ndimage.gaussian_filter(v.data, sd) for v in (small, coarse(seen, spacing))])
        to_voxel = torch.from_numpy(np.linalg.inv(small.affine))
        return cls(torch.from_numpy(points), torch.from_numpy(numbers), torch.from_numpy(both)[None].double(), to_voxel)

    def information(self, world: Tensor) -> Tensor:
        """Mutual information (nats) of classes and intensities under a world matrix, times how much is seen."""
        matrix = self.to_voxel @ world
        voxels = self.points @ matrix[:3, :3].T + matrix[:3, 3]
        size = torch.tensor(self.scan.shape[2:], dtype=voxels.dtype)
        places = (2 * voxels / (size - 1) - 1).flip(-1)[None, None, None]  # as grid_sample has them
        found = functional.grid_sample(self.scan, places, padding_mode="zeros", align_corners=True)[0, :, 0, 0]
        seen = found[1]
        steps = (found[0] / seen.clamp(min=_LEAST_SEEN)).clamp(0, 1) * (_BINS - 4) + 1.5
        low = steps.detach().floor()
        t = steps - low
        spline = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
        cells = (self.classes * _BINS + low.long() - 1)[:, None] + torch.arange(4)
        number = int(self.classes.max()) + 1
        joint = torch.zeros(number * _BINS, dtype=steps.dtype)
        joint = joint.index_add(0, cells.reshape(-1), (spline * seen[:, None]).reshape(-1)).view(number, _BINS)
        joint = joint / joint.sum().clamp(min=_SMALLEST)
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return (joint * ((joint + _SMALLEST) / (independent + _SMALLEST)).log()).sum() * seen.mean()


def most_informative(
    comparison: Comparison, start: np.ndarray, kind: str, tolerance: float = FINE, stiffness: float = 0.0
) -> tuple[np.ndarray, float]:
    """The world matrix (4, 4) of most information that L-BFGS reaches from a start, and its information.

    Args:
        kind: rigid, similarity or affine: what may change of the start. tolerance: FINE or ROUGH.
        stiffness: nats that half the squared sum of the logarithms of the world matrix' three stretches costs.
    """
    freedom = FREEDOM[kind]
    begin, generators = torch.from_numpy(start), torch.from_numpy(_GENERATORS[:freedom])
    middle = comparison.points.mean(0)

    def world_of(values: Tensor) -> Tensor:
        linear = torch.matrix_exp(torch.tensordot(values[3:] / _REACH, generators, 1))
        moved = torch.cat([linear, (middle + values[:3] - linear @ middle)[:, None]], 1)
        return begin @ torch.cat([moved, torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=moved.dtype)])

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        asked = torch.tensor(values, requires_grad=True)
        world = world_of(asked)
        value = 0.5 * stiffness * strain(world) - comparison.information(world)
        (gradient,) = torch.autograd.grad(value, asked)
        return value.item(), gradient.numpy()

    options = {**_PRECISION, "ftol": tolerance}
    found = minimize(loss, np.zeros(3 + freedom), jac=True, method="L-BFGS-B", options=options)
    return world_of(torch.from_numpy(found.x)).numpy(), -float(found.fun)


def strain(world: Tensor) -> Tensor:
    """The squared sum of the logarithms of a world matrix' three stretches: 0 where millimetres stay millimetres."""
    linear = world[:3, :3]
    return 0.25 * torch.linalg.eigvalsh(linear.T @ linear).log().square().sum()
