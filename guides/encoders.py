"""From images on the prior's grid to the raw parameters of a family."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..models.decoders import convolution, enlarge, halved


class ConvolutionalEncoder(nn.Module):
    """Strided convolutions to a coarse grid, then a linear layer. No layer mixes scans of a batch.

    Args:
        in_channels: channels of the input. grid: its shape, 2-D or 3-D. num_outputs: raw parameters.
        width: channels at half resolution; each coarser level has twice as many. levels: number of levels.
        hidden: width of the layer before the last.

    """

    def __init__(
        self,
        in_channels: int,
        grid: Sequence[int],
        num_outputs: int,
        width: int = 16,
        levels: int = 3,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        dims = len(grid)
        layers: list[nn.Module] = []
        channels = in_channels
        for level in range(levels):
            outputs = width * 2**level
            layers += [convolution(dims, channels, outputs, stride=2), nn.SiLU()]
            if level:
                layers += [convolution(dims, outputs, outputs), nn.SiLU()]
            channels = outputs
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Linear(channels * math.prod(halved(grid, levels)), hidden), nn.SiLU())
        self.to_raw = nn.Linear(hidden, num_outputs)

    def forward(self, image: Tensor) -> Tensor:
        """Raw parameters (B, P) of images (B, in_channels, *grid)."""
        raw: Tensor = self.to_raw(self.hidden(self.convolutions(image).flatten(1)))
        return raw


class FieldEncoder(nn.Module):
    """Strided convolutions, and at each control point of a warped atlas its own raw parameters, by one convolution.

    A deformation is seen where it is: a linear layer from the whole scan would have thousands of rows to learn.

    Args:
        in_channels: channels of the input. control_grid: shape of the control points. fields: raw parameters at each.
        width: channels at half resolution; each coarser level has twice as many. levels: number of levels.

    The last layer starts at zero.
    """

    def __init__(
        self, in_channels: int, control_grid: Sequence[int], fields: int, width: int = 16, levels: int = 3
    ) -> None:
        super().__init__()
        dims, self.control_grid = len(control_grid), tuple(control_grid)
        layers: list[nn.Module] = []
        for level in range(levels):
            outputs = width * 2**level
            layers += [convolution(dims, in_channels, outputs, stride=2), nn.SiLU()]
            layers += [convolution(dims, outputs, outputs), nn.SiLU()]
            in_channels = outputs
        self.convolutions = nn.Sequential(*layers)
        self.to_raw = convolution(dims, in_channels, fields)
        for parameter in self.to_raw.parameters():
            nn.init.zeros_(parameter)

    def forward(self, image: Tensor) -> Tensor:
        """Raw parameters (B, fields · control points) of images (B, in_channels, *grid)."""
        raw: Tensor = enlarge(self.to_raw(self.convolutions(image)), self.control_grid)
        return raw.flatten(1)
