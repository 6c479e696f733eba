"""Bringing a scan of any contrast onto the prior's grid: what none, center, rigid and affine mean."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from ppl_seg.data.grids import Grid, Placed, alignment_matrix
from ppl_seg.data.images import Image
from ppl_seg.data.registration import Level, Volume, centroid, coarse, padded, register
from ppl_seg.data.resampling import inside, resample
from ppl_seg.data.starts import Probe, best_starts, improved
from ppl_seg.errors import InputError

KINDS = ("none", "center", "rigid", "affine")
_SPACING = 3.0  # mm of the scan that is registered
_STARTS = 3  # of the lattice that are improved
_MASKS = Level(6.0, 10_000, 20)
_CONTRASTS = (Level(4.0, 20_000, 30), Level(_SPACING, 30_000, 60))
_RIM = 6.0  # mm around the brain that count too
_PADDING = 30.0  # mm of nothing around a brain
_AROUND = 0.25  # intensity of the darkest voxel of a brain, over that of what surrounds it
FEWEST_VOXELS = 16  # along each axis, of what can be registered
# A registration has failed where, after it,
LEAST_OVERLAP = 0.7  # Dice of a brain's mask with the prior's brain is less
LEAST_COVERAGE = 0.4  # the share of the prior's brain that lies in a head's field of view is less
LEAST_GAIN = 1.15  # the information is less than so many times that of places 20 mm away
SCALES = (0.25, 4.0)  # the volume changes by more
MOST_STRETCH = 2.0  # one direction is stretched so many times more than another


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the prior's grid lies in a scan.

    Attributes:
        kind: none, center, rigid or affine. matrix: (4, 4), voxel of the grid → voxel of the scan.
        world: (4, 4), RAS mm of the prior → RAS mm of the scan.
        overlap: after a registration, Dice of the scan's brain with the prior's, or for heads the share of the prior's
            brain that lies in the scan's field of view.
        gain: after a registration, the information on classes over that of places 20 mm away.
        atlas: what the prior expects on its grid, for pictures.
    """

    kind: str
    matrix: np.ndarray
    world: np.ndarray
    overlap: float | None = None
    gain: float | None = None
    atlas: Atlas | None = None


@dataclass(frozen=True, eq=False)
class Atlas:
    """What a scan is registered to.

    Attributes:
        grid: the prior's. classes: (X, Y, Z) the commonest intensity class, 0 background.
        brain: (X, Y, Z) float32, probability that a voxel is of the brain. field: brain, head or crop.
    """

    grid: Grid
    classes: np.ndarray
    brain: np.ndarray
    field: str


def check_alignment(align: str) -> None:
    """Raises InputError for an alignment that is unknown."""
    if align not in KINDS:
        raise InputError(f"--align {align}: unknown; use {', '.join(KINDS[:-1])} or {KINDS[-1]}")


def align_scan(kind: str, image: Image, observed: np.ndarray, atlas: Atlas, field: str) -> Alignment:
    """Where the prior's grid lies in a scan.

    none trusts the headers. center brings the centroids of the brains together, where prior and scan are brains, else
    the centres of the fields of view. rigid and affine register, from the turn that the headers say and others.

    Args:
        image: the scan. observed: (X, Y, Z) bool. field: the scan's, brain, head or crop.

    Raises:
        InputError: registration failed, or the image can't be registered.
    """
    check_alignment(kind)
    grid, to_voxel = atlas.grid, np.linalg.inv(image.affine)
    if kind == "center" and (field == "brain") != (atlas.field == "brain") and "crop" not in (field, atlas.field):
        raise InputError(
            f"{image.path}: a {field}, the prior is of {atlas.field}s, and --align center would confuse their middles; "
            "use --align affine, or give --mask (or --brain, --head) if it is mistaken"
        )
    if kind == "none" or (kind == "center" and not field == atlas.field == "brain"):
        matrix = alignment_matrix(kind, image, grid)
        return Alignment(kind, matrix, image.affine @ matrix @ np.linalg.inv(grid.affine), atlas=atlas)
    if kind == "center":
        world = _centroids_together(image, observed, atlas)
        return Alignment(kind, to_voxel @ world @ grid.affine, world, atlas=atlas)
    if min(*image.shape, *grid.shape) < FEWEST_VOXELS:
        shape = "x".join(map(str, min(image.shape, grid.shape, key=min)))
        raise InputError(
            f"{image.path}: --align {kind} needs at least {FEWEST_VOXELS} voxels along each axis, found {shape}; use "
            "--align center, or --align none for scans that are in the prior's space"
        )
    pair = _Pair.of(image, observed, atlas, field)
    try:
        world = _registered(pair, kind)
    except RuntimeError as error:  # SimpleITK: all points left the image
        raise failed(image, "prior and scan do not overlap") from error
    return _checked(pair, kind, world, image, observed)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Prior and scan made ready for registration.

    atlas: the prior's, where the scan is a brain without what lies outside. classes: its class volume. moving:
    intensities, 0 to 1. start: world matrix. region: voxels of the grid that count. field: the scan's.
    """

    atlas: Atlas
    classes: Volume
    moving: Volume
    mask: Volume
    start: np.ndarray
    region: np.ndarray
    field: str

    @classmethod
    def of(cls, image: Image, observed: np.ndarray, atlas: Atlas, field: str) -> _Pair:
        low, high = np.percentile(image.data[observed], (1, 99))
        shown = np.clip((image.data - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        surrounded = field == "brain"
        if surrounded:
            atlas = replace(atlas, classes=np.where(atlas.brain > 0.5, atlas.classes, 0))
            shown = _AROUND + (1 - _AROUND) * shown
        whole = surrounded or atlas.field != "head"  # else what lies around the brain says as much as the brain
        distance = ndimage.distance_transform_edt(atlas.brain < 0.5, sampling=atlas.grid.spacing)
        region = distance <= _RIM if whole else np.ones(atlas.grid.shape, dtype=bool)

        def volume(data: np.ndarray) -> Volume:
            small = coarse(Volume(data.astype(np.float32), image.affine), _SPACING)
            return padded(small, _PADDING, 0.0) if surrounded else small

        if field == "crop" or atlas.field == "crop":
            matrix = alignment_matrix("center", image, atlas.grid)
            start = image.affine @ matrix @ np.linalg.inv(atlas.grid.affine)
        elif surrounded:
            start = _centroids_together(image, observed, atlas)
        else:
            middle = centroid(shown * observed, image.affine)
            start = np.eye(4)
            start[:3, 3] = middle - centroid(atlas.classes > 0, atlas.grid.affine)
        classes = Volume(atlas.classes.astype(np.float32), atlas.grid.affine)
        return cls(atlas, classes, volume(np.where(observed, shown, 0)), volume(observed), start, region, field)


def _registered(pair: _Pair, kind: str) -> np.ndarray:
    """The world matrix: the best of several starts by mutual information, brains then mask to mask, then contrast."""
    probe = Probe.of(pair.classes, pair.moving, pair.region)
    near, far = (-10.0, 0.0, 10.0), (-25.0, 0.0, 25.0)
    up = (-50.0, *far, 50.0)  # a neck pulls a head's middle down
    axes = (far, far, up) if pair.field == "head" else (near, near, near)
    shifts = list(itertools.product(*axes))
    starts = best_starts(probe, pair.start, shifts, _STARTS)
    fine = Probe.of(pair.classes, pair.moving, pair.region, 8000, _SPACING)
    tried = []
    for start in starts:
        world, _ = improved(probe, start, 4 if kind == "affine" else 3)
        if pair.field == "brain":
            brain = Volume(pair.atlas.brain, pair.atlas.grid.affine)
            world, _ = register(brain, pair.mask, world, "rigid", "squares", _MASKS)
        tried.append(improved(fine, world, 9 if kind == "affine" else 3))
    world = max(tried, key=lambda found: found[1])[0]
    for level in _CONTRASTS:
        world, _ = register(pair.classes, pair.moving, world, kind, "mutual-information", level, pair.region)
    return world


def _checked(pair: _Pair, kind: str, world: np.ndarray, image: Image, observed: np.ndarray) -> Alignment:
    """The alignment with its quality. InputError where it is implausible."""
    grid = pair.atlas.grid
    matrix = np.linalg.inv(image.affine) @ world @ grid.affine
    stretch = np.linalg.svd(world[:3, :3], compute_uv=False)
    scale = float(np.linalg.det(world[:3, :3]))
    if not SCALES[0] < scale < SCALES[1] or stretch[0] > MOST_STRETCH * stretch[-1]:
        raise failed(image, f"the best match would change volumes {scale:.2f}-fold and stretch unevenly")
    brain = pair.atlas.brain > 0.5
    within = inside(matrix, image.shape, grid.shape).numpy()
    if pair.field == "brain":
        data = torch.from_numpy(observed.astype(np.float32))[None]
        seen = resample(data, matrix, grid.shape)[0].numpy() > 0.5
        overlap, least = 2 * (seen & brain).sum() / (seen.sum() + brain.sum()), LEAST_OVERLAP
    else:
        overlap, least = (within & brain).sum() / brain.sum(), LEAST_COVERAGE
    if overlap < least:
        raise failed(image, f"overlap with the prior's brain {overlap:.2f}, expected at least {least:g}")
    probe = Probe.of(pair.classes, pair.moving, brain & within)
    here = probe.positions(world)
    shifts = [sign * 20.0 * axis @ probe.to_voxel[:3, :3].T for axis in np.eye(3) for sign in (-1, 1)]
    elsewhere = float(np.mean([probe.information(here + shift) for shift in shifts]))
    gain = probe.information(here) / max(elsewhere, 1e-6)
    if gain < LEAST_GAIN:
        raise failed(image, f"the prior explains the scan {gain:.2f} times as well as 20 mm away")
    return Alignment(kind, matrix, world, float(overlap), gain, pair.atlas)


def failed(image: Image, why: str) -> InputError:
    """The error of a registration that went wrong."""
    return InputError(
        f"{image.path}: wrong anatomy or no overlap with the prior: {why}; look at the scan's orientation and mask, or "
        "bring it to the prior's space yourself and give --align none"
    )


def _centroids_together(image: Placed, observed: np.ndarray, atlas: Atlas) -> np.ndarray:
    world = np.eye(4)
    world[:3, 3] = centroid(observed, image.affine) - centroid(atlas.brain > 0.5, atlas.grid.affine)
    return world
