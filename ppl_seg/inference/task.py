"""What a training is done on: batches, held-out batches, named terms, and state of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of model and guide, with `num_scans` (B) and `num_voxels` (J, of one scan)."""

    args: tuple[Any, ...]
    num_scans: int
    num_voxels: int

    @property
    def size(self) -> int:
        """What the sum over the batch is divided by: B·J."""
        return self.num_scans * self.num_voxels


class Task(ABC):
    """What is trained on. Only `batch` is required; tensors are expected on the training's device."""

    @abstractmethod
    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of `step` (from 1): choices come from `generator` (CPU) or torch's global generator.

        The place for what has to happen before the gradient step as well (an EM update of θ, say).
        """

    def after_step(self, step: int, batch: Batch) -> None:  # noqa: B027 (a hook, empty on purpose)
        """Called after the optimiser's step."""

    def held_out(self) -> Iterable[Batch]:
        """Batches, always the same ones, whose bound decides on the early stop; none by default."""
        return ()

    def terms(self, model: Any, guide: Any, args: tuple[Any, ...]) -> dict[str, float]:
        """The bound's named terms (log_likelihood, kl, ...), summed over the batch; always the same."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON scalars, nested in dicts and lists, that a resumed training needs (θ, maps)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `state_dict` gave (tensors may come back on the CPU)."""
