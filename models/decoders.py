"""z → label scores over the grid; computed at half resolution or coarser and interpolated, since shapes are smooth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


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
        self.coarse = (widths[0], *self.shapes[0])
        self.expand = nn.Linear(latent_dim, math.prod(self.coarse))
        self.blocks = nn.ModuleList(nn.Sequential(convolution(dims, w, w), nn.SiLU()) for w in widths)
        # Channels are reduced before the grid is doubled: convolutions at the finest level take most of the time.
        self.reductions = nn.ModuleList(convolution(dims, w, w // 2) for w in widths[:-1])
        self.to_scores = convolution(dims, width, num_labels)
        for parameter in self.to_scores.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor) -> Tensor:
        """Scores (..., M, *grid) for z (..., D)."""
        mode = INTERPOLATION[len(self.grid)]
        hidden = self.expand(z.reshape(-1, z.shape[-1])).view(-1, *self.coarse)
        hidden = self.blocks[0](hidden)
        for shape, reduction, block in zip(self.shapes[1:], self.reductions, self.blocks[1:], strict=True):
            hidden = functional.interpolate(reduction(hidden), shape, mode=mode, align_corners=False)
            hidden = block(hidden)
        scores = functional.interpolate(self.to_scores(hidden), self.grid, mode=mode, align_corners=False)
        return scores.view(*z.shape[:-1], *scores.shape[1:])


class LocationDecoder(nn.Module):
    """No shape at all: scores are zero, f = p_loc. The baseline that EM with an atlas is."""

    def __init__(self, latent_dim: int, num_labels: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.shape = (num_labels, *grid)

    def forward(self, z: Tensor) -> Tensor:
        """Zeros, (..., M, *grid)."""
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
