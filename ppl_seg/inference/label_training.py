"""The label network's training ("wake"): towards the posterior label marginals that the program infers for each scan.

The marginals of many scans are what teaches: a Gaussian a class sees one voxel, the network what the scans have in
common around it. A condition that needs no label holds them in place, see `border_shift`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..guides.label_network import AnyContrastNetwork, LabelNetwork
from .task import Batch, Task
from .tasks import choose

PATCH = 64  # voxels: the longest side of what a training step sees of a scan
# (scan, observed, targets, box, generator) → the box of each, deformed and recoloured at random.
ScanAugment = Callable[[Tensor, Tensor, Tensor, Sequence[slice], torch.Generator], tuple[Tensor, Tensor, Tensor]]


class LabelCrossEntropy:
    """Σ_j o_j Σ_m t_jm log u_jm as the bound: with the entropy of the targets t, −KL(t ‖ u)."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum over scans and observed voxels; the model has no part in it."""
        scan, observed, location, targets, box = args
        log_u = (guide(scan, observed, box) + location).float().log_softmax(1)
        loss: Tensor = -(targets * log_u).sum(1)[observed.any(1)].sum()
        return loss


class LabelTask(Task):
    """Batches of patches of scans, all from one box of the grid, with their targets.

    Args:
        scans: (n, C, *grid). observed: (n, C or 1, *grid). targets: label marginals, (n, M, *grid).
        log_location_prior: (M, *grid). batch_size: B. augment: see `ScanAugment`.
    """

    def __init__(
        self,
        scans: Tensor,
        observed: Tensor,
        targets: Tensor,
        log_location_prior: Tensor,
        batch_size: int,
        augment: ScanAugment,
    ) -> None:
        self.scans, self.observed, self.targets, self.location = scans, observed, targets, log_location_prior
        self.batch_size, self.augment = batch_size, augment
        self.everyone = torch.arange(len(scans))

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Scans and a box chosen at random."""
        chosen = choose(self.everyone, self.batch_size, generator)
        starts = [int(torch.randint(max(0, n - PATCH) + 1, (), generator=generator)) for n in self.scans.shape[2:]]
        box = tuple(slice(start, start + PATCH) for start in starts)
        scan, observed, targets = self.augment(
            self.scans[chosen], self.observed[chosen], self.targets[chosen], box, generator
        )
        return Batch(
            (scan, observed, self.location[(slice(None), *box)], targets, box), len(chosen), scan[0, 0].numel()
        )


def log_label_marginals(
    network: LabelNetwork | AnyContrastNetwork, log_location_prior: Tensor, scan: Tensor, observed: Tensor
) -> Tensor:
    """log u of whole scans, (B, M, *grid)."""
    with torch.no_grad():
        # torch's 3-D convolution of a single small volume on a CPU takes longer than of two
        alone = len(scan) == 1 and scan.dim() == 5 and scan.device.type == "cpu"
        copies = 2 if alone and (scan.shape[1] == 1 or isinstance(network, LabelNetwork)) else len(scan)
        scores = network(*(x.expand(copies, *x.shape[1:]) for x in (scan, observed)))[: len(scan)]
        log_u: Tensor = (scores + network.location(log_location_prior)).float().log_softmax(1)
    return log_u
