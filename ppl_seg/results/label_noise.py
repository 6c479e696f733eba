"""Noise that draws labels from marginals so that neighbouring voxels err together.

Given z the program's labels are independent, and their sum over a structure hardly varies. But what the program leaves
unexplained (a brightness that drifts, a border that is drawn differently) is alike over millimetres. So the draws are
coupled: every label has its own noise field, smooth in space, and each voxel takes the label that wins a race,
argmax r / E with E ~ Exp(1), the Gumbel-max trick. Each voxel's marginals are r still, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FAR, NEAR = 25.0, 4.0  # mm, over which it is alike; see docs/measurements.md
NEAR_SHARE = 0.6  # turns of the far waves' phase that the near waves move it by


@dataclass(frozen=True)
class Waves:
    """Plane waves of random direction and phase, one for each of M labels and S draws.

    Over normal wave vectors the correlation of two places falls with their distance like a Gaussian (Rahimi and
    Recht, Random features for large-scale kernel machines, NIPS 2007).

    Attributes:
        vectors: (3, M, S), turns per voxel of the prior's grid. phases: (M, S), turns.
    """

    vectors: Tensor
    phases: Tensor

    @classmethod
    def draw(cls, labels: int, draws: int, spacing: Sequence[float], correlation: float) -> Waves:
        """spacing: mm of the prior's grid (3,). correlation: mm, sd of the Gaussian."""
        vectors = torch.randn(3, labels, draws) / (2 * math.pi * correlation)
        return cls(vectors * torch.tensor(spacing).view(3, 1, 1), torch.rand(labels, draws))

    def some(self, draws: slice) -> Waves:
        """Of some of the draws."""
        return Waves(self.vectors[..., draws], self.phases[:, draws])

    def turns(self, places: Tensor, label: int) -> Tensor:
        """Phase of a label's waves, (V, S), at places (V, 3) on the prior's grid, voxels."""
        return torch.addmm(self.phases[label].to(places), places, self.vectors[:, label].to(places))


@dataclass(frozen=True)
class LabelNoise:
    """E = −log of a triangle wave. Its phase is uniform at every place, so that the wave is, and E ~ Exp(1).

    Errors of a whole structure and of a stretch of its border: far waves, whose phase near waves move.
    """

    far: Waves
    near: Waves

    @classmethod
    def draw(cls, labels: int, draws: int, spacing: Sequence[float]) -> LabelNoise:
        """For M labels and S draws. spacing: mm of the prior's grid (3,)."""
        return cls(Waves.draw(labels, draws, spacing, FAR), Waves.draw(labels, draws, spacing, NEAR))

    def some(self, draws: slice) -> LabelNoise:
        """Of some of the draws."""
        return LabelNoise(self.far.some(draws), self.near.some(draws))

    def at(self, places: Tensor, label: int) -> Tensor:
        """E of a label, (V, S), at places (V, 3) on the prior's grid, voxels."""
        turns = self.far.turns(places, label).add_(_triangle(self.near.turns(places, label)), alpha=NEAR_SHARE)
        smallest = torch.finfo(turns.dtype).tiny
        return _triangle(turns).clamp_(min=smallest).log_().neg_().clamp_(min=smallest)

    def winners(self, r: Tensor, places: Tensor) -> Tensor:
        """The drawn labels, (V, S) int64, of marginals r (M, V, S)."""
        best, drawn = r.new_zeros(r.shape[1:]), torch.zeros(r.shape[1:], dtype=torch.int64, device=r.device)
        for label, share in enumerate(r):  # one after another: a label's numbers stay in cache
            score = share / self.at(places, label)
            drawn.masked_fill_(score > best, label)
            torch.maximum(best, score, out=best)
        return drawn


def _triangle(turns: Tensor) -> Tensor:
    """In place: from 1 at whole turns to 0 between them."""
    return turns.frac_().mul_(2).abs_().sub_(1).abs_()
