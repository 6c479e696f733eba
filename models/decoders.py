"""z → label scores on a grid of half resolution or coarser: shapes are smooth, and the prior interpolates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Lattice = tuple[slice, ...]  # some voxels of a grid: a slice an axis


def halved(grid: Sequence[int], times: int) -> tuple[int, ...]:
    """The grid's shape after halving it (rounding up) a number of times."""
    shape = tuple(grid)
    for _ in range(times):
        shape = tuple(-(-n // 2) for n in shape)
    return shape


def convolution(dims: int, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """A 3-wide convolution in 2-D or 3-D."""
    layer = (nn.Conv2d if dims == 2 else nn.Conv3d)(inputs, outputs, 3, stride=stride, padding=1)
    # torch's default shrinks the signal layer by layer, and z is not heard of at the output.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def enlarge(volume: Tensor, shape: Sequence[int], lattice: Lattice | None = None) -> Tensor:
    """Multilinear interpolation of (..., *grid) to another shape, corners not aligned, as torch's `interpolate`.

    One matrix product an axis: on CPUs three times faster than `interpolate`, forward and backward. Of the result only
    the voxels of `lattice` are computed.
    """
    # the last axis first: the later ones then only multiply from the left
    for axis in reversed(range(len(shape))):
        at = volume.dim() - len(shape) + axis
        old, new = volume.shape[at], shape[axis]
        if old == new and lattice is None:
            continue
        identity = torch.eye(old, dtype=volume.dtype, device=volume.device)[None]
        weights = functional.interpolate(identity, new, mode="linear", align_corners=False)[0]  # (old, new)
        if lattice is not None:
            weights = weights[:, lattice[axis]]
        if axis == len(shape) - 1:
            volume = volume @ weights
        else:
            rest = volume.shape[at + 1 :]
            volume = (weights.mT @ volume.flatten(at + 1)).unflatten(-1, rest)
    return volume


def random_lattice(grid: Sequence[int], stride: int, generator: torch.Generator | None = None) -> Lattice:
    """Every so-manyth voxel along each axis, from a random first one."""
    steps = [min(stride, n) for n in grid]
    return tuple(slice(int(torch.randint(step, (), generator=generator)), None, step) for step in steps)


class ConvolutionalDecoder(nn.Module):
    """A linear map to a coarse grid, then convolutions between doublings up to 1/2**finest of the grid.

    Args:
        latent_dim: D. num_labels: M. grid: shape of the prior's grid, 2-D or 3-D.
        width: channels at the finest level; each coarser level has twice as many.
        finest: how often the grid is halved at the finest level computed; 1 is half resolution.
        levels: number of levels.

    The last layer starts at zero, so that f = p_loc at step 0. No layer mixes scans of a batch.
    """

    def __init__(
        self, latent_dim: int, num_labels: int, grid: Sequence[int], width: int = 16, finest: int = 1, levels: int = 3
    ) -> None:
        super().__init__()
        self.grid = tuple(grid)
        dims = len(self.grid)
        self.shapes = [halved(grid, finest + level) for level in reversed(range(levels))]
        widths = [width * 2**level for level in reversed(range(levels))]
        self.coarsest = (widths[0], *self.shapes[0])
        self.expand = nn.Linear(latent_dim, math.prod(self.coarsest))
        self.blocks = nn.ModuleList(nn.Sequential(convolution(dims, w, w), nn.SiLU()) for w in widths)
        # Channels are reduced before the grid is doubled: convolutions at the finest level take most of the time.
        self.reductions = nn.ModuleList(convolution(dims, w, w // 2) for w in widths[:-1])
        self.to_scores = convolution(dims, width, num_labels)
        for parameter in self.to_scores.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor) -> Tensor:
        """Scores at the finest level, (..., M, *coarse grid), for z (..., D)."""
        flat = z.reshape(-1, z.shape[-1])
        single = len(flat) == 1 and len(self.grid) == 3
        # torch's 3-D convolution of a single small volume on a CPU takes longer than of two
        hidden = self.expand(flat.expand(2, -1) if single else flat).view(-1, *self.coarsest)
        if len(self.grid) == 3:
            hidden = hidden.contiguous(memory_format=torch.channels_last_3d)
        hidden = self.blocks[0](hidden)
        for shape, reduction, block in zip(self.shapes[1:], self.reductions, self.blocks[1:], strict=True):
            hidden = block(enlarge(reduction(hidden), shape))
        scores = self.to_scores(hidden)
        scores = (scores[:1] if single else scores).contiguous()
        return scores.view(*z.shape[:-1], *scores.shape[1:])


class LocationDecoder(nn.Module):
    """No shape at all: scores are zero, f = p_loc. The baseline that EM with an atlas is."""

    def __init__(self, latent_dim: int, num_labels: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.shape = (num_labels, *[1] * len(grid))

    def forward(self, z: Tensor) -> Tensor:
        """Zeros of a single voxel, (..., M, 1, 1, 1), or (..., M, 1, 1) for a 2-D grid."""
        return z.new_zeros(()).expand(*z.shape[:-1], *self.shape)


DECODERS: dict[str, Callable[..., nn.Module]] = {"convolutional": ConvolutionalDecoder, "location": LocationDecoder}


def build_decoder(name: str, latent_dim: int, num_labels: int, grid: Sequence[int], **options: int) -> nn.Module:
    """A decoder by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; choose one of {sorted(DECODERS)}")
    return DECODERS[name](latent_dim, num_labels, grid, **options)
