"""From draws of z and θ to label marginals, whole segmentations and volumes, in the scan's own voxels.

The scan is read block by block, for a group of draws at once: what a voxel takes from the prior's grid does not depend
on the draw. Nothing of size draws × labels × voxels is ever there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ppl_seg.data.resampling import blur_kernels, whole_voxels, within
from ppl_seg.models.intensity import IntensityParameters
from ppl_seg.models.interpolation import compact, linear_rows, ravel, weighted_rows
from ppl_seg.models.segmentation import SegmentationModel
from ppl_seg.models.shape_prior import LabelPrior
from ppl_seg.results.blocks import BLOCK, blocks, positions
from ppl_seg.results.label_noise import LabelNoise

ReadoutName = Literal["marginals", "decoder"]
Run = Callable[..., Iterator[Any]]  # `map`, or that of a pool of threads
Draw = Callable[[Tensor, Sequence[int], Tensor], Tensor]
GROUP = 2**26  # numbers: labels × voxels of a block × draws that are read together; few labels are in a block
SKETCHES = 2**27  # numbers: what the prior says of those draws, as it computes it
RARE, USUAL = 1e-3, 10  # a label less probable in all of a block, over so many draws, is drawn nowhere there
FEWEST_BLOCKS = 64  # from which threads are worth their start
SLAB = 2**28  # numbers: label marginals that are summed at a time


@dataclass(frozen=True)
class Readout:
    """What the draws say, in the scan's own voxels (X, Y, Z).

    labels: argmax of the marginals, positions. confidence: its marginal probability. entropy: of the marginals, nats.
    counts: (S, M) voxels of each label in each drawn segmentation. log_likelihood: (S,) of each draw, over the scan's
    own observed voxels, Σ_j log of the sum that r is divided by: log p(x | z) where power is 1 and no u; β not applied.
    draws: (S, X, Y, Z) positions, uint8 or int16, or None. marginals: (M, X, Y, Z), averaged over draws of z, or None.
    """

    labels: Tensor
    confidence: Tensor
    entropy: Tensor
    counts: Tensor
    log_likelihood: Tensor
    draws: Tensor | None = None
    marginals: Tensor | None = None


def read_out(
    model: SegmentationModel,
    z: Tensor,
    theta: IntensityParameters,
    scan: Tensor,
    observed: Tensor,
    matrix: np.ndarray,
    spacing: Sequence[float],
    name: ReadoutName = "marginals",
    keep_draws: bool = False,
    keep_marginals: bool = False,
    region: Tensor | None = None,
    share: float = 1.0,
    log_u: Tensor | None = None,
    power: float = 1.0,
    label_share: float = 0.5,
) -> Readout:
    """Read S draws of z out.

    f and the weight maps are brought to the scan's own voxels and responsibilities computed from its own intensities
    (probabilities interpolated back from a 2 mm grid lose 0.06 Dice, hard labels 0.12). Outside the region and outside
    the prior's grid the label is background with probability 1.

    Args:
        model: the program. z: (S, D). theta: of this scan, (1, ...), maps on the prior's grid.
        scan: normalised, (C, X, Y, Z). observed: bool, same shape; where nothing is, r = f.
        matrix: (4, 4), voxel of the prior's grid → voxel of the scan. spacing: of the prior's grid, mm (3,).
        name: what marginals and label map come from: `marginals`, r; `decoder`, f. Drawn segmentations are from r.
        keep_draws, keep_marginals: keep every drawn segmentation, the label marginals.
        region: bool, (X, Y, Z), the mask: what may be something else than background; None for everything.
        share: of the usual working memory; less takes longer.
        log_u: a label guide's, on the prior's grid, (M, *grid), or None.
        power: κ, r ∝ f p(x|m)^κ.
        label_share: w, r ∝ (f p(x|m)^κ)^(1 − w) u^w where the scan is observed and there is a u: a logarithmic opinion
            pool (Genest and Zidek, Statistical Science 1986).
    """
    own, total, count = tuple(scan.shape[1:]), scan[0].numel(), model.shape_prior.num_labels
    reader = _Reader(model, theta.detach(), scan, observed, matrix, name, log_u, power, label_share)
    noise = LabelNoise.draw(model.intensity.class_of_label.tolist(), len(z), spacing, scan)
    all_blocks = reader.blocks(torch.ones_like(observed[0]) if region is None else region)
    labels = torch.zeros(total, dtype=torch.int64, device=scan.device)
    confidence, entropy = scan.new_ones(total), scan.new_zeros(total)
    counts = torch.zeros(len(z), count, dtype=torch.int64)
    counts[:, 0] = total - sum(map(len, all_blocks))
    log_likelihood = torch.zeros(len(z), dtype=torch.float64)
    draws = scan.new_zeros(len(z), total, dtype=torch.uint8 if count <= 256 else torch.int16) if keep_draws else None
    marginals = scan.new_zeros(count, total) if keep_marginals else None
    if marginals is not None:
        marginals[0] = 1.0
    groups, sketched = _groups(model.shape_prior, z, share, reader.to_grid), _Sketches(model.shape_prior, z)
    with torch.no_grad(), _workers(scan.device, len(all_blocks)) as run:
        for together in _slabs(all_blocks, int(share * SLAB) // count):
            sums = [scan.new_zeros(count, len(voxels)) for voxels in together]
            wanted = reader.touched(together)
            source = _Source(wanted, _usual(model.shape_prior, z, wanted))
            for some in groups:
                sketches = sketched(some, run)
                draw = partial(noise.winners, some)
                read = partial(reader.read, source, sketches, draw, None if draws is None else draws[some])
                for drawn, evidence in run(read, together, sums):
                    counts[some] += drawn
                    log_likelihood[some] += evidence
            for voxels, of_block in zip(together, sums, strict=True):
                of_block /= of_block.sum(0)
                labels[voxels] = best = first_argmax(of_block)
                confidence[voxels] = of_block.gather(0, best[None])[0]
                entropy[voxels] = -torch.special.xlogy(of_block, of_block).sum(0)
                if marginals is not None:
                    marginals[:, voxels] = of_block
    return Readout(
        labels=labels.view(own),
        confidence=confidence.view(own),
        entropy=entropy.view(own),
        counts=counts,
        log_likelihood=log_likelihood,
        draws=None if draws is None else draws.unflatten(1, own),
        marginals=None if marginals is None else marginals.unflatten(1, own),
    )


@dataclass(frozen=True)
class _Source:
    """What blocks take from the prior's grid.

    voxels: flat, rising, (n,). usual: f there of some of the draws, averaged, (M, n).
    """

    voxels: Tensor
    usual: Tensor


class _Reader:
    """What every block needs: the program, θ, the scan, and where its voxels lie on the prior's grid."""

    def __init__(
        self,
        model: SegmentationModel,
        theta: IntensityParameters,
        scan: Tensor,
        observed: Tensor,
        matrix: np.ndarray,
        name: ReadoutName,
        log_u: Tensor | None,
        power: float,
        label_share: float,
    ) -> None:
        self.intensity, self.theta, self.name = model.intensity, theta, name
        share = 0.0 if log_u is None else label_share
        # exponents of f, of the intensities, of the label guide
        self.own_power, self.power, self.guide_power = 1 - share, (1 - share) * power, share
        self.own, self.shape_prior = tuple(scan.shape[1:]), model.shape_prior
        self.grid = (*model.shape_prior.grid, 1)[:3]  # a 2-D grid is one slice
        self.log_location = model.shape_prior.log_location_prior.flatten(1)
        self.log_u = None if log_u is None else log_u.flatten(1)
        self.scan, self.observed = torch.where(observed, scan, 0.0).flatten(1), observed.flatten(1)
        to_grid = np.linalg.inv(matrix)  # own voxel → grid voxel
        whole = whole_voxels(to_grid, self.own)
        self.to_grid = to_grid if whole is None else whole.astype(np.float64)
        self.kernels = blur_kernels(self.to_grid)  # voxels larger than the grid's see their surroundings

    def blocks(self, region: Tensor) -> list[Tensor]:
        """The own voxels that lie in the region and on the grid, flat indices, block by block."""
        sizes = torch.tensor(self.grid, dtype=torch.float64, device=region.device)
        found = []
        for box in blocks(self.own, np.linalg.norm(self.to_grid[:3, :3], axis=0).tolist()):
            corner = torch.tensor([side.start for side in box], device=region.device)
            voxels = ravel(region[box].nonzero() + corner, self.own)
            voxels = voxels[within(positions(voxels, self.own, self.to_grid), sizes)]
            if len(voxels):
                found.append(voxels)
        return found

    def touched(self, some: list[Tensor]) -> Tensor:
        """The voxels of the prior's grid that blocks take from, flat, rising."""
        found = torch.zeros(self.log_location.shape[1], dtype=torch.bool, device=self.scan.device)
        for voxels in some:
            index, _ = linear_rows(positions(voxels, self.own, self.to_grid), self.grid, self.kernels)
            found[index.flatten().long()] = True
        return found.nonzero()[:, 0]

    @torch.no_grad()
    def read(
        self, source: _Source, sketches: Tensor, draw: Draw, draws: Tensor | None, voxels: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read one block for a group of G draws.

        Args:
            source: of this block and others. sketches: of the draws, as `_Sketches` has them.
            draw: labels (V, G), of r, its rows' labels, and places. draws: (G, J), to be filled, or None.
            voxels: flat indices (V,). sums: (M, V), to which marginals are added.

        Returns:
            counts, (G, M), of the drawn labels; log_likelihood of the block's observed voxels, (G,) float64.
        """
        count, group = len(source.usual), sketches.shape[-1]
        places = positions(voxels, self.own, self.to_grid)
        index, weight = linear_rows(places, self.grid, self.kernels)
        weight = weight.to(sums.dtype)
        corners, index = compact(index)
        rows = torch.searchsorted(source.voxels, corners)
        likelihood, peak = self._likelihood(voxels, corners, index, weight)
        seen = self.observed[:, voxels].any(0)
        f = source.usual[:, rows, None]
        rest = self._tempered(f, torch.zeros_like(f[0]), index, weight, likelihood, seen)[..., 0]  # (M, V)
        here = (rest > RARE * rest.sum(0)).any(1) | (self.name == "decoder")  # f is asked for there, of every label
        labels = here.nonzero()[:, 0]
        rest[labels] = 0.0  # it is of the labels that are not here
        others = f[~here].pow(self.own_power).sum(0)
        f = self.shape_prior.sketched_probs(sketches, corners, labels)  # (L, N, G), on the corners
        r = self._tempered(f, others, index, weight, likelihood[labels], seen)  # the pool, (L, V, G)
        evidence = (r.sum(0) + rest.sum(0)[:, None]).clamp_(min=torch.finfo(r.dtype).tiny)
        r /= evidence
        if self.name == "decoder":
            sums += weighted_rows(f.sum(-1, keepdim=True), index, weight)[..., 0]
        else:
            sums += rest * evidence.reciprocal().sum(-1)
            sums[labels] += r.sum(-1)
        drawn = draw(r, labels.tolist(), places.to(r.dtype))
        if draws is not None:
            draws[:, voxels] = drawn.T.to(draws.dtype)
        drawn = drawn + count * torch.arange(group, dtype=torch.int32, device=drawn.device)
        counts = torch.bincount(drawn.flatten(), minlength=count * group).view(group, count)
        log_likelihood = (evidence.log_() + peak.unsqueeze(-1))[seen].sum(0, dtype=torch.float64)
        return counts.cpu(), log_likelihood.cpu()

    def _tempered(
        self, f: Tensor, others: Tensor, index: Tensor, weight: Tensor, likelihood: Tensor, seen: Tensor
    ) -> Tensor:
        """f^own_power · likelihood of some labels, where nothing is seen f, (L, V, G).

        f: on the prior's grid, (L, N, G). others: Σ f^own_power of the other labels, (N, 1). likelihood: (L, V).
        """
        weights = weight * likelihood.unsqueeze(-1)
        if self.own_power == 1:
            return weighted_rows(f, index, weights)
        # on the prior's grid, where voxels are fewer
        tempered = f**self.own_power
        r = weighted_rows(tempered / (tempered.sum(0) + others), index, weights)
        if not bool(seen.all()):
            r[:, ~seen] = weighted_rows(f, index[~seen], weight[~seen])
        return r

    def _likelihood(self, voxels: Tensor, corners: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """p(x | label)^power u^guide_power of own voxels over its peak, (M, V); the peak's log, (V,)."""
        theta = self.theta
        if theta.log_weight_maps is not None:
            maps = weighted_rows(theta.log_weight_maps[:, corners].exp().unsqueeze(-1), index, weight)
            theta = theta.with_maps(maps[..., 0].clamp(min=1e-12).log())
        scan, seen = self.scan[None, :, voxels], self.observed[None, :, voxels]
        log_likelihood = self.intensity.label_log_prob(scan, seen, theta, self.power)[0]
        if self.log_u is not None:  # brought here as f is
            said = weighted_rows(self.log_u[:, corners].unsqueeze(-1), index, weight)[..., 0]
            log_likelihood = log_likelihood + torch.where(seen[0].any(0), self.guide_power * said, 0.0)
        peak = log_likelihood.amax(0)
        return (log_likelihood - peak).exp(), peak


def _usual(shape: LabelPrior, z: Tensor, wanted: Tensor) -> Tensor:
    """f of some of the draws, averaged, at voxels of the prior's grid, flat (n,): (M, n)."""
    chosen = torch.linspace(0, len(z) - 1, min(len(z), USUAL), device=z.device).round().long()
    location = shape.log_location_prior.flatten(1)[:, wanted]
    total = torch.zeros_like(location)
    for one in chosen:
        total += (shape.flat_scores(z[one], wanted) + location).softmax(0)
    return total / len(chosen)


def _groups(shape: LabelPrior, z: Tensor, share: float, to_grid: np.ndarray) -> list[slice]:
    """The draws that are read together. to_grid: own voxel → grid voxel; a large one needs many of these."""
    with torch.no_grad():
        numbers = shape.sketch(z[:1]).numel()
    block = BLOCK * max(1.0, abs(np.linalg.det(to_grid[:3, :3])))
    size = max(1, min(int(share * GROUP / (block * shape.num_labels)), int(share * SKETCHES) // numbers))
    return [slice(first, min(first + size, len(z))) for first in range(0, len(z), size)]


@dataclass
class _Sketches:
    """What the prior sketches of a group of G draws, (K, *coarse grid, G). The last group's are kept."""

    shape: LabelPrior
    z: Tensor
    kept: tuple[slice, Tensor] | None = None

    def __call__(self, some: slice, run: Run) -> Tensor:
        if self.kept is None or self.kept[0] != some:
            self.kept, z = None, self.z[some]
            sketches = z.new_empty(0)
            for start in range(0, len(z), 8):  # turned round eight at a time
                parts = torch.cat(list(run(self._sketch, z[start : start + 8].split(self.shape.at_once))))
                if not start:
                    sketches = z.new_empty(*parts.shape[1:], len(z))
                sketches[..., start : start + 8] = parts.movedim(0, -1)
            self.kept = (some, sketches)
        return self.kept[1]

    def _sketch(self, one: Tensor) -> Tensor:
        with torch.no_grad():  # the other threads know nothing of this one's
            return self.shape.sketch(one)


def _slabs(all_blocks: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Blocks together as long as they have no more than `size` voxels."""
    slab: list[Tensor] = []
    voxels = 0
    for block in all_blocks:
        if slab and voxels + len(block) > size:
            yield slab
            slab, voxels = [], 0
        slab.append(block)
        voxels += len(block)
    if slab:
        yield slab


@contextmanager
def _workers(device: torch.device, blocks: int) -> Iterator[Run]:
    """A `map` over as many threads as torch has: operations on a block are too small to be shared between them.

    Few blocks, a crop, are quicker one after another than handed around.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or blocks < FEWEST_BLOCKS:
        yield map
        return
    torch.set_num_threads(1)  # here too: OpenMP's own threads wait by turning, on the cores that the pool's need
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def first_argmax(values: Tensor) -> Tensor:
    """argmax over the first axis, the first of equals; faster than torch's for a short, strided axis."""
    best = values[0].clone()
    index = torch.zeros(best.shape, dtype=torch.int64, device=values.device)
    for m in range(1, len(values)):
        better = values[m] > best
        best = torch.where(better, values[m], best)
        index[better] = m
    return index
