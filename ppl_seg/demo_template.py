"""The demo's template label map, cut by geometry out of a brain template that nilearn carries in its wheel.

The ICBM 2009a symmetric template (Fonov et al. 2011, NeuroImage 54:313-327) comes with grey- and white-matter
maps; what they do not say (left and right, cerebellum, brain-stem, deep grey, which fluid is a ventricle) is
said here by surfaces and ellipsoids in MNI millimetres. Plausible, not authoritative: good enough to deform
into a population, not to measure.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from nilearn import datasets
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import RegularGridInterpolator

Array = NDArray[Any]

SPACING_MM = 2.0


@dataclass(frozen=True)
class Structure:
    """One label: FreeSurfer index, name and color, and the tissue that gives it its intensity."""

    index: int
    name: str
    tissue: str
    color: str


def _pair(left: int, right: int, name: str, tissue: str, color: str) -> list[Structure]:
    return [Structure(left, f"Left-{name}", tissue, color), Structure(right, f"Right-{name}", tissue, color)]


STRUCTURES: tuple[Structure, ...] = tuple(
    sorted(
        [
            *_pair(2, 41, "Cerebral-White-Matter", "white", "#F5F5F5"),
            *_pair(3, 42, "Cerebral-Cortex", "cortex", "#CD3E4E"),
            *_pair(4, 43, "Lateral-Ventricle", "fluid", "#781286"),
            *_pair(7, 46, "Cerebellum-White-Matter", "white", "#DCF8A4"),
            *_pair(8, 47, "Cerebellum-Cortex", "cortex", "#E69422"),
            *_pair(10, 49, "Thalamus", "thalamus", "#00760E"),
            *_pair(11, 50, "Caudate", "striatum", "#7ABADC"),
            *_pair(12, 51, "Putamen", "striatum", "#EC0DB0"),
            Structure(16, "Brain-Stem", "stem", "#779FB0"),
            Structure(24, "CSF", "fluid", "#3C3C3C"),
        ],
        key=lambda structure: structure.index,
    )
)

# Height z (mm) of the tentorium, the sheet between cerebrum and cerebellum: a row for each y, a column a |x|.
_TENTORIUM_X = (0.0, 8.0, 16.0, 24.0, 34.0, 46.0, 70.0)
_TENTORIUM_Y = (-110.0, -92.0, -75.0, -60.0, -50.0, -40.0, -30.0, -20.0, -12.0)
_TENTORIUM_Z = (
    (-24.0, -23.0, -22.0, -23.0, -24.0, -27.0, -31.0),
    (-22.0, -21.5, -21.0, -22.0, -23.0, -27.0, -31.0),
    (-12.0, -13.0, -14.0, -16.5, -20.0, -25.0, -30.0),
    (1.0, -5.0, -10.0, -15.0, -19.0, -25.0, -30.0),
    (1.0, -3.0, -9.5, -15.0, -20.5, -27.0, -32.0),
    (-5.0, -8.0, -13.0, -19.0, -24.0, -31.0, -37.0),
    (-10.0, -14.0, -20.0, -26.0, -31.0, -37.0, -42.0),
    (-12.0, -16.0, -24.0, -34.0, -45.0, -50.0, -60.0),
    (-72.0, -72.0, -72.0, -72.0, -72.0, -72.0, -72.0),
)
# The brain-stem seen from the side: y (mm) of its front and of its back, and half its width, at heights z.
_STEM_Z = (-66.0, -56.0, -48.0, -42.0, -32.0, -22.0, -14.0, -5.0)
_STEM_FRONT_Y = (-38.0, -34.0, -24.0, -10.0, -6.0, -8.0, -12.0, -18.0)
_STEM_BACK_Y = (-57.0, -53.0, -48.0, -46.0, -41.0, -38.0, -40.0, -40.0)
_STEM_HALF_WIDTH = (9.0, 10.0, 13.0, 16.0, 17.0, 17.0, 16.0, 12.0)


@functools.cache
def template_label_map() -> tuple[Array, Array]:
    """The template: indices of `STRUCTURES`, 0 outside, (X, Y, Z) int16 in voxels of 2 mm; affine to MNI mm.

    Reads files of the nilearn package only. The arrays are shared between calls, hence read-only.
    """
    image, grey, white, affine = _tissue_maps()
    x, y, z = _coordinates(image.shape, affine)
    inside = (image > 0.02) & (z > _STEM_Z[0])
    solid = inside & (image > 0.47)
    below = z < _tentorium(image, x, y, z)
    ventricle = _ventricles(image, x, y, z)

    labels = np.where(inside, 24, 0)
    labels[solid] = np.where(below, np.where(white > grey, 7, 8), np.where(white > grey, 2, 3))[solid]
    # The average over persons has a false grey rim around the ventricles, and nuclei that get no label here.
    deep = _ellipsoid(x, y, z, (0.0, -8.0, 6.0), (34.0, 42.0, 20.0))
    rim = ndimage.distance_transform_edt(~ventricle, sampling=SPACING_MM) < 6.0
    labels[(deep | rim & (z > -2.0)) & (labels == 3)] = 2
    labels[_stem(x, y, z) & solid] = 16
    labels[_thalamus(x, y, z) & solid] = 10
    labels[_putamen(x, y, z) & solid & (image < 0.80)] = 12
    labels[_caudate(x, y, z) & solid & (image < 0.82)] = 11
    labels[ventricle] = 4
    for left, right in ((2, 41), (3, 42), (4, 43), (7, 46), (8, 47), (10, 49), (11, 50), (12, 51)):
        labels[(labels == left) & (x > 0)] = right
    labels = _largest_parts(labels)
    labels = np.where((labels == 0) & _envelope(inside), 24, labels).astype(np.int16)
    labels.setflags(write=False)
    affine.setflags(write=False)
    return labels, affine


def _tissue_maps() -> tuple[Array, Array, Array, Array]:
    """T1-weighted image, grey and white matter in [0, 1] on 2 mm voxels (means of 2x2x2), and the affine."""
    images = (
        datasets.load_mni152_template(resolution=1),
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
    )
    affine = np.array(images[0].affine, dtype=float)
    affine[:3, 3] += affine[:3, :3] @ np.full(3, 0.5)
    affine[:3, :3] *= SPACING_MM
    image, grey, white = (_halved(np.asarray(each.get_fdata(dtype=np.float32))) for each in images)
    return image, grey, white, affine


def _halved(volume: Array) -> Array:
    padded = np.pad(volume, [(0, size % 2) for size in volume.shape])
    nx, ny, nz = (size // 2 for size in padded.shape)
    return np.asarray(padded.reshape(nx, 2, ny, 2, nz, 2).mean(axis=(1, 3, 5)))


def _coordinates(shape: tuple[int, ...], affine: Array) -> tuple[Array, Array, Array]:
    """x, y, z in mm, each shaped to broadcast over the grid (the affine is diagonal)."""
    axes = [affine[i, i] * np.arange(size) + affine[i, 3] for i, size in enumerate(shape)]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return x, y, z


def _ellipsoid(x: Array, y: Array, z: Array, centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    terms = (((v - c) / r) ** 2 for v, c, r in zip((x, y, z), centre, radii, strict=True))
    return np.asarray(sum(terms) < 1.0)


def _tentorium(image: Array, x: Array, y: Array, z: Array) -> Array:
    """Height (X, Y, 1) in mm of the darkest voxel within 5 mm of the tabulated sheet, smoothed sideways."""
    sheet = RegularGridInterpolator((_TENTORIUM_Y, _TENTORIUM_X), _TENTORIUM_Z)
    limits = np.clip(y, _TENTORIUM_Y[0], _TENTORIUM_Y[-1]), np.clip(np.abs(x), 0.0, _TENTORIUM_X[-1])
    offset = z - sheet(tuple(np.broadcast_arrays(*limits)))
    darkness = np.where(np.abs(offset) <= 5.0, image + 0.004 * offset**2, np.inf)
    height = np.take_along_axis(np.broadcast_to(z, image.shape), darkness.argmin(2)[..., None], 2)
    return np.asarray(ndimage.median_filter(height, size=(5, 5, 1)))


def _stem(x: Array, y: Array, z: Array) -> Array:
    front, back, half = (np.interp(z, _STEM_Z, v) for v in (_STEM_FRONT_Y, _STEM_BACK_Y, _STEM_HALF_WIDTH))
    return np.asarray((z < _STEM_Z[-1]) & (y < front) & (y > back) & (np.abs(x) < half))


def _ventricles(image: Array, x: Array, y: Array, z: Array) -> Array:
    """Lateral ventricles: the largest dark part of each side, without third ventricle and cisterns behind."""
    side = np.abs(x)
    box = (side < 36.0) & (z > -6.0) & (z < 31.0) & (y > -62.0) & (y < 36.0)
    middle = (y < 0.0) & (side < np.where(z < 14.0, 14.0, 2.0)) | (y < -36.0) & (side < 14.0)
    dark = (image > 0.02) & (image < 0.50) & box & ~middle
    return _largest(dark & (x < 0)) | _largest(dark & (x > 0))


def _caudate(x: Array, y: Array, z: Array) -> Array:
    side = np.abs(x)
    head = _ellipsoid(side, y, z, (13.0, 13.0, 4.0), (8.5, 14.0, 13.0))
    along = np.clip((6.0 - y) / 22.0, 0.0, 1.0)
    tube = (side - 14.0 - 5.0 * along) ** 2 + (z - 13.0 - 6.0 * along) ** 2 < 5.0**2
    return head | tube & (y < 8.0) & (y > -18.0)


def _putamen(x: Array, y: Array, z: Array) -> Array:
    return _ellipsoid(np.abs(x) + 0.28 * (y - 3.0), y, z, (26.0, 3.0, 2.0), (6.5, 20.0, 12.0))


def _thalamus(x: Array, y: Array, z: Array) -> Array:
    return _ellipsoid(np.abs(x) + 0.30 * (y + 18.0), y, z, (11.0, -18.0, 7.0), (10.5, 16.0, 11.0))


def _largest(mask: Array) -> Array:
    parts, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count == 0:
        return mask
    return np.asarray(parts == 1 + np.bincount(parts.ravel())[1:].argmax())


def _largest_parts(labels: Array) -> Array:
    """Each label reduced to its largest part; what is left over takes the label of the nearest kept voxel."""
    kept = labels == 0
    for label in np.unique(labels[labels > 0]):
        kept |= _largest(labels == label)
    nearest = ndimage.distance_transform_edt(~kept, return_distances=False, return_indices=True)
    return np.asarray(labels[tuple(nearest)])


def _envelope(inside: Array) -> Array:
    """The brain with its sulci closed (8 mm) and 3 mm of fluid around it."""
    grown = ndimage.distance_transform_edt(~inside, sampling=SPACING_MM) < 8.0
    return np.asarray(ndimage.distance_transform_edt(grown, sampling=SPACING_MM) > 5.0)
