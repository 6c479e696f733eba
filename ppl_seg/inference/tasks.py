"""The two trainings: label maps for the prior, scans for the fit. Batches, held-out batches, named terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..guides.families import kl_to_prior
from ..models.decoders import Lattice, random_lattice
from ..models.intensity import IntensityParameters, PseudoCounts
from ..models.segmentation import SegmentationModel
from .expectation import Factor, MapOptions, expecting, update_theta, weight_maps
from .task import Batch, Task

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def choose(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Positions of a batch, without replacement where the pool is large enough."""
    if size >= len(pool):
        return pool
    return pool[torch.randperm(len(pool), generator=generator)[:size].to(pool.device)]


def batches(pool: Tensor, size: int) -> Iterable[Tensor]:
    """Positions in batches; none of none (torch's split makes one empty batch of none)."""
    return pool.split(size) if len(pool) else ()


class LabelMapTask(Task):
    """Stage 1: batches of augmented label maps.

    Args:
        labels: label positions, (n, *grid). observed: bool, (n, 1, *grid).
        held_out: which maps only judge, (n,) bool. batch_size: B. augment: deforms a batch; None for none.
        stride: of the lattice of voxels, placed at random, on which a step's likelihood is taken; 1 for every voxel.
    """

    def __init__(
        self,
        labels: Tensor,
        observed: Tensor,
        held_out: Tensor,
        batch_size: int,
        augment: Augment | None = None,
        stride: int = 1,
    ) -> None:
        self.labels, self.observed, self.batch_size, self.augment = labels, observed, batch_size, augment
        self.stride = stride
        self.training, self.judging = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]

    def _batch(self, labels: Tensor, observed: Tensor, lattice: Lattice | None = None) -> Batch:
        return Batch((labels, observed, lattice), len(labels), labels[0].numel())

    def _lattice(self, generator: torch.Generator) -> Lattice | None:
        return None if self.stride == 1 else random_lattice(self.labels.shape[1:], self.stride, generator)

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Maps chosen at random, deformed."""
        chosen = choose(self.training, self.batch_size, generator)
        labels, observed = self.labels[chosen].long(), self.observed[chosen]
        if self.augment is not None:
            labels, observed = self.augment(labels, observed, generator)
        return self._batch(labels, observed, self._lattice(generator))

    def held_out(self) -> Iterable[Batch]:
        """The maps that only judge, as they are."""
        for some in batches(self.judging, self.batch_size):
            yield self._batch(self.labels[some].long(), self.observed[some])

    def terms(self, model: Any, guide: Any, args: tuple[Any, ...]) -> dict[str, float]:
        """The KL; the rest of the bound is the log-likelihood."""
        with torch.no_grad():
            kl = kl_to_prior(guide.posterior(*args[:2]), model.shape_prior.prior()).sum()
        return {"kl": float(kl)}


class ScanTask(Task):
    """Stage 2: batches of scans; θ of the batch and the background maps follow by EM before each gradient step.

    Args:
        model, guide: the program and q(z|x). scans: (n, C, *grid). observed: (n, C or 1, *grid).
        theta: of all scans, with the maps of the start. batch_size: B.
        factor: whose responsibilities; None leaves θ alone (shared θ, or simulated scans).
        maps: how maps are learned, None to leave them.
    """

    def __init__(
        self,
        model: SegmentationModel,
        guide: Any,
        scans: Tensor,
        observed: Tensor,
        theta: IntensityParameters,
        batch_size: int,
        factor: Factor | None = "posterior",
        pseudo: PseudoCounts | None = None,
        maps: MapOptions | None = None,
    ) -> None:
        self.model, self.guide, self.scans, self.observed = model, guide, scans, observed
        self.theta, self.batch_size, self.factor, self.pseudo, self.maps = theta, batch_size, factor, pseudo, maps
        self.statistics: Tensor | None = None

    def _batch(self, chosen: Tensor) -> Batch:
        theta = self.theta.select(chosen) if self.theta.mean.shape[0] > 1 else self.theta
        scan = self.scans[chosen]
        shared = self.model.shared_intensity is not None
        return Batch((scan, self.observed[chosen], None if shared else theta), len(chosen), scan[0, 0].numel())

    def _update(self, chosen: Tensor) -> None:
        """EM of the maps, and of the chosen scans' θ with draws of the present guide."""
        scan, observed = self.scans[chosen], self.observed[chosen]
        with torch.no_grad():
            z = self.guide.posterior(scan, observed).sample((1,))
        assert self.factor is not None
        updated, background = update_theta(
            self.model, z, scan, observed, self.theta.select(chosen), self.factor, self.pseudo
        )
        for old, new in zip(
            (self.theta.mean, self.theta.sd, self.theta.log_weight),
            (updated.mean, updated.sd, updated.log_weight),
            strict=True,
        ):
            old[chosen] = new
        if self.maps is not None:
            rate = len(chosen) / len(self.scans)  # a running mean over about one pass
            per_scan = background / rate
            self.statistics = per_scan if self.statistics is None else (1 - rate) * self.statistics + rate * per_scan
            grid = self.model.shape_prior.grid
            self.theta = self.theta.with_maps(weight_maps(self.statistics, grid, self.maps))

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Scans chosen at random, their θ brought up to date."""
        chosen = choose(torch.arange(len(self.scans), device=self.scans.device), self.batch_size, generator)
        if self.factor is not None:
            self._update(chosen)
        return self._batch(chosen)

    def terms(self, model: Any, guide: Any, args: tuple[Any, ...]) -> dict[str, float]:
        """The KL, and the penalty log p(θ) where there is one."""
        scan, observed, theta = args
        with torch.no_grad():
            found = {"kl": float(kl_to_prior(guide.posterior(scan, observed), model.shape_prior.prior()).sum())}
            if self.pseudo is not None and theta is not None:
                pseudo = expecting(model, observed, self.pseudo)
                found["log_penalty"] = float(model.intensity.log_penalty(theta, pseudo).sum())
        return found

    def state_dict(self) -> dict[str, Any]:
        """θ of all scans, the maps and their statistics."""
        theta = self.theta
        state: dict[str, Any] = {"mean": theta.mean, "sd": theta.sd, "log_weight": theta.log_weight}
        if theta.log_weight_maps is not None:
            state["maps"] = theta.log_weight_maps
        if self.statistics is not None:
            state["statistics"] = self.statistics
        return {name: tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        device = self.scans.device
        tensors = {name: tensor.to(device).clone() for name, tensor in state.items()}
        self.theta = IntensityParameters(tensors["mean"], tensors["sd"], tensors["log_weight"], tensors.get("maps"))
        self.statistics = tensors.get("statistics")
