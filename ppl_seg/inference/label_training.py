"""The label network's training ("wake"): towards the posterior label marginals that the program infers for each scan.

The marginals of many scans are what teaches: a Gaussian a class sees one voxel, the network what the scans have in
common around it. A condition that needs no label holds them in place: if the program is right, its posteriors averaged
over the scans are the prior, E_x p(s_j|x) = p(s_j). `match_location` restores that before the network learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..guides.label_network import AnyContrastNetwork, LabelNetwork
from ..models.shape_prior import gaussian_blur
from .task import Batch, Task
from .tasks import choose

PATCH = 64  # voxels: the longest side of what a training step sees of a scan
# (scan, observed, targets, box, generator) → the box of each, deformed and recoloured at random.
ScanAugment = Callable[[Tensor, Tensor, Tensor, Sequence[slice], torch.Generator], tuple[Tensor, Tensor, Tensor]]
SMALLEST = 1e-8  # probability, in logarithms
MATCHING_STEPS, MATCHING_RATE = 15, 0.7  # of `match_location`
FLAT = 0.01  # doubt that is added to each voxel, as steep as all: where there is no border, it alone speaks


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


def match_location(targets: Tensor, observed: Tensor, log_location_prior: Tensor, blur: float) -> Tensor:
    """Label marginals t ∝ r exp(b g), with one smooth b for all scans, so that their mean over scans is the prior's.

    g, of each scan, is such that b moves the borders of all scans equally far: its `border_steepness` within half the
    blur. What fewer than one of n have at a place, n scans can't tell: there nothing is asked for.

    Args:
        targets: r, (n, M, *grid), changed in place. observed: (n, C or 1, *grid).
        blur: sd of the Gaussian through which the two are compared, voxels.
    """
    location = log_location_prior.exp()
    seen = observed.any(1, keepdim=True)
    count = seen.sum(0).to(location.dtype) + 1.0  # a scan that shows the prior itself: voxels nobody observes
    steepness = border_steepness(targets, blur / 2)

    def smooth(volume: Tensor) -> Tensor:
        return gaussian_blur(volume.unsqueeze(0), blur)[0].clamp(min=1 / len(targets)).log()

    def shifted(r: Tensor, g: Tensor) -> Tensor:
        return (r.float().clamp(min=SMALLEST).log() + shift * g).softmax(0)

    wanted, shift = smooth(location), torch.zeros_like(location)
    for _ in range(MATCHING_STEPS):
        mean = location.clone()
        for r, g, o in zip(targets, steepness, seen, strict=True):
            mean += shifted(r, g) * o
        shift = shift + MATCHING_RATE * (wanted - smooth(mean / count))
    for i, r in enumerate(targets):
        targets[i] = shifted(r, steepness[i]).to(targets.dtype)
    return targets


def border_steepness(marginals: Tensor, blur: float) -> Tensor:
    """How steeply label marginals change across their borders, (n, 1, *grid), relative to the mean of all scans.

    Where log r changes by b, the volume of a label changes by Σ_j r_j (1 − r_j) b: the wider its border is smeared, the
    more. Over the border's area that is how far the border moves; so the steepness is area over Σ_j (1 − Σ_m r_jm²),
    both around a place. Where there is no border it is 1.

    Args:
        marginals: (n, M, *grid). blur: sd of the Gaussian around a place, voxels.
    """
    borders, doubts = [], []
    for r in marginals:
        labels, border = r.argmax(0), r.new_zeros(r.shape[1:], dtype=torch.float32)
        for axis, n in enumerate(labels.shape):
            differ = (labels.narrow(axis, 1, n - 1) != labels.narrow(axis, 0, n - 1)).float() / 2
            border.narrow(axis, 1, n - 1).add_(differ)
            border.narrow(axis, 0, n - 1).add_(differ)
        borders.append(border)
        doubts.append(1 - r.float().square().sum(0))
    border, doubt = torch.stack(borders).unsqueeze(1), torch.stack(doubts).unsqueeze(1)
    usual = (border.sum() / doubt.sum().clamp(min=SMALLEST)).clamp(min=SMALLEST)  # area for each doubt, of all scans
    return (gaussian_blur(border, blur) / usual + FLAT) / (gaussian_blur(doubt, blur) + FLAT)
