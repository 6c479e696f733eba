"""The distribution of a whole label map given z: the `labels` site of the stage-1 program."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional

from .draws import draw_categories


class LabelField(TorchDistribution):
    """s_j ~ Categorical(f_j), independent over voxels given z; unobserved voxels count nothing.

    Args:
        logits: label logits a, (*S, B, M, *grid); f = softmax over M.
        observed: bool, (B, 1, *grid).

    batch_shape is (*S, B), event_shape the grid.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, logits: Tensor, observed: Tensor) -> None:
        grid = logits.shape[logits.dim() - (observed.dim() - 2) :]
        self.logits, self.observed = logits.flatten(-len(grid)), observed.flatten(1)
        super().__init__(batch_shape=self.logits.shape[:-2], event_shape=grid, validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        """Label positions 0..M-1; the event is the grid."""
        return constraints.independent(
            constraints.integer_interval(0, self.logits.shape[-2] - 1), len(self.event_shape)
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> LabelField:
        """The same distribution with logits of a wider batch shape."""
        logits = self.logits.expand(*batch_shape, *self.logits.shape[-2:]).unflatten(-1, self.event_shape)
        return LabelField(logits, self.observed.unflatten(-1, self.event_shape).unsqueeze(1))

    def log_prob(self, labels: Tensor) -> Tensor:
        """Σ_j o_j log f_j(s_j) for label positions (B, *grid), (*S, B)."""
        known = torch.where(self.observed, labels.long().flatten(1), 0)  # what stands elsewhere is no label
        index = known.expand(*self.batch_shape, -1)
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        missing = functional.cross_entropy(logits.flatten(0, -3), index.flatten(0, -2), reduction="none")
        return -torch.where(self.observed, missing.view(index.shape), 0.0).sum(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Label positions, (*sample_shape, *S, B, *grid)."""
        f = self.logits.softmax(-2).expand(*sample_shape, *self.logits.shape)
        return draw_categories(f).unflatten(-1, self.event_shape)
