"""Files brought onto the prior's grid: label maps as positions, scans with what of them is observed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_seg.data.channels import align_channel, check_channel_alignment
from ppl_seg.data.images import Image, read_scan
from ppl_seg.data.labels import LabelTable, apply_map
from ppl_seg.data.masks import apply_mask
from ppl_seg.data.resampling import inside, resample, resample_labels


@dataclass(frozen=True)
class OwnScan:
    """A scan in its own voxels. intensities, observed: (C, X, Y, Z), unobserved intensities 0.

    image: the first channel, with all files' warnings. inside: (X, Y, Z), the mask, where there may be a structure;
    without a mask file what any channel shows.
    """

    image: Image
    intensities: Tensor
    observed: Tensor
    inside: Tensor


def load_scan(paths: Sequence[Path], mask: str | Path = "auto", channel_align: str = "rigid") -> OwnScan:
    """Read a scan's channels, brought to the first one's grid, see `align_channel`.

    Args:
        mask: auto, none, or a file on the first channel's grid, which then holds for all.
        channel_align: `rigid` registers them to the first, `none` trusts the headers.

    Raises:
        InputError: files that can't be read, channels that do not belong together.
    """
    check_channel_alignment(channel_align)
    first, *others = [read_scan(path) for path in paths]
    masked, from_file = apply_mask(first, mask), mask not in ("auto", "none")
    data, observed, inside = [np.where(masked.observed, first.data, 0)], [masked.observed], masked.inside
    warnings = [*first.warnings, *masked.warnings]
    for other in others:
        own = apply_mask(other, "none" if from_file else mask)
        values, seen = align_channel(first, masked.observed, other, own.observed, channel_align)
        if from_file:
            seen = seen & masked.inside
        data.append(np.where(seen, values, 0))
        observed.append(seen)
        inside = inside | seen
        warnings += other.warnings
    return OwnScan(
        replace(first, warnings=tuple(warnings)),
        torch.from_numpy(np.stack(data).astype(np.float32)),
        torch.from_numpy(np.stack(observed)),
        torch.from_numpy(inside),
    )


def scan_on_grid(
    intensities: Tensor, observed: Tensor, matrix: np.ndarray, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A scan (C, X, Y, Z) on a grid of `shape`: scan and observed (C, *shape). matrix: grid voxel → scan voxel."""
    weight = resample(observed.to(intensities.dtype), matrix, shape)
    filled = resample(intensities, matrix, shape)
    seen = weight > 0.5
    return torch.where(seen, filled / weight.clamp(min=0.5), 0.0), seen


def nearest_voxels(
    intensities: Tensor, observed: Tensor, matrix: np.ndarray, shape: Sequence[int]
) -> tuple[Tensor, Tensor, list[tuple[float, ...]]]:
    """A scan's own voxels, (C, X, Y, Z), nearest to eight places in each voxel of a grid: nothing is mixed.

    Returns:
        Intensities and observed, (8, C, *shape), and where the places lie in a voxel of the grid, eight (3,).
    """
    parts, seen, offsets = [], [], list(itertools.product((-0.25, 0.25), repeat=3))
    for offset in offsets:
        moved = np.array(matrix, np.float64)
        moved[:3, 3] += moved[:3, :3] @ offset
        seen.append(resample(observed, moved, shape, mode="nearest"))
        parts.append(torch.where(seen[-1], resample(intensities, moved, shape, mode="nearest"), 0.0))
    return torch.stack(parts), torch.stack(seen), offsets


def label_positions(image: Image, table: LabelTable, mapping: dict[int, int]) -> np.ndarray:
    """A label map (X, Y, Z) as positions of the table, int64, after the value map."""
    values = apply_map(np.asarray(image.data), mapping) if mapping else np.asarray(image.data)
    return table.to_positions(values, image.path).astype(np.int64)


def labels_on_grid(
    image: Image, table: LabelTable, mapping: dict[int, int], matrix: np.ndarray, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A label map on a grid of `shape`: (positions int64, inside its field of view (1, *shape) bool)."""
    positions = torch.from_numpy(label_positions(image, table, mapping))
    return resample_labels(positions, matrix, shape), inside(matrix, image.shape, shape)[None]
