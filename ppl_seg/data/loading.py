"""Files brought onto the prior's grid: label maps as positions, scans with what of them is observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_seg.data.grids import Grid, alignment_matrix
from ppl_seg.data.images import Image, check_same_grid, read_scan
from ppl_seg.data.labels import LabelTable, apply_map
from ppl_seg.data.masks import observed_mask
from ppl_seg.data.resampling import inside, resample, resample_labels


@dataclass(frozen=True)
class OwnScan:
    """A scan in its own voxels. intensities, observed: (C, X, Y, Z), unobserved intensities 0."""

    image: Image
    intensities: Tensor
    observed: Tensor

    @property
    def paths(self) -> list[str]:
        """The first channel's file."""
        return [str(self.image.path)]


def load_scan(paths: Sequence[Path], mask: str | Path = "auto") -> OwnScan:
    """Read a scan's channels, which must share a grid. InputError for unreadable files and other grids."""
    images = [read_scan(path) for path in paths]
    if len(images) > 1:
        check_same_grid(images, "channels on different grids come with registration, in a later version")
    observed = torch.from_numpy(np.stack([observed_mask(image, mask) for image in images]))
    data = torch.from_numpy(np.stack([np.asarray(image.data, np.float32) for image in images]))
    return OwnScan(images[0], torch.where(observed, data, 0.0), observed)


def scan_on_grid(
    intensities: Tensor, observed: Tensor, image: Image, grid: Grid, align: str
) -> tuple[Tensor, Tensor, np.ndarray]:
    """A scan (C, X, Y, Z) on the prior's grid: scan and observed (C, *grid), and the matrix grid → scan."""
    matrix = alignment_matrix(align, image, grid)
    weight = resample(observed.to(intensities.dtype), matrix, grid.shape)
    filled = resample(intensities, matrix, grid.shape)
    seen = weight > 0.5
    return torch.where(seen, filled / weight.clamp(min=0.5), 0.0), seen, matrix


def labels_on_grid(
    image: Image, table: LabelTable, mapping: dict[int, int], grid: Grid, align: str
) -> tuple[Tensor, Tensor]:
    """A label map on the prior's grid: (positions (*grid) int64, inside its field of view (1, *grid) bool)."""
    values = apply_map(np.asarray(image.data), mapping) if mapping else np.asarray(image.data)
    positions = torch.from_numpy(table.to_positions(values, image.path).astype(np.int64))
    matrix = alignment_matrix(align, image, grid)
    return resample_labels(positions, matrix, grid.shape), inside(matrix, image.shape, grid.shape)[None]
