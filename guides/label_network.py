"""q(s | x): label marginals of a scan by one pass of a network, the amortised label factor of the guide.

u_j = softmax_m(network(x)_jm + log p_loc,jm). It stands beside q(z|x): where f gives Jensen's bound and r the exact
one, q(s|x) = u gives E_q[β Σ_j o_j Σ_m u_jm (log f_jm + log p(x_j|m) − log u_jm)] − KL(q ‖ p), tight at u = r.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.decoders import Lattice, convolution, enlarge

GROUPS = 4  # of the normalised channels


class LabelNetwork(nn.Module):
    """A U-Net from scans to label scores, at half the grid's resolution: a cell of 2 voxels a side is a voxel of it.

    The last layer starts at zero, so that u = p_loc at step 0. No layer mixes scans of a batch.

    Args:
        channels: C. num_labels: M. grid: shape of the prior's grid, 2-D or 3-D.
        width: channels at half resolution; each coarser level has twice as many. levels: number of levels.
    """

    def __init__(self, channels: int, num_labels: int, grid: Sequence[int], width: int = 24, levels: int = 3) -> None:
        super().__init__()
        self.grid, dims = tuple(grid), len(grid)
        cell, widths = 2**dims, [width * 2**level for level in range(levels)]

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
            layers = convolution(dims, inputs, outputs, stride), nn.GroupNorm(GROUPS, outputs), nn.SiLU()
            return nn.Sequential(*layers)

        self.stem = nn.Sequential(block(2 * channels * cell + dims, width), block(width, width))
        self.down = nn.ModuleList(
            nn.Sequential(block(fine, coarse, 2), block(coarse, coarse)) for fine, coarse in itertools.pairwise(widths)
        )
        self.reductions = nn.ModuleList(convolution(dims, 2 * w, w) for w in widths[:-1])
        self.up = nn.ModuleList(block(w, w) for w in widths[:-1])
        self.to_scores = (nn.Conv2d if dims == 2 else nn.Conv3d)(width, num_labels * cell, 1)
        for parameter in self.to_scores.parameters():
            nn.init.zeros_(parameter)

    def forward(self, scan: Tensor, observed: Tensor, box: Lattice | None = None) -> Tensor:
        """Label scores (B, M, *grid), to which log p_loc is added.

        Args:
            scan: normalised, (B, C, *grid). observed: bool, (B, C or 1, *grid).
            box: which part of the prior's grid these are, slices of step 1; None for all of it.
        """
        shape = scan.shape[2:]
        seen = observed.expand_as(scan)
        cells = pack(torch.cat([torch.where(seen, scan, 0.0), seen.to(scan.dtype)], 1))
        hidden = torch.cat([cells, self._places(cells, box)], 1)
        if len(shape) == 3:
            hidden = hidden.contiguous(memory_format=torch.channels_last_3d)
        hidden = self.stem(hidden)
        skipped = []
        for down in self.down:
            skipped.append(hidden)
            hidden = down(hidden)
        for fine, reduction, up in zip(reversed(skipped), reversed(self.reductions), reversed(self.up), strict=True):
            hidden = up(fine + enlarge(reduction(hidden), fine.shape[2:]))
        return unpack(self.to_scores(hidden), shape)

    def _places(self, cells: Tensor, box: Lattice | None) -> Tensor:
        """Where on the prior's grid each cell's corner lies, from −1 to 1, (B, d, *cells)."""
        sides = box or tuple(slice(0, n) for n in self.grid)
        axes = [
            torch.linspace(-1, 1, n, dtype=cells.dtype, device=cells.device)[side][::2]
            for n, side in zip(self.grid, sides, strict=True)
        ]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return places.expand(len(cells), *places.shape)


LABEL_NETWORKS: dict[str, Callable[..., nn.Module]] = {"u-net": LabelNetwork}


def build_label_network(name: str, channels: int, num_labels: int, grid: Sequence[int], **options: int) -> nn.Module:
    """A label network by name: (scan, observed, box) → label scores, as `LabelNetwork.forward`.

    Raises:
        ValueError: unknown name.
    """
    if name not in LABEL_NETWORKS:
        raise ValueError(f"unknown label network {name!r}; choose one of {sorted(LABEL_NETWORKS)}")
    return LABEL_NETWORKS[name](channels, num_labels, grid, **options)


def pack(volume: Tensor) -> Tensor:
    """(B, C, *grid) → (B, C·2^d, *grid / 2, rounded up): the voxels of a cell become channels; filled up with zeros."""
    dims = volume.dim() - 2
    volume = functional.pad(volume, [side for n in reversed(volume.shape[2:]) for side in (0, n % 2)])
    for axis in range(2, 2 + 2 * dims, 2):
        volume = volume.unflatten(axis, (-1, 2))
    order = [0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)]
    return volume.permute(order).flatten(1, 1 + dims)


def unpack(cells: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`, (B, C, *shape)."""
    dims = len(shape)
    cells = cells.unflatten(1, (-1, *[2] * dims))
    order = [0, 1, *(axis for d in range(dims) for axis in (2 + dims + d, 2 + d))]
    cells = cells.permute(order)
    for axis in range(2, 2 + dims):
        cells = cells.flatten(axis, axis + 1)
    return cells[(slice(None), slice(None), *(slice(n) for n in shape))]
