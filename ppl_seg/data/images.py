"""Images: scans, label maps and masks read into arrays with their geometry, and written on the same grid."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ppl_seg.data.geometry import read_geometry, spacing_of
from ppl_seg.data.names import freesurfer_subject, is_scan_name
from ppl_seg.data.nifti import open_image, read_voxels
from ppl_seg.errors import InputError
from ppl_seg.files import replacing

GRID_TOLERANCE = 1e-3  # largest difference between affines of one grid
FEW_VALUES = 16  # integer images with at most so many values are label maps, not scans
_LARGEST_OVERSHOOT = 1.5  # of a mask that was interpolated by splines
_PIECE = 2**20  # voxels looked at together
_NEIGHBOURS_OF_A_LABEL_MAP = 0.8  # share of equal neighbours (below) from which an integer image is a label map
_NEIGHBOURS_OF_A_SCAN = 0.3  # and up to which it is a scan


@dataclass(frozen=True)
class Image:
    """Voxels in the file's own order and where they lie.

    `data` (X, Y, Z), one slice for a 2-D image; `affine` (4, 4) float64, voxel index to RAS mm; `header` the
    file's geometry alone (what `write_image` copies); `warnings` one line each, to be shown to the user.
    """

    data: np.ndarray
    affine: np.ndarray
    path: Path
    header: Any
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        x, y, z = self.data.shape
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along each axis (mm)."""
        return spacing_of(self.affine)

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel (mm³): |det affine[:3, :3]|."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))


def read_scan(path: str | os.PathLike[str]) -> Image:
    """A scan as float32; NaN and Inf are kept (the observed mask drops them) and counted in a warning.

    Raises InputError for what is no scan: see the table of bad inputs in the README.
    """
    path = Path(path)
    if not is_scan_name(path):
        raise InputError(f"{path}: named as a label map, mask or one of our outputs; expected a scan")
    image = _read(path, np.float32)
    data = image.data
    finite = np.isfinite(data)
    values, warnings = data, list(image.warnings)
    if not finite.all():
        if not finite.any():
            raise InputError(f"{path}: no voxel is a finite number")
        values = data[finite]
        warnings.append(f"{path}: {data.size - values.size} voxels are NaN or Inf; they are taken as unobserved")
    if values.min() == values.max():
        raise InputError(f"{path}: every voxel is {values.flat[0]:g}; expected a scan")
    if all((piece == np.round(piece)).all() for piece in _pieces(values)):
        few = len(_distinct(values, FEW_VALUES)) <= FEW_VALUES
        if few or _equal_neighbours(data) >= _NEIGHBOURS_OF_A_LABEL_MAP:
            raise InputError(
                f"{path}: a label map (integers {_shorten(_distinct(values))}) where a scan is expected; give the scan"
            )
    return Image(data, image.affine, path, image.header, tuple(warnings))


def read_label_map(path: str | os.PathLike[str], empty_ok: bool = False) -> Image:
    """A label map as int32. InputError for values that are not integers, a scan, or (unless `empty_ok`) all zero."""
    path = Path(path)
    image = _read(path, None)
    for piece in _pieces(image.data) if image.data.dtype.kind == "f" else ():
        with np.errstate(invalid="ignore"):  # NaN and Inf differ from everything and are listed
            strange = ~(np.abs(piece - np.round(piece)) <= 1e-4)
        if strange.any():
            raise InputError(
                f"{path}: a label map holds integers; found {_shorten(_distinct(piece[strange]))}: a scan or "
                "probabilities? give the label map"
            )
    low, high = image.data.min(), image.data.max()
    if low < -(2**31) or high >= 2**31:
        raise InputError(f"{path}: label values {low:g} to {high:g} do not fit 32 bits")
    data = np.empty_like(image.data, np.int32)
    for whole, own in zip(_pieces(data), _pieces(image.data), strict=True):
        whole[...] = np.round(own)
    distinct = _distinct(data)
    if not empty_ok and len(distinct) == 1 and distinct[0] == 0:
        raise InputError(f"{path}: all voxels are 0; expected a label map with at least one structure")
    if len(distinct) > 4 * FEW_VALUES and _equal_neighbours(data) <= _NEIGHBOURS_OF_A_SCAN:
        raise InputError(
            f"{path}: looks like a scan ({len(distinct)} values, {_shorten(distinct)}); give the label map"
        )
    return Image(data, image.affine, path, image.header, image.warnings)


def read_mask(path: str | os.PathLike[str]) -> Image:
    """A mask as bool: > 0, or ≥ 0.5 where values are probabilities, or a mask's that were interpolated.

    Raises InputError where it is empty. A warning for values below 0, and for many of them, which may be scaled
    probabilities or a scan that was cut out.
    """
    path = Path(path)
    image = _read(path, np.float32)
    values, warnings = image.data[np.isfinite(image.data)], image.warnings
    probabilities = values.size and abs(values).max() <= _LARGEST_OVERSHOOT and (values % 1 != 0).any()
    with np.errstate(invalid="ignore"):
        data = image.data >= 0.5 if probabilities else image.data > 0
    if not data.any():
        raise InputError(f"{path}: the mask is empty; expected values above 0 where the scan is to be used")
    many = values.size and (values.min() < 0 or len(_distinct(values, FEW_VALUES)) > FEW_VALUES)
    if many and not probabilities and freesurfer_subject(path) is None:  # its brainmask.mgz is a scan, cut out
        warnings += (
            f"{path}: a mask of values {values.min():g} to {values.max():g}; all above 0 are taken for inside",
        )
    return Image(data, image.affine, path, image.header, warnings)


def write_image(path: str | os.PathLike[str], data: np.ndarray, like: Image) -> None:
    """Writes `data` (X, Y, Z), or S of them (S, X, Y, Z) as the file's fourth axis, on the grid of `like`.

    Integers (and bool) get the smallest of uint8, uint16, int16, int32 that holds them, the rest float32.
    Of `like` only shape, sform, qform, their codes and the spatial unit are copied. The file appears whole
    or not at all.
    """
    data = _spatial_axes_first(np.asarray(data), like)
    if data.dtype.kind in "iub":
        low, high = (int(data.min()), int(data.max())) if data.size else (0, 0)
        kind = next((k for k in (np.uint8, np.uint16, np.int16, np.int32) if _holds(k, low, high)), None)
        if kind is None:
            raise ValueError(f"values {low} to {high} do not fit 32 bits")
        _write(Path(path), data.astype(kind), kind, like, slope=1.0)
    else:
        _write(Path(path), data.astype(np.float32), np.float32, like, slope=1.0)


def write_probabilities(path: str | os.PathLike[str], probs: np.ndarray, like: Image) -> None:
    """Writes probabilities (M, X, Y, Z) as the file's fourth axis, uint8 with scl_slope 1/255."""
    probs = np.asarray(probs)
    if probs.ndim != 4:
        raise ValueError(f"expected probabilities (M, X, Y, Z), got the shape {probs.shape}")
    _write(Path(path), _spatial_axes_first(probs, like), np.uint8, like, slope=1 / 255)


def same_grid(a: Image, b: Image) -> bool:
    """Whether the voxels of both lie at the same places: equal shapes, affines within 1e-3."""
    return a.shape == b.shape and bool(np.abs(a.affine - b.affine).max() <= GRID_TOLERANCE)


def check_same_grid(images: Sequence[Image], hint: str) -> None:
    """Raises InputError with both grids, and `hint` as the way out, where a grid is not the first's."""
    for image in images[1:]:
        if not same_grid(images[0], image):
            raise InputError(
                f"{image.path}: its grid is {describe_grid(image)}, that of {images[0].path} is "
                f"{describe_grid(images[0])}; {hint}"
            )


def describe_spacings(images: Sequence[Image]) -> list[str]:
    """One line for each voxel size but the commonest, with its files; nothing where all have one size (to 1 %)."""
    kinds: list[list[Image]] = []
    for image in images:
        own = next((kind for kind in kinds if np.allclose(kind[0].spacing, image.spacing, rtol=0.01)), None)
        if own is None:
            kinds.append(own := [])
        own.append(image)
    common, *others = sorted(kinds, key=len, reverse=True)
    sizes = ["x".join(f"{size:.3g}" for size in kind[0].spacing) for kind in (common, *others)]
    return [
        f"{', '.join(str(image.path) for image in kind)}: voxels of {size} mm, {len(common)} others have {sizes[0]} mm"
        for kind, size in zip(others, sizes[1:], strict=True)
    ]


def describe_grid(image: Image) -> str:
    """Shape and affine in one line."""
    return f"{'x'.join(map(str, image.shape))} with affine {np.round(image.affine[:3], 3).tolist()}"


def _read(path: Path, dtype: type | None) -> Image:
    source = open_image(path)
    squeezed = list(source.shape)
    while len(squeezed) > 3 and squeezed[-1] == 1:
        squeezed.pop()
    squeezed += [1] * (3 - len(squeezed))
    if len(squeezed) > 3:
        raise InputError(
            f"{path}: its shape is {source.shape}, expected three axes; give one file per contrast, see --channels"
        )
    affine, header, warnings = read_geometry(source.header, tuple(squeezed), path)
    data = read_voxels(source, path, dtype).reshape(squeezed, order="F")
    return Image(data, affine, path, header, (*source.warnings, *warnings))


def _pieces(data: np.ndarray) -> Iterator[np.ndarray]:
    """Views that make up `data`, of a size whose temporary copies do not count."""
    flat = data.reshape(-1, order="A")  # a view: what was read is contiguous
    return (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))


def _distinct(values: np.ndarray, most: int | None = None) -> np.ndarray:
    """The distinct values, sorted; some of them as soon as there are more than `most`."""
    found = np.empty(0, values.dtype)
    for piece in _pieces(values):
        found = np.union1d(found, piece)
        if most is not None and len(found) > most:
            break
    return found


def _equal_neighbours(data: np.ndarray) -> float:
    """Of the neighbours along any axis where neither is the commonest value: the share that is equal.

    Close to 1 in label maps, close to 0 in scans, where noise sets neighbours apart.
    """
    sample = data.reshape(-1, order="A")[:: max(1, data.size // _PIECE)]
    values, counts = np.unique(sample, return_counts=True)
    foreground = data != values[counts.argmax()]
    equal = pairs = 0
    for axis in range(data.ndim):
        a, b = np.moveaxis(data, axis, 0)[:-1], np.moveaxis(data, axis, 0)[1:]
        both = np.moveaxis(foreground, axis, 0)[:-1] & np.moveaxis(foreground, axis, 0)[1:]
        equal += int(((a == b) & both).sum())
        pairs += int(both.sum())
    return equal / pairs if pairs else 0.0


def _shorten(values: np.ndarray, most: int = 8) -> str:
    """The first values, and how many there are."""
    text = ", ".join(f"{value:g}" for value in values[:most])
    return text + (f", ... ({len(values)} values)" if len(values) > most else "")


def _holds(kind: type, low: int, high: int) -> bool:
    limits = np.iinfo(kind)
    return bool(limits.min <= low and high <= limits.max)


def _spatial_axes_first(data: np.ndarray, like: Image) -> np.ndarray:
    if data.ndim == 4 and data.shape[1:] == like.shape:
        return np.moveaxis(data, 0, -1)
    if data.shape == like.shape:
        return data
    raise ValueError(f"expected the shape {like.shape}, or one more axis in front, got {data.shape}")


def _write(path: Path, data: np.ndarray, kind: type, like: Image, slope: float) -> None:
    header = like.header.copy()
    pixdim = np.array(header["pixdim"][:4])
    header.set_data_shape(data.shape)
    header["pixdim"][:4] = pixdim  # set_data_shape keeps them today; the forms depend on it
    header.set_data_dtype(kind)
    header.set_slope_inter(slope, 0.0)
    make = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = make(data, None, header)  # no affine: the header's two forms stay as they are
    with replacing(path) as temporary:
        nib.save(image, temporary)
