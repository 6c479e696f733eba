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
from ..models.shape_prior import LabelPrior
from .class_posteriors import blurred, class_posteriors, class_weights

GROUPS = 4  # of the normalised channels
BLUR = 2.0  # voxels, of the location prior that an "any-contrast" network starts from


class CellNetwork(nn.Module):
    """A U-Net at half the grid's resolution: a cell of 2 voxels a side is a voxel of it. No layer mixes scans.

    Args:
        inputs: channels of the volumes that it sees. grid: shape of the prior's grid, 2-D or 3-D.
        width: channels at half resolution; each coarser level has twice as many. levels: number of levels.
    """

    def __init__(self, inputs: int, grid: Sequence[int], width: int, levels: int) -> None:
        super().__init__()
        self.grid, dims = tuple(grid), len(grid)
        widths = [width * 2**level for level in range(levels)]

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
            layers = convolution(dims, inputs, outputs, stride), nn.GroupNorm(GROUPS, outputs), nn.SiLU()
            return nn.Sequential(*layers)

        self.stem = nn.Sequential(block(inputs * 2**dims + dims, width), block(width, width))
        self.down = nn.ModuleList(
            nn.Sequential(block(fine, coarse, 2), block(coarse, coarse)) for fine, coarse in itertools.pairwise(widths)
        )
        self.reductions = nn.ModuleList(convolution(dims, 2 * w, w) for w in widths[:-1])
        self.up = nn.ModuleList(block(w, w) for w in widths[:-1])

    def cells(self, volume: Tensor, box: Lattice | None) -> Tensor:
        """(B, inputs, *shape) → (B, width, *shape / 2, rounded up)."""
        packed = pack(volume)
        hidden = channels_last(torch.cat([packed, self._places(packed, box)], 1))
        hidden = self.stem(hidden)
        skipped = []
        for down in self.down:
            skipped.append(hidden)
            hidden = down(hidden)
        for fine, reduction, up in zip(reversed(skipped), reversed(self.reductions), reversed(self.up), strict=True):
            hidden = up(fine + enlarge(reduction(hidden), fine.shape[2:]))
        return hidden

    def _places(self, cells: Tensor, box: Lattice | None) -> Tensor:
        """Where on the prior's grid each cell's corner lies, from −1 to 1, (B, d, *cells)."""
        sides = box or tuple(slice(0, n) for n in self.grid)
        axes = [
            torch.linspace(-1, 1, n, dtype=cells.dtype, device=cells.device)[side][::2]
            for n, side in zip(self.grid, sides, strict=True)
        ]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return places.expand(len(cells), *places.shape)


class LabelNetwork(CellNetwork):
    """From scans of one kind to label scores; the last layer starts at zero, so that u = p_loc at step 0.

    Args:
        channels: C. num_labels: M. grid, width, levels: see `CellNetwork`.
    """

    def __init__(self, channels: int, num_labels: int, grid: Sequence[int], width: int = 24, levels: int = 3) -> None:
        super().__init__(2 * channels, grid, width, levels)
        self.to_scores = zeroed(voxelwise(len(grid), width, num_labels * 2 ** len(grid)))

    @classmethod
    def of(cls, prior: LabelPrior, class_of_label: Sequence[int], channels: int, **options: int) -> LabelNetwork:
        """The network of a prior."""
        return cls(channels, prior.num_labels, prior.grid, **options)

    def location(self, log_location_prior: Tensor) -> Tensor:
        """What the scores are added to, (M, *grid)."""
        return log_location_prior

    def forward(self, scan: Tensor, observed: Tensor, box: Lattice | None = None) -> Tensor:
        """Label scores (B, M, *grid), to which `location` is added.

        Args:
            scan: normalised, (B, C, *grid). observed: bool, (B, C or 1, *grid).
            box: which part of the prior's grid these are, slices of step 1; None for all of it.
        """
        seen = observed.expand_as(scan)
        shown = torch.cat([torch.where(seen, scan, 0.0), seen.to(scan.dtype)], 1)
        return unpack(self.to_scores(self.cells(shown, box)), scan.shape[2:])


class AnyContrastNetwork(CellNetwork):
    """From scans of any contrast to label scores: it is shown what `class_posteriors` says of a scan, not the scan.

    Channels are seen one by one, and their scores averaged where they are observed. The last layers work on
    voxels; the very last starts at zero.

    Args:
        log_location_prior: (M, *grid). class_of_label: (M,). width, levels: see `CellNetwork`.
        features: of a voxel from its cell. hidden: channels of the voxels' own layer.
    """

    log_location: Tensor
    class_of_label: Tensor

    def __init__(
        self,
        log_location_prior: Tensor,
        class_of_label: Sequence[int],
        width: int = 48,
        levels: int = 3,
        features: int = 16,
        hidden: int = 32,
    ) -> None:
        num_labels, *grid = log_location_prior.shape
        classes, dims = max(class_of_label) + 1, len(grid)
        super().__init__(1 + 2 * classes, grid, width, levels)
        # saved with the weights, which were learned with it: the prior may be one of brains alone by now
        self.register_buffer("log_location", blurred(log_location_prior, BLUR).half())
        self.register_buffer("class_of_label", torch.tensor(class_of_label), persistent=False)
        self.to_features = voxelwise(dims, width, features * 2**dims)
        self.mix = nn.Sequential(convolution(dims, features + classes, hidden), nn.GroupNorm(GROUPS, hidden), nn.SiLU())
        self.to_scores = zeroed(voxelwise(dims, hidden, num_labels))

    @classmethod
    def of(cls, prior: LabelPrior, class_of_label: Sequence[int], channels: int, **options: int) -> AnyContrastNetwork:
        """The network of a prior, for any number of channels."""
        return cls(prior.log_location_prior, class_of_label, **options)

    def location(self, log_location_prior: Tensor) -> Tensor:
        """The location prior of label maps that lie some voxels off, (M, *grid)."""
        return self.log_location.to(log_location_prior.dtype)

    def forward(self, scan: Tensor, observed: Tensor, box: Lattice | None = None) -> Tensor:
        """As `LabelNetwork.forward`."""
        batch, channels = scan.shape[:2]
        one = scan.flatten(0, 1).unsqueeze(1)
        seen = observed.expand_as(scan).flatten(0, 1).unsqueeze(1)
        here = self.log_location if box is None else self.log_location[(slice(None), *box)]
        shown = class_posteriors(one, seen, class_weights(here.to(scan.dtype), self.class_of_label))
        cells = self.cells(torch.cat([seen.to(shown.dtype), shown], 1), box)
        features = unpack(self.to_features(cells), scan.shape[2:])
        voxels = channels_last(torch.cat([features, shown[:, : shown.shape[1] // 2].to(features.dtype)], 1))
        scores: Tensor = self.to_scores(self.mix(voxels))
        if channels == 1:
            return scores
        counted = torch.where(seen, scores, 0.0).unflatten(0, (batch, channels)).sum(1)
        return counted / seen.unflatten(0, (batch, channels)).sum(1).clamp(min=1)


LABEL_NETWORKS: dict[str, Callable[..., LabelNetwork | AnyContrastNetwork]] = {
    "u-net": LabelNetwork.of,
    "any-contrast": AnyContrastNetwork.of,
}


def build_label_network(
    name: str, prior: LabelPrior, class_of_label: Sequence[int], channels: int, **options: int
) -> LabelNetwork | AnyContrastNetwork:
    """A label network of a prior by name: (scan, observed, box) → label scores, as `LabelNetwork.forward`.

    Raises:
        ValueError: unknown name.
    """
    if name not in LABEL_NETWORKS:
        raise ValueError(f"unknown label network {name!r}; choose one of {sorted(LABEL_NETWORKS)}")
    return LABEL_NETWORKS[name](prior, class_of_label, channels, **options)


def voxelwise(dims: int, inputs: int, outputs: int) -> nn.Module:
    """A linear layer at each voxel."""
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(inputs, outputs, 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all of its parameters 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def channels_last(volume: Tensor) -> Tensor:
    """In the memory format in which 3-D convolutions are quickest."""
    return volume.contiguous(memory_format=torch.channels_last_3d) if volume.dim() == 5 else volume


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
