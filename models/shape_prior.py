"""p(z) p(s | z): a decoder plus the location prior, and the stage-1 program that learns it from label maps."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Self

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from .decoders import Lattice, enlarge
from .interpolation import linear_rows, unravel, weighted_rows
from .label_field import LabelField
from .voxels import Voxels, take


class LabelPrior(nn.Module, ABC):
    """p(z) = N(0, I) and p(s|z): f = softmax_m(scores(z) + log p_loc). Subclasses say what the scores are.

    Args:
        location_prior: p_loc, (M, *grid), positive.
        latent_dim: D.

    Raises:
        ValueError: p_loc not positive everywhere.
    """

    log_location_prior: Tensor

    def __init__(self, location_prior: Tensor, latent_dim: int) -> None:
        super().__init__()
        if not location_prior.is_meta and not bool((location_prior > 0).all()):
            raise ValueError("the location prior must be positive everywhere: give it a floor")
        self.register_buffer("log_location_prior", location_prior.log())
        self.latent_dim = latent_dim

    @property
    def num_labels(self) -> int:
        """M."""
        return self.log_location_prior.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the prior's grid."""
        return tuple(self.log_location_prior.shape[1:])

    @property
    def at_once(self) -> int:
        """How many z are decoded together quickest: more than two leave the cache where the grid is large."""
        return 8 if self.log_location_prior.numel() < 2**22 else 2

    def prior(self) -> dist.Distribution:
        """p(z) of one scan: N(0, I) with event shape (D,)."""
        zero = self.log_location_prior.new_zeros(self.latent_dim)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)

    def without(self, labels: Tensor) -> Self:
        """A copy that has background in the place of some labels, (M,) bool, not of the background itself."""
        prior = copy.deepcopy(self)
        location = prior.log_location_prior.exp()
        location[0] += location[labels].sum(0)
        location[labels] = torch.finfo(location.dtype).tiny
        prior.log_location_prior.copy_(location.log())
        return prior

    @abstractmethod
    def label_scores(self, z: Tensor, lattice: Lattice | None = None) -> Tensor:
        """Scores, (..., M, *grid), or on the lattice's voxels alone."""

    def flat_scores(self, z: Tensor, voxels: Voxels) -> Tensor:
        """Scores at some voxels, (..., M, n)."""
        return take(self.label_scores(z).flatten(-len(self.grid)), voxels)

    @abstractmethod
    def sketch(self, z: Tensor) -> Tensor:
        """What `sketched_probs` makes f of at any voxel, (..., K, *coarse grid), few numbers beside f's."""

    @abstractmethod
    def sketched_probs(self, sketches: Tensor, voxels: Tensor, labels: Tensor) -> Tensor:
        """f of some labels at some voxels, (L, N, G).

        Args:
            sketches: of G draws, (K, *coarse grid, G). voxels: flat, (N,). labels: positions, (L,).
        """

    def at_voxels(self, sketches: Tensor, voxels: Tensor) -> Tensor:
        """Sketches (K, *coarse grid, G) at voxels (N,) of the grid, interpolated as `enlarge` does: (K, N, G)."""
        coarse = sketches.shape[1:-1]
        ratio = torch.tensor([c / n for c, n in zip(coarse, self.grid, strict=True)], dtype=torch.float64)
        places = unravel(voxels, self.grid).double()
        index, weight = linear_rows((places + 0.5) * ratio.to(places.device) - 0.5, coarse)
        return weighted_rows(sketches.flatten(1, -2), index, weight.to(sketches.dtype))

    def label_logits(self, z: Tensor, lattice: Lattice | None = None) -> Tensor:
        """a = scores + log p_loc, (..., M, *grid), or on the lattice's voxels alone."""
        location = self.log_location_prior if lattice is None else self.log_location_prior[(slice(None), *lattice)]
        return self.label_scores(z, lattice) + location

    def log_label_probs(self, z: Tensor) -> Tensor:
        """log f, (..., M, *grid)."""
        return self.label_logits(z).log_softmax(-1 - len(self.grid))


class ShapePrior(LabelPrior):
    """f_j(z) = softmax_m(enlarge(decoder(m + L z))_jm + log p_loc,jm), with p(z) = N(0, I).

    m = 0 and L = I while the decoder is learned; `calibrate` then sets them, so that p(z) is the density of the
    anatomies themselves and not of their augmented copies.

    Args:
        location_prior: p_loc, (M, *grid), positive.
        decoder: z (..., D) → scores (..., M, *coarse grid) of any shape, which are interpolated to the grid.
        latent_dim: D.

    Raises:
        ValueError: p_loc not positive everywhere.
    """

    latent_loc: Tensor
    latent_scale_tril: Tensor

    def __init__(self, location_prior: Tensor, decoder: nn.Module, latent_dim: int) -> None:
        super().__init__(location_prior, latent_dim)
        self.register_buffer("latent_loc", location_prior.new_zeros(latent_dim))
        self.register_buffer("latent_scale_tril", torch.eye(latent_dim, dtype=location_prior.dtype))
        self.decoder = decoder

    def label_scores(self, z: Tensor, lattice: Lattice | None = None) -> Tensor:
        """Decoder output, (..., M, *grid), or on the lattice's voxels alone."""
        return enlarge(self._coarse_scores(z), self.grid, lattice)

    def _coarse_scores(self, z: Tensor) -> Tensor:
        """Decoder output of z, which has the prior's coordinates, (..., M, *coarse grid)."""
        scores: Tensor = self.decoder(self.latent_loc + z @ self.latent_scale_tril.T)
        return scores

    def sketch(self, z: Tensor) -> Tensor:
        """The scores before they are interpolated, (..., M, *coarse grid)."""
        return self._coarse_scores(z)

    def sketched_probs(self, sketches: Tensor, voxels: Tensor, labels: Tensor) -> Tensor:
        """As a prior's."""
        scores = self.at_voxels(sketches, voxels)
        scores += self.log_location_prior.flatten(1)[:, voxels, None]
        scores -= scores.amax(0)
        scores.exp_()
        scores /= scores.sum(0)
        return scores[labels]

    def calibrate(self, loc: Tensor, covariance: Tensor) -> None:
        """Let z = 0 be `loc` (D,) and z ~ N(0, I) have `covariance` (D, D) in the decoder's own coordinates."""
        self.latent_loc.copy_(loc)
        self.latent_scale_tril.copy_(torch.linalg.cholesky(covariance))


class ShapeModel(PyroModule):
    """The stage-1 program: sites `z` and `labels`, plate `scans`."""

    max_plate_nesting = 1

    def __init__(self, shape_prior: LabelPrior) -> None:
        super().__init__()
        self.shape_prior = shape_prior

    def forward(
        self,
        labels: Tensor | None = None,
        observed: Tensor | None = None,
        lattice: Lattice | None = None,
        num_scans: int = 1,
    ) -> Tensor:
        """Run the program; without labels it simulates label maps.

        Args:
            labels: label positions, (B, *grid), or None.
            observed: bool, (B, 1, *grid); None observes everything.
            lattice: the voxels that stand for all of them, their log-probability scaled up; None takes every voxel.
            num_scans: B, where neither is given.

        Returns:
            Label positions, (B, *grid), or on the lattice.
        """
        shape = self.shape_prior
        batch = labels.shape[0] if labels is not None else observed.shape[0] if observed is not None else num_scans
        if observed is None:
            observed = torch.ones((batch, 1, *shape.grid), dtype=torch.bool, device=shape.log_location_prior.device)
        weight = 1
        if lattice is not None:
            observed = observed[(slice(None), slice(None), *lattice)]
            labels = labels if labels is None else labels[(slice(None), *lattice)]
            weight = math.prod(some.step or 1 for some in lattice)  # over all places of the lattice: unbiased
        with pyro.plate("scans", batch, dim=-1):
            z = pyro.sample("z", shape.prior())
            with pyro.poutine.scale(scale=weight):
                field = LabelField(shape.label_logits(z, lattice), observed)
                drawn: Tensor = pyro.sample("labels", field, obs=labels)
        return drawn


def location_prior(labels: Tensor, observed: Tensor, num_labels: int, blur: float = 1.0, floor: float = 1e-3) -> Tensor:
    """Smoothed voxel-wise label frequency over training label maps, (M, *grid).

    Args:
        labels: label positions, (n, *grid). observed: bool, (n, 1, *grid).
        num_labels: M. blur: sd of the Gaussian, voxels. floor: mass given to all labels alike; > 0.
    """
    seen = observed[:, 0]
    counts = torch.stack([((labels == m) & seen).sum(0).float() for m in range(num_labels)])
    return smoothed_frequency(counts, blur, floor)


def smoothed_frequency(counts: Tensor, blur: float, floor: float = 1e-3) -> Tensor:
    """p_loc, (M, *grid), from how often each label was seen in each voxel; arguments as `location_prior`."""
    counts = counts.clone()
    counts[0] += 0.5  # voxels that no map observes are background
    blurred = gaussian_blur(counts.unsqueeze(0), blur)[0]
    frequency = blurred / blurred.sum(0, keepdim=True)
    return (1 - floor) * frequency + floor / len(counts)


def gaussian_blur(volume: Tensor, sd: float) -> Tensor:
    """Separable Gaussian blur of (B, C, *grid), sd in voxels, edges replicated; axes of length 1 are left alone."""
    if sd <= 0:
        return volume
    radius = max(1, int(3 * sd + 0.5))
    offsets = torch.arange(-radius, radius + 1, device=volume.device)
    kernel = torch.exp(-0.5 * (offsets.to(volume.dtype) / sd) ** 2)
    kernel = kernel / kernel.sum()
    shape = volume.shape
    for axis in range(2, len(shape)):
        size, inner = shape[axis], math.prod(shape[axis + 1 :])
        if size == 1:
            continue
        # as a matrix: ten times as fast as a convolution of one channel
        places = torch.arange(size, device=volume.device)[:, None].expand(-1, len(kernel))
        index = (places, (places + offsets).clamp(0, size - 1))
        matrix = volume.new_zeros(size, size).index_put_(index, kernel.expand(size, -1), accumulate=True)
        lines = volume.reshape(-1, size, inner) if inner > 1 else volume.reshape(-1, size)
        volume = (matrix @ lines if inner > 1 else lines @ matrix.mT).view(shape)
    return volume
