"""Where to start a registration from: every turn and shift of a coarse lattice, judged by mutual information.

Nearest neighbours at some thousand points make a judgement cheap enough for thousands of places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from ppl_seg.data.registration import Volume, coarse, rigid_move

BINS = 16
TURNS = (-24.0, 0.0, 24.0)  # degrees about each axis


@dataclass(frozen=True, eq=False)
class Probe:
    """Points of the prior with their classes, and a scan in a few steps of intensity.

    Attributes:
        points: (n, 3) RAS mm of the prior. classes: (n,) numbers from 0. steps: (X, Y, Z) int, 0 to BINS − 1.
        to_voxel: (4, 4), RAS mm of the scan → voxel of `steps`.
    """

    points: np.ndarray
    classes: np.ndarray
    steps: np.ndarray
    to_voxel: np.ndarray

    @classmethod
    def of(cls, classes: Volume, moving: Volume, region: np.ndarray, number: int = 4000, spacing: float = 6.0) -> Probe:
        """Points spread evenly over a region (X, Y, Z) of the class volume; intensities of `moving` lie in 0 to 1."""
        voxels = np.argwhere(region)
        voxels = voxels[:: max(1, len(voxels) // number)]
        points = voxels @ classes.affine[:3, :3].T + classes.affine[:3, 3]
        _, numbers = np.unique(classes.data[tuple(voxels.T)], return_inverse=True)
        small = coarse(moving, spacing)
        steps = np.clip(small.data * BINS, 0, BINS - 1).astype(np.int64)
        return cls(points, numbers, steps, np.linalg.inv(small.affine))

    def positions(self, world: np.ndarray) -> np.ndarray:
        """(n, 3) scan voxels (of `steps`) of the points under a world matrix."""
        matrix = self.to_voxel @ world
        return np.asarray(self.points @ matrix[:3, :3].T + matrix[:3, 3])

    def information_at(self, world: np.ndarray) -> float:
        """`information` under a world matrix."""
        return self.information(self.positions(world))

    def information(self, positions: np.ndarray) -> float:
        """Mutual information (nats) of classes and intensities, times the share of points in the field of view."""
        voxel = np.floor(positions + 0.5).astype(np.int64)
        inside = ((voxel >= 0) & (voxel < self.steps.shape)).all(1)
        if not inside.any():
            return 0.0
        x, y, z = voxel[inside].T
        size = int(self.classes.max()) + 1
        joint = np.bincount(self.classes[inside] * BINS + self.steps[x, y, z], minlength=size * BINS)
        joint = joint.reshape(size, BINS) / joint.sum()
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        seen = joint > 0
        return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum() * inside.mean())


def best_starts(probe: Probe, start: np.ndarray, shifts: Iterable[Sequence[float]], keep: int) -> list[np.ndarray]:
    """The `keep` best world matrices of different turns: `start`, turned about the points' middle and shifted (mm)."""
    middle = probe.points.mean(0)
    offsets = np.array(list(shifts), dtype=np.float64)
    found = []
    for angles in itertools.product(TURNS, repeat=3):
        world = start @ rigid_move(Rotation.from_euler("xyz", angles, degrees=True), middle)
        positions = probe.positions(world)
        steps = offsets @ probe.to_voxel[:3, :3].T
        scores = [probe.information(positions + step) for step in steps]
        best = int(np.argmax(scores))
        world[:3, 3] += offsets[best]
        found.append((scores[best], world))
    found.sort(key=lambda pair: -pair[0])
    return [world for _, world in found[:keep]]
