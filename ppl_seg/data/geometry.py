"""Where the voxels of a file lie in the world (mm), and the header that says so again for our outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from ppl_seg.errors import InputError

MILLIMETRES_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # NIfTI codes: unknown, metre, millimetre, micron
SMALLEST_SPACING, LARGEST_SPACING = 0.05, 20.0  # mm; outside, the header's units are wrong
FORM_TOLERANCE = 1e-3  # mm between qform and sform at the corners
_GEOMETRY_FIELDS = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip
UNKNOWN_SIDES = "left and right are unknown"


def read_geometry(source: Any, shape: tuple[int, ...], path: Path) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    """The affine (4, 4) in mm, a NIfTI header with the geometry of nibabel's header `source` alone, and warnings.

    `shape` is the three-dimensional shape of the voxels. The header carries the forms, codes, pixdim and
    spatial unit of the file and nothing else: no description, extension or date that could identify a person.
    Raises InputError for an affine that is singular or not finite and for impossible voxel sizes.
    """
    try:
        if isinstance(source, nib.Nifti1Header):  # Nifti2Header is a subclass
            header, warnings = _nifti_geometry(source, shape, path)
        else:
            header, warnings = _other_geometry(source, shape, path), []
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (ValueError, ArithmeticError, HeaderDataError, HeaderTypeError) as error:  # an invalid quaternion, say
        raise InputError(f"{path}: the header is damaged ({error}); copy the file again") from error
    affine[:3] *= MILLIMETRES_PER_UNIT[int(header["xyzt_units"]) & 7]
    _check_affine(affine, path)
    return affine, header, tuple(warnings)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size along each axis (mm): the lengths of the affine's columns."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def _nifti_geometry(source: Any, shape: tuple[int, ...], path: Path) -> tuple[Any, list[str]]:
    header = nib.Nifti2Header() if isinstance(source, nib.Nifti2Header) else nib.Nifti1Header()
    header.set_data_shape(shape)
    for field in _GEOMETRY_FIELDS:
        header[field] = source[field]
    pixdim = np.array(source["pixdim"][:4])
    if len(source.get_data_shape()) < 3 and pixdim[3] == 0:
        pixdim[3] = 1  # a 2-D image need not say how thick its slice is
    header["pixdim"][:4] = pixdim
    unit = int(source["xyzt_units"]) & 7
    header["xyzt_units"] = unit if unit in MILLIMETRES_PER_UNIT else 0

    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    warnings = []
    if not sform and not qform:
        warnings.append(f"{path}: sform and qform codes are both 0, so {UNKNOWN_SIDES}")
    if sform and qform:
        gap = _form_gap(header, shape)
        if np.isnan(gap):
            warnings.append(f"{path}: the qform is invalid; the sform is used")
        elif gap > FORM_TOLERANCE:
            text = f"qform and sform differ by {gap:.3g} mm at the corners"
            warnings.append(f"{path}: {text}; the sform is used")
    return header, warnings


def _other_geometry(source: Any, shape: tuple[int, ...], path: Path) -> Any:
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    affine = np.asarray(source.get_best_affine(), dtype=np.float64)
    _check_affine(affine, path)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    return header


def _qform(header: Any) -> np.ndarray | None:
    try:
        return np.asarray(header.get_qform(), dtype=np.float64)
    except Exception:  # a quaternion longer than 1, a negative voxel size
        return None


def _form_gap(header: Any, shape: tuple[int, ...]) -> float:
    """Largest distance between qform and sform over the corners (mm); nan where the qform is invalid."""
    qform = _qform(header)
    if qform is None:
        return float("nan")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    difference = np.asarray(header.get_sform(), dtype=np.float64) - qform
    gap = np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max()
    return float(gap) * MILLIMETRES_PER_UNIT[int(header["xyzt_units"]) & 7]


def _check_affine(affine: np.ndarray, path: Path) -> None:
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the affine is not finite: {affine.tolist()}; repair the header")
    spacing = spacing_of(affine)
    text = " x ".join(f"{size:.4g}" for size in spacing)
    if min(spacing) < SMALLEST_SPACING or max(spacing) > LARGEST_SPACING:
        raise InputError(
            f"{path}: voxels of {text} mm; expected {SMALLEST_SPACING:g} to {LARGEST_SPACING:g} mm; repair the header"
        )
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6 * np.prod(spacing):
        raise InputError(f"{path}: the affine is singular: {affine.tolist()}; repair the header")
