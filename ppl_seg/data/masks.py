"""Which voxels of a scan carry information: the observed mask o."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from ppl_seg.data.cohort import Found, find_masks
from ppl_seg.data.images import Image, check_same_grid, read_mask
from ppl_seg.data.names import counterparts
from ppl_seg.errors import InputError

SMALLEST_EMPTY_SHARE = 0.2  # of the voxels; a smaller constant region at the border is anatomy or chance


def observed_mask(scan: Image, mask: str | Path = "auto") -> np.ndarray:
    """Observed voxels (X, Y, Z) bool of a scan: finite, and

    - `auto`: outside the exactly constant region connected to the border, if that is over 20 % of the voxels
      (interior voxels of the same value stay observed);
    - `none`: nothing more;
    - a path: inside that mask image (`read_mask`), which must be on the scan's grid.

    Raises InputError for a mask of another grid, or where no observed voxel is left.
    """
    observed = np.isfinite(scan.data)
    if mask == "auto":
        empty = _constant_border_region(scan.data, observed)
        if empty.mean() > SMALLEST_EMPTY_SHARE:
            observed &= ~empty
    elif mask != "none":
        image = read_mask(mask)
        check_same_grid([scan, image], "give a mask on the scan's grid")
        observed &= image.data
    if not observed.any():
        raise InputError(f"{scan.path}: no observed voxel is left by the mask {mask}; give another, or --mask none")
    return observed


def masks_of(scans: Sequence[Found], mask: str | Path) -> list[str | Path]:
    """The mask of each scan: `auto` and `none` for all; of a folder or glob, the one whose name matches the scan's.

    BIDS names match by shared entities, FreeSurfer's subjects (mri/brainmask.mgz) by their name, others by their path.
    Raises InputError for one mask file and several scans, and for a scan with no mask or several.
    """
    if mask in ("auto", "none"):
        return [mask] * len(scans)
    there = find_masks(mask)
    if Path(mask).is_file():
        if len(scans) > 1:
            raise InputError(f"{mask}: one mask for {len(scans)} scans; give the folder of their masks (*_mask.nii.gz)")
        return [Path(mask)]
    files, others = ([(found.path, found.base) for found in some] for some in (scans, there))
    matches = counterparts(files, others)
    for scan, found in zip(scans, matches, strict=True):
        if len(found) != 1:
            listed = ", ".join(map(str, found)) or "none"
            raise InputError(f"{scan.path}: expected one mask of the same name below {mask}, found {listed}")
    return [found[0] for found in matches]


def _constant_border_region(data: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Voxels of the border's commonest value that are connected to the border."""
    border = np.zeros(data.shape, dtype=bool)
    for axis, size in enumerate(data.shape):
        if size > 1:  # every voxel of a 2-D image lies at the border of its single slice
            np.moveaxis(border, axis, 0)[[0, -1]] = True
    values, counts = np.unique(data[border & finite], return_counts=True)
    if not len(values):
        return np.zeros(data.shape, dtype=bool)
    region, _ = ndimage.label(data == values[counts.argmax()])
    touching = np.unique(region[border])
    return np.isin(region, touching[touching > 0])
