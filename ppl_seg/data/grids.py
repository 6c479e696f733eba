"""The grid of a prior, and where its voxels lie in an image: one matrix, grid voxel to image voxel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ppl_seg.data.geometry import spacing_of
from ppl_seg.errors import InputError

MOST_VOXELS = 1_000_000
SMALL_FIELD_OF_VIEW = 80.0  # mm; below it the box was drawn around a structure and its centre means something
PERMUTATION_TOLERANCE = 1e-3
_SLACK = 1e-3  # of a voxel: rounding of affines must not add a slice


class Placed(Protocol):
    """What has voxels somewhere: an Image or a Grid."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), voxel index to RAS mm."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid: `shape` (X, Y, Z), one slice for 2-D; `affine` (4, 4) float64, voxel to RAS mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along each axis (mm)."""
        return spacing_of(self.affine)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Grid:
        """The inverse of `to_dict`."""
        x, y, z = (int(n) for n in values["shape"])
        return cls((x, y, z), np.array(values["affine"], dtype=np.float64))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.shape == other.shape and np.array_equal(self.affine, other.affine)


def none_matrix(image_affine: np.ndarray, grid: Placed) -> np.ndarray:
    """(4, 4) grid voxel to image voxel where headers are trusted: inv(image affine) · grid affine."""
    return np.asarray(np.linalg.inv(image_affine) @ grid.affine)


def center_matrix(image_shape: Sequence[int], image_affine: np.ndarray, grid: Placed) -> np.ndarray:
    """(4, 4) grid voxel to image voxel with the image's field of view centred on the grid.

    Orientation and voxel size come from the header, the offset does not. Where the axes are those of the
    grid up to order and sign and the voxels are as large, the shift is rounded to whole voxels (in the
    direction of the grid's axes, so in one way for images of every orientation) and nothing is
    interpolated.
    """
    linear = none_matrix(image_affine, grid)[:3, :3]
    image_centre = (np.asarray(image_shape, dtype=np.float64) - 1) / 2
    grid_centre = (np.asarray(grid.shape, dtype=np.float64) - 1) / 2
    matrix = np.eye(4)
    if is_signed_permutation(linear, PERMUTATION_TOLERANCE):
        linear = np.round(linear)
        shift = linear.T @ image_centre - grid_centre
        offset = linear @ np.floor(np.round(shift, 6) + 0.5)
    else:
        offset = image_centre - linear @ grid_centre
    matrix[:3, :3], matrix[:3, 3] = linear, offset
    return matrix


def alignment_matrix(align: str, image: Placed, grid: Placed) -> np.ndarray:
    """(4, 4) grid voxel to image voxel by the alignment's name, `none` or `center`."""
    if align not in ("none", "center"):
        raise ValueError(f"alignment {align!r}: expected none or center")
    if align == "none":
        return none_matrix(image.affine, grid)
    return center_matrix(image.shape, image.affine, grid)


def default_align(images: Sequence[Placed]) -> str:
    """`center` where the median field of view is under 80 mm along any axis, else `affine`."""
    views = [np.array(image.shape) * spacing_of(image.affine) for image in images]
    return "center" if (np.median(views, axis=0) < SMALL_FIELD_OF_VIEW).any() else "affine"


def common_grid(images: Sequence[Placed], spacing: float | None = None, align: str = "center") -> Grid:
    """The axis-aligned RAS grid that holds all images, with cubic voxels of `spacing` mm.

    center: as long along each world axis as the longest field of view, its centre at the world's origin.
    none: the union of the fields of view in the world. `spacing` is by default the median voxel size,
    enlarged until the grid has at most a million voxels. Where all images are single slices across one
    world axis, so is the grid.
    """
    if not images:
        raise ValueError("common_grid needs at least one image")
    boxes = np.array([_world_box(image) for image in images])  # (images, 2, 3) low and high corners
    if align == "none":
        low, high = boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)
    else:
        extent = (boxes[:, 1] - boxes[:, 0]).max(axis=0)
        low, high = -extent / 2, extent / 2
    flat = np.asarray(np.all([_flat_world_axes(image) for image in images], axis=0))
    spacing = _chosen(spacing, default_spacing(images), high - low, flat)
    steps = np.where(flat, high - low, spacing)
    shape = _grid_shape(high - low, flat, spacing)
    affine = np.diag([*steps, 1.0])
    if align == "none":
        affine[:3, 3] = low + steps / 2  # the first voxel's corner is the box's: images of this grid are only shifted
    else:
        affine[:3, 3] = -steps * (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def cubic_grid(low: np.ndarray, high: np.ndarray, spacing: float | None, default: float) -> Grid:
    """The RAS grid of cubic voxels that fills a box (mm): `spacing`, or `default` coarsened to a million voxels."""
    extent, flat = high - low, np.zeros(3, dtype=bool)
    spacing = _chosen(spacing, default, extent, flat)
    shape = _grid_shape(extent, flat, spacing)
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = (low + high) / 2 - spacing * (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def default_spacing(images: Sequence[Placed]) -> float:
    """The median voxel size (mm) along all axes that have more than one voxel."""
    return float(np.median([size for image in images for size in _sizes(image)]))


def is_signed_permutation(linear: np.ndarray, tolerance: float) -> bool:
    """Whether a (3, 3) matrix only reorders and flips axes."""
    rounded = np.round(linear)
    return bool(
        np.abs(linear - rounded).max() <= tolerance
        and (np.abs(rounded).sum(axis=0) == 1).all()
        and (np.abs(rounded).sum(axis=1) == 1).all()
    )


def _world_box(image: Placed) -> tuple[np.ndarray, np.ndarray]:
    """Low and high corners (mm) of the field of view, to the outer faces of its voxels."""
    ends = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in image.shape], indexing="ij")).reshape(3, -1)
    corners = image.affine[:3, :3] @ ends + image.affine[:3, 3:]
    return corners.min(axis=1), corners.max(axis=1)


def _flat_world_axes(image: Placed) -> np.ndarray:
    """(3,) bool: the world axis across which the image is a single slice."""
    flat = np.zeros(3, dtype=bool)
    for axis, size in enumerate(image.shape):
        if size == 1:
            flat[np.abs(image.affine[:3, axis]).argmax()] = True
    return flat


def _sizes(image: Placed) -> list[float]:
    """Voxel sizes (mm) along the axes that have more than one voxel."""
    return [size for size, n in zip(spacing_of(image.affine), image.shape, strict=True) if n > 1]


def _grid_shape(extent: np.ndarray, flat: np.ndarray, spacing: float) -> tuple[int, int, int]:
    x, y, z = (1 if f else max(1, int(np.ceil(e / spacing - _SLACK))) for e, f in zip(extent, flat, strict=True))
    return x, y, z


def _chosen(spacing: float | None, default: float, extent: np.ndarray, flat: np.ndarray) -> float:
    """The spacing asked for, or the default one, coarsened. InputError for one that is no length or leaves no grid."""
    if spacing is None:
        return _coarsen(extent, flat, default)
    most = float(extent[~flat].min()) / 2 if not flat.all() else math.inf
    if not 0 < spacing <= most:
        raise InputError(f"--spacing {spacing:g}: expected millimetres above 0, and at most half the extent, {most:g}")
    return spacing


def _coarsen(extent: np.ndarray, flat: np.ndarray, spacing: float) -> float:
    """`spacing`, or the smallest larger multiple of 0.05 mm with at most a million voxels."""
    while np.prod(_grid_shape(extent, flat, spacing), dtype=np.float64) > MOST_VOXELS:
        spacing = (np.floor(spacing / 0.05 + 1e-6) + 1) * 0.05
    return round(float(spacing), 6)
