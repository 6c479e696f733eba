"""A simulated population for the demo: label maps of persons who never existed, and scans of them.

Each person is a diffeomorphic deformation of the one template of `demo_template`: a small affine map and the
flow of a stationary velocity field by scaling and squaring (Arsigny et al. 2006, "A log-Euclidean framework
for statistics on diffeomorphisms", MICCAI), in which the ventricles, the deep nuclei, cerebellum, brain-stem
and the fluid also grow or shrink on their own. All of them come from one template: what works here still has
to be shown on real people.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ppl_seg.demo_template import STRUCTURES, template_label_map

Array = NDArray[Any]
Contrast = Literal["t1", "inverted"]

SUFFIX: dict[Contrast, str] = {"t1": "T1w", "inverted": "T2w"}
FIRST_SCANNED_PERSON = 101

# The box that all persons are drawn in, MNI mm: its size, its centre, and the spacing of the velocity field.
_EXTENT = np.array([160.0, 192.0, 160.0])
_CENTRE = np.array([0.0, -17.0, 7.0])
_FIELD_SPACING = 4.0

# Structures that grow on their own: labels of each side, mean and standard deviation of the growth (mm).
_GROWTH: tuple[tuple[tuple[int, ...], float, float], ...] = (
    ((4, 43), 1.0, 2.5),
    ((10, 49), 0.0, 1.5),
    ((11, 50), 0.0, 1.5),
    ((12, 51), 0.0, 1.5),
    ((8, 47), 0.0, 2.0),
    ((16,), 0.0, 2.0),
    ((24,), 0.0, 0.8),
)

# Mean intensity of each tissue. Many structures share one, or nearly: cortex and striatum, white and stem.
_MEANS: dict[Contrast, dict[str, float]] = {
    "t1": {"white": 0.80, "stem": 0.76, "thalamus": 0.67, "striatum": 0.59, "cortex": 0.55, "fluid": 0.20},
    "inverted": {
        "white": 0.36,
        "stem": 0.39,
        "thalamus": 0.46,
        "striatum": 0.53,
        "cortex": 0.56,
        "fluid": 0.92,
    },
}
_RIM_MEAN: dict[Contrast, float] = {"t1": 0.42, "inverted": 0.50}
# Noise, and standard deviation of the logarithm of the bias field, where white matter in T1 contrast has 0.8.
_NOISE = 0.08
_BIAS = 0.12
# Random velocity of every person: standard deviation per axis, and length scale, mm.
_BROAD, _BROAD_LENGTH = 3.0, 45.0
_FINE, _FINE_LENGTH = 0.4, 14.0


@dataclass(frozen=True)
class PopulationFiles:
    """What `write_population` wrote: `scans[i]` and `truth[i]` are one person, who is not in `label_maps`."""

    label_maps: tuple[Path, ...]
    scans: tuple[Path, ...]
    truth: tuple[Path, ...]
    table: Path


def population_grid(spacing: float = 4.0) -> tuple[tuple[int, int, int], Array]:
    """Shape and affine (4, 4) to MNI mm of the grid that all persons share, at `spacing` mm."""
    if not spacing > 0:
        raise ValueError(f"spacing must be positive, in mm; found {spacing}")
    nx, ny, nz = (round(float(extent) / spacing) for extent in _EXTENT)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = _CENTRE - spacing * (np.array([nx, ny, nz]) - 1) / 2
    return (nx, ny, nz), affine


def make_label_maps(num: int, seed: int = 0, spacing: float = 4.0, first: int = 1) -> Array:
    """Label maps of the persons `first`, `first` + 1, ...: (num, X, Y, Z) int16 on the grid of `spacing` mm.

    A person depends on `seed` and on its own number alone, not on `num`.
    """
    maps = [_label_map(np.random.default_rng([seed, first + i]), spacing) for i in range(num)]
    return np.stack(maps) if maps else np.zeros((0, *population_grid(spacing)[0]), np.int16)


def make_scan(label_map: Array, contrast: Contrast = "inverted", seed: int = 0) -> Array:
    """A scan (X, Y, Z) float32 of one label map: tissue means, texture, partial volume, bias field and noise.

    0 outside a brain extraction that left some meninges standing: they have an intensity and no label.
    Contrast "t1" has white matter bright, "inverted" dark. The scale is arbitrary and differs between scans.
    """
    rng = np.random.default_rng([seed, 1])
    shape = label_map.shape
    brain = label_map > 0
    near = ndimage.gaussian_filter(brain.astype(float), 1.0)
    rim = (near > 0.1) & (near + 0.12 * _smooth_noise(rng, shape, 2.5) > 0.30)
    values = np.where(brain, 0.0, _RIM_MEAN[contrast] + 0.08 * _smooth_noise(rng, shape, 1.0))
    means = {tissue: mean + 0.015 * rng.standard_normal() for tissue, mean in _MEANS[contrast].items()}
    for structure in STRUCTURES:
        values[label_map == structure.index] = means[structure.tissue]
    values += 0.015 * _smooth_noise(rng, shape, 1.5)
    values = ndimage.gaussian_filter(values, 0.45)
    bias = np.exp(_BIAS * _smooth_noise(rng, shape, min(shape) / 5))
    values = np.abs(values * bias + _NOISE * rng.standard_normal(shape))
    gain = np.exp(rng.uniform(np.log(100.0), np.log(2000.0)))
    return np.asarray(np.where(brain | rim, gain * values, 0.0), dtype=np.float32)


def write_population(
    out: Path | str,
    num_prior: int = 24,
    num_scans: int = 12,
    spacing: float = 4.0,
    seed: int = 0,
    contrast: Contrast = "inverted",
) -> PopulationFiles:
    """Write the population below `out`, a folder that is made if missing.

    `labels/sub-01_dseg.nii.gz` ... for a prior; `scans/sub-101_T2w.nii.gz` ... (`_T1w` for "t1") of other
    persons, with their `truth/sub-101_dseg.nii.gz`; and `labels.tsv` (index, name, color).
    """
    if num_prior >= FIRST_SCANNED_PERSON:
        raise ValueError(f"num_prior must be below {FIRST_SCANNED_PERSON}; found num_prior={num_prior}")
    out = Path(out)
    for folder in ("labels", "scans", "truth"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _, affine = population_grid(spacing)
    label_maps, scans, truth = [], [], []
    for person, labels in enumerate(make_label_maps(num_prior, seed, spacing).astype(np.uint8), start=1):
        label_maps.append(_write(out / "labels" / f"sub-{person:02d}_dseg.nii.gz", labels, affine))
    scanned = make_label_maps(num_scans, seed, spacing, first=FIRST_SCANNED_PERSON).astype(np.uint8)
    for person, labels in enumerate(scanned, start=FIRST_SCANNED_PERSON):
        scan = make_scan(labels, contrast, seed=1000 * seed + person)
        scans.append(_write(out / "scans" / f"sub-{person}_{SUFFIX[contrast]}.nii.gz", scan, affine))
        truth.append(_write(out / "truth" / f"sub-{person}_dseg.nii.gz", labels, affine))
    table = out / "labels.tsv"
    rows = [("index", "name", "color"), ("0", "Background", "#000000")]
    rows += [(str(structure.index), structure.name, structure.color) for structure in STRUCTURES]
    table.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return PopulationFiles(tuple(label_maps), tuple(scans), tuple(truth), table)


def _write(path: Path, data: Array, affine: Array) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code="mni")
    image.set_qform(affine, code="mni")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def _label_map(rng: np.random.Generator, spacing: float) -> Array:
    """One person: the label with the largest share at the deformed place of every voxel."""
    shape, to_world = population_grid(spacing)
    fractions, from_world = _template_fractions(spacing)
    matrix = _random_affine(rng)
    places = _apply(to_world, _voxels(shape))
    at_field = _apply(np.linalg.inv(_field_affine()), places)
    displacement = _flow(_random_velocity(rng))
    places = places + np.stack([_sample(component, at_field) for component in displacement])
    places = _apply(from_world @ matrix, places)
    labels = np.zeros(shape, np.int16)
    largest = _sample(fractions[0], places, outside=1.0)
    for structure, fraction in zip(STRUCTURES, fractions[1:], strict=True):
        values = _sample(fraction, places)
        labels[values > largest] = structure.index
        np.maximum(largest, values, out=largest)
    return labels


@functools.lru_cache(maxsize=2)
def _template_fractions(spacing: float) -> tuple[Array, Array]:
    """Share of each label around every template voxel (1 + structures, X, Y, Z); MNI mm to voxels.

    The template is blurred to about the voxels it will be sampled at: taking single points of it would alias.
    """
    labels, affine = template_label_map()
    sigma = 0.35 * spacing / affine[0, 0]
    indices = (0, *(structure.index for structure in STRUCTURES))
    masks = ((labels == index).astype(np.float32) for index in indices)
    fractions = np.stack([ndimage.gaussian_filter(mask, sigma, truncate=3.0) for mask in masks])
    return fractions, np.linalg.inv(affine)


def _voxels(shape: tuple[int, ...]) -> Array:
    """Voxel coordinates (3, X, Y, Z) of a grid."""
    return np.indices(shape).astype(float)


def _apply(matrix: Array, places: Array) -> Array:
    """An affine map (4, 4) of places (3, X, Y, Z)."""
    return np.asarray(np.tensordot(matrix[:3, :3], places, 1) + matrix[:3, 3].reshape(3, 1, 1, 1))


def _sample(volume: Array, places: Array, outside: float | None = None) -> Array:
    """Linear interpolation at places in voxels; beyond the border `outside`, or its value if None."""
    if outside is None:
        return np.asarray(ndimage.map_coordinates(volume, places, order=1, mode="nearest"))
    return np.asarray(ndimage.map_coordinates(volume, places, order=1, mode="constant", cval=outside))


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    """Gaussian noise blurred by `sigma` voxels, mean 0 and standard deviation 1 over the grid."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    return np.asarray((noise - noise.mean()) / noise.std())


def _random_affine(rng: np.random.Generator) -> Array:
    """Scaling, rotation, shear and shift about the centre of the box (mm), all small."""
    turn = 0.04 * np.triu(rng.standard_normal((3, 3)), 1)
    # The template is larger than most brains, and sampling further out makes a person smaller.
    size = np.exp(0.06 + 0.03 * rng.standard_normal())
    matrix = np.eye(4)
    matrix[:3, :3] = size * np.eye(3) + 0.02 * rng.standard_normal((3, 3)) + turn - turn.T
    matrix[:3, 3] = _CENTRE - matrix[:3, :3] @ _CENTRE + 1.5 * rng.standard_normal(3)
    return matrix


def _field_shape() -> tuple[int, ...]:
    return tuple(int(size) for size in _EXTENT / _FIELD_SPACING + 1)


def _field_affine() -> Array:
    affine = np.diag([_FIELD_SPACING] * 3 + [1.0])
    affine[:3, 3] = _CENTRE - _EXTENT / 2
    return affine


@functools.cache
def _growth_fields() -> tuple[tuple[Array, ...], ...]:
    """For each row of `_GROWTH` and each of its sides a velocity (3, *field), at most 1 mm, that grows it.

    Labels are pulled from where the velocity points to: the gradient of a blurred structure makes it larger.
    """
    labels, affine = template_label_map()
    places = _apply(np.linalg.inv(affine) @ _field_affine(), _voxels(_field_shape()))
    rows = []
    for sides, _, _ in _GROWTH:
        fields = []
        for label in sides:
            mask = (labels == label).astype(np.float32)
            blurred = ndimage.gaussian_filter(mask, 5.0 / affine[0, 0], truncate=3.0)
            field = np.stack([np.gradient(_sample(blurred, places), axis=axis) for axis in range(3)])
            fields.append(field / np.sqrt((field**2).sum(0)).max())
        rows.append(tuple(fields))
    return tuple(rows)


def _random_velocity(rng: np.random.Generator) -> Array:
    """A stationary velocity field (3, *field) in mm: broad and fine random parts, and growth."""
    shape = _field_shape()
    velocity = np.zeros((3, *shape))
    for component in velocity:
        component += _BROAD * _smooth_noise(rng, shape, _BROAD_LENGTH / _FIELD_SPACING)
        component += _FINE * _smooth_noise(rng, shape, _FINE_LENGTH / _FIELD_SPACING)
    for (_, mean, sd), fields in zip(_GROWTH, _growth_fields(), strict=True):
        both = rng.standard_normal()
        for field in fields:
            velocity += (mean + sd * (0.9 * both + 0.4 * rng.standard_normal())) * field
    return velocity


def _flow(velocity: Array, steps: int = 5) -> Array:
    """Displacement (3, *field) in mm of the flow of `velocity` after unit time, by scaling and squaring."""
    here = _voxels(velocity.shape[1:])
    displacement = velocity / 2**steps
    for _ in range(steps):
        places = here + displacement / _FIELD_SPACING
        displacement = displacement + np.stack([_sample(component, places) for component in displacement])
    return displacement
