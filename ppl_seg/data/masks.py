"""What lies inside a mask, and which voxels of a scan carry information: the observed mask o."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from ppl_seg.data.cohort import Found, find_masks
from ppl_seg.data.images import Image, check_same_grid, read_mask
from ppl_seg.data.names import counterparts, parse_name
from ppl_seg.errors import InputError

SMALLEST_EMPTY_SHARE = 0.2  # of the voxels; a smaller constant region at the border is anatomy or chance

_OF_OTHER_IMAGES = frozenset({"space", "res", "den", "task", "dir", "from", "to"})  # BIDS entities


@dataclass(frozen=True)
class Masked:
    """What a mask says of a scan's voxels, (X, Y, Z) bool both, and the mask file's warnings.

    inside: the mask, where there may be a structure. observed: those of them that are finite.
    """

    inside: np.ndarray
    observed: np.ndarray
    warnings: tuple[str, ...] = ()


def apply_mask(scan: Image, mask: str | Path = "auto") -> Masked:
    """What of a scan is inside a mask:

    - `auto`: what is outside the exactly constant region connected to the border (NaN, too, is a constant there), if
      that is over 20 % of the voxels (interior voxels of the same value stay inside);
    - `none`: everything;
    - a path: the voxels of that mask image (`read_mask`), which must be on the scan's grid.

    Raises InputError for a mask of another grid, or where no observed voxel is left.
    """
    finite = np.isfinite(scan.data)
    inside, warnings = np.ones_like(finite), tuple[str, ...]()
    if mask == "auto":
        empty = _constant_border_region(scan.data, finite)
        if empty.mean() > SMALLEST_EMPTY_SHARE:
            inside = ~empty
    elif mask != "none":
        image = read_mask(mask)
        check_same_grid([scan, image], "give a mask on the scan's grid")
        inside, warnings = image.data, image.warnings
    if not (inside & finite).any():
        raise InputError(f"{scan.path}: no observed voxel is left by the mask {mask}; give another, or --mask none")
    return Masked(inside, inside & finite, warnings)


def masks_of(scans: Sequence[Found], mask: str | Path) -> list[str | Path]:
    """The mask of each scan: `auto` and `none` for all; of a folder or glob, the one whose name matches the scan's.

    BIDS names match by shared entities (a mask in another space or of a lesion does not), FreeSurfer's subjects
    (mri/brainmask.mgz) by their name, others by their path.
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
    matches = [
        [path for path in found if _is_brain_mask(path, scan.path)]
        for scan, found in zip(scans, counterparts(files, others), strict=True)
    ]
    for scan, found in zip(scans, matches, strict=True):
        if len(found) != 1:
            listed = ", ".join(map(str, found)) or "none"
            raise InputError(
                f"{scan.path}: expected one mask of the same name below {mask}, found {listed}; give a folder or a "
                "quoted glob of one mask a scan"
            )
    return [found[0] for found in matches]


def _is_brain_mask(mask: Path, scan: Path) -> bool:
    """False for a mask of something else (label-lesion), in another space or of another kind of scan (task-, dir-)."""
    own, others = parse_name(mask).entities, parse_name(scan).entities
    return own.get("label", "brain") in ("brain", "head") and not (own.keys() & _OF_OTHER_IMAGES) - others.keys()


def _constant_border_region(data: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Voxels of the border's commonest value, or not finite where most of the border is, connected to the border."""
    border = np.zeros(data.shape, dtype=bool)
    for axis, size in enumerate(data.shape):
        if size > 1:  # every voxel of a 2-D image lies at the border of its single slice
            np.moveaxis(border, axis, 0)[[0, -1]] = True
    values, counts = np.unique(data[border & finite], return_counts=True)
    without = int((border & ~finite).sum())
    region, _ = ndimage.label(data == values[counts.argmax()] if counts.max(initial=0) > without else ~finite)
    touching = np.unique(region[border])
    return np.isin(region, touching[touching > 0])
