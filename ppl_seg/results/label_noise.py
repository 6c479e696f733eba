"""Noise that draws labels from marginals so that voxels err together.

Given z the program's labels are independent, and their sum over a structure hardly varies. But what the program leaves
unexplained (a brightness that drifts, a border that is drawn differently) is alike over centimetres. So the draws are
coupled: classes and labels have noise fields, smooth in space, and each voxel takes the one that wins a race,
argmax r / E with E ~ Exp(1), the Gumbel-max trick. Each voxel's marginals are r still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FAR, NEAR = 60.0, 4.0  # mm, over which it is alike; see docs/measurements/volumes.md
NEAR_SHARE = 0.6  # turns of the far waves' phase that the near waves move it by


@dataclass(frozen=True)
class Waves:
    """Plane waves of random direction and phase, one for each of K labels or classes and S draws.

    Over normal wave vectors the correlation of two places falls with their distance like a Gaussian (Rahimi and
    Recht, Random features for large-scale kernel machines, NIPS 2007).

    Attributes:
        vectors: (K, 3, S), turns per voxel of the prior's grid. phases: (K, S), turns.
    """

    vectors: Tensor
    phases: Tensor

    @classmethod
    def draw(cls, kinds: int, draws: int, spacing: Sequence[float], correlation: float, like: Tensor) -> Waves:
        """spacing: mm of the prior's grid (3,). correlation: mm, sd of the Gaussian. like: a tensor on its device."""
        vectors = torch.randn(kinds, 3, draws) * torch.tensor(spacing).view(3, 1) / (2 * math.pi * correlation)
        return cls(vectors.to(like), torch.rand(kinds, draws).to(like))

    def turns(self, places: Tensor, kind: int, draws: slice) -> Tensor:
        """Phase of a kind's waves of some draws, (V, G), at places (V, 3) on the prior's grid, voxels."""
        return torch.addmm(self.phases[kind, draws], places, self.vectors[kind, :, draws])


@dataclass(frozen=True)
class Noise:
    """E = −log of a triangle wave. Its phase is uniform at every place, so that the wave is, and E ~ Exp(1).

    Errors of a whole structure and of a stretch of its border: far waves, whose phase near waves move.
    """

    far: Waves
    near: Waves

    @classmethod
    def draw(cls, kinds: int, draws: int, spacing: Sequence[float], like: Tensor) -> Noise:
        """For K labels or classes and S draws. spacing: mm of the prior's grid (3,). like: a tensor on its device."""
        return cls(*(Waves.draw(kinds, draws, spacing, correlation, like) for correlation in (FAR, NEAR)))

    def at(self, places: Tensor, kind: int, draws: slice) -> Tensor:
        """E of a label or class in some draws, (V, G), at places (V, 3) on the prior's grid, voxels."""
        moved_by = _triangle(self.near.turns(places, kind, draws))
        turns = self.far.turns(places, kind, draws).add_(moved_by, alpha=NEAR_SHARE)
        smallest = torch.finfo(turns.dtype).tiny
        return _triangle(turns).clamp_(min=smallest).log_().neg_().clamp_(min=smallest)


@dataclass(frozen=True)
class LabelNoise:
    """A race among the intensity classes, and among the labels of the one that wins.

    Labels of one class, left and right among them, are found too large or too small together.

    Attributes:
        members: the labels of each class. of_classes, of_labels: their noise.
    """

    members: tuple[tuple[int, ...], ...]
    of_classes: Noise
    of_labels: Noise

    @classmethod
    def draw(cls, class_of_label: Sequence[int], draws: int, spacing: Sequence[float], like: Tensor) -> LabelNoise:
        """For S draws. class_of_label: (M,). spacing: mm of the prior's grid (3,). like: a tensor on its device."""
        members = tuple(
            tuple(m for m, other in enumerate(class_of_label) if other == n) for n in sorted(set(class_of_label))
        )
        noises = (Noise.draw(kinds, draws, spacing, like) for kinds in (len(members), len(class_of_label)))
        return cls(members, *noises)

    def winners(self, draws: slice, r: Tensor, labels: Sequence[int], places: Tensor) -> Tensor:
        """The labels of some draws, (V, G) int16.

        Args:
            r: marginals, (L, V, G). labels: whose, (L,), rising; no other label is drawn.
            places: (V, 3), on the prior's grid, voxels.
        """
        if len(labels) == 1:  # no race
            return torch.full(r.shape[1:], labels[0], dtype=torch.int16, device=r.device)
        of_label = dict(zip(labels, r, strict=True))
        best, drawn = r.new_zeros(r.shape[1:]), torch.zeros(r.shape[1:], dtype=torch.int16, device=r.device)
        for number, members in enumerate(self.members):  # one after another: a class' numbers stay in cache
            here = {label: of_label[label] for label in members if label in of_label}
            if not here:
                continue
            total, label = self._within(draws, here, places)
            score = total / self.of_classes.at(places, number, draws)
            drawn = torch.where(score > best, label, drawn)
            torch.maximum(best, score, out=best)
        return drawn

    def _within(self, draws: slice, r: dict[int, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
        """r of some labels together, (V, G), and which of them it is, (V, G), or () where it is the only one."""
        first, *others = r
        if not others:
            return r[first], torch.tensor(first, dtype=torch.int16, device=places.device)
        total = torch.stack(list(r.values())).sum(0)
        best = torch.zeros_like(total)
        drawn = torch.full(total.shape, first, dtype=torch.int16, device=places.device)
        for label, of_label in r.items():
            score = of_label / self.of_labels.at(places, label, draws)
            drawn.masked_fill_(score > best, label)
            torch.maximum(best, score, out=best)
        return total, drawn


def _triangle(turns: Tensor) -> Tensor:
    """In place: from 1 at whole turns to 0 between them."""
    return turns.frac_().mul_(2).abs_().sub_(1).abs_()
