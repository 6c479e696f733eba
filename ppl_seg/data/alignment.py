"""Bringing a scan of any contrast onto the prior's grid: what none, center, rigid and affine mean."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from nibabel.orientations import io_orientation
from scipy import ndimage
from scipy.linalg import polar
from scipy.spatial.transform import Rotation

from ppl_seg.data.geometry import spacing_of
from ppl_seg.data.grids import Grid, Placed, alignment_matrix
from ppl_seg.data.images import Image
from ppl_seg.data.information import ROUGH, Comparison, most_informative
from ppl_seg.data.registration import Volume, centroid, coarse, gain, padded, rigid_move
from ppl_seg.data.resampling import inside, resample
from ppl_seg.data.starts import Probe, best_starts
from ppl_seg.errors import InputError

KINDS = ("none", "center", "rigid", "affine")
_SPACING = 2.0  # mm of the scan that is registered
_STARTS = 3  # of the lattice that are improved
_COARSE = 6.0  # mm of the scan at first
# sd of both, times those mm. Of heads half of it leaves several optima tenths of a millimetre apart; brains fit better
_BLUR = {"brain": 0.7, "head": 1.5, "crop": 0.7}
_POINTS, _SOME_POINTS, _FINE_POINTS = 8_000, 40_000, 120_000  # of the prior: at first, in between, and at last
_STIFFNESS = 3.0  # nats, on the way there: information alone may shrink a head of little contrast to half
_NUDGES, _NUDGE, _LEVER = 10, 0.7, 70.0  # how often, mm, mm to a radian: the optimum is left and looked for again
_LAST_NUDGES, _LAST_NUDGE = 4, 0.3  # and once more at all points
_SEED = 1
_OBLIQUE = math.radians(36)  # from which the search starts with the header's turn, not along the voxels' axes
_DIGITS = 5  # of voxel sizes that count; headers have them in 32 bits
_ELSEWHERE = 0.25  # share of the points that lie beyond the brain's rim, where the prior knows classes there
_RIM = 6.0  # mm around the brain that count too
_PADDING = 30.0  # mm of nothing around a brain
_AROUND = 0.25  # intensity of the darkest voxel of a brain, over that of what surrounds it
_AWAY = 20.0  # mm
MOST_ROOM = 27  # box of a scan over that of a prior of crops: three times as long on each side
FEWEST_VOXELS = 16  # along each axis, of what can be registered
# A registration has failed where, after it (in brackets what was found for right inputs, and for noise and balls):
LEAST_OVERLAP = 0.7  # Dice of a brain's mask with the prior's brain is less (right: from 0.91)
LEAST_COVERAGE = 0.4  # the share of the prior's brain that lies in a head's field of view is less (right: from 0.98)
# the information is less than so many times that of places 20 mm away (right: brains from 2.2, in real contrasts from
# 4.3, heads from 1.4, in real contrasts from 2.9; noise in a brain's mask up to 1.0, smoothed to structures 1.5, as a
# head 0.3, smoothed 1.3)
LEAST_GAIN = {"brain": 1.8, "head": 1.3, "crop": 1.5}
SCALES = (0.5, 2.0)  # the volume changes by more (right: 0.8 to 1.2; a ball 0.45; noise, other anatomy: below 0.1)
MOST_STRETCH = 1.5  # one direction is stretched so many times more than another (right: up to 1.2)


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
    the centres of the fields of view. rigid and affine register, from turns about the voxels' axes: a header that puts
    a brain or a head elsewhere changes nothing, unless it turns them by more than 36 degrees.

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
    sizes = [np.multiply(box.shape, box.spacing) for box in (image, grid)]
    if kind == "center" and atlas.field == "crop" and np.prod(sizes[0]) > MOST_ROOM * np.prod(sizes[1]):
        found, expected = ("x".join(f"{size:.0f}" for size in sizes_mm) for sizes_mm in sizes)
        raise InputError(
            f"{image.path}: {found} mm, the prior is of crops of {expected} mm, and --align center would bring their "
            "middles together; crop the scan to the structures, or use --align none where it is in the prior's space"
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
    return _checked(pair, kind, _registered(pair, kind), image, observed)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Prior and scan made ready for registration, the scan in its own millimetres, so that little hangs on its header.

    own: (4, 4), voxel of the scan → its own mm, along its axes in RAS order. frame: (4, 4), these → RAS mm.
    atlas: the prior's, where the scan is a brain without what lies outside. classes: its class volume.
    moving: intensities, 0 to 1. observed: where they are, 0 or 1. start: world matrix, to the scan's own mm.
    near, beyond: voxels of the grid that count, the brain with its rim, and others. field: the scan's.
    """

    own: np.ndarray
    frame: np.ndarray
    atlas: Atlas
    classes: Volume
    moving: Volume
    observed: Volume
    start: np.ndarray
    near: np.ndarray
    beyond: np.ndarray
    field: str

    @classmethod
    def of(cls, image: Image, observed: np.ndarray, atlas: Atlas, field: str) -> _Pair:
        observed = observed & np.isfinite(image.data)  # where this channel has no value another may
        low, high = np.percentile(image.data[observed], (1, 99))
        shown = np.clip((image.data - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        shown = np.where(observed, shown, 0)
        surrounded = field == "brain"
        if surrounded:
            atlas = replace(atlas, classes=np.where(atlas.brain > 0.5, atlas.classes, 0))
            shown = _AROUND + (1 - _AROUND) * shown
        distance = ndimage.distance_transform_edt(atlas.brain < 0.5, sampling=atlas.grid.spacing)
        near = distance <= _RIM
        beyond = np.full_like(near, atlas.field == "head" or surrounded) & ~near
        own = _own_millimetres(image.affine)
        frame = image.affine @ np.linalg.inv(own)

        def volume(data: np.ndarray) -> Volume:
            small = coarse(Volume(data.astype(np.float32), own), _SPACING)
            return padded(small, _PADDING, 0.0) if surrounded else small

        if "crop" in (field, atlas.field):
            matrix = alignment_matrix("center", image, atlas.grid)
            start = own @ matrix @ np.linalg.inv(atlas.grid.affine)
        else:
            weight, expected = (observed, atlas.brain > 0.5) if surrounded else (shown, atlas.classes > 0)
            start = np.eye(4)
            if Rotation.from_matrix(frame[:3, :3]).magnitude() > _OBLIQUE:
                start[:3, :3] = np.linalg.inv(frame)[:3, :3]
            start[:3, 3] = centroid(weight, own) - start[:3, :3] @ centroid(expected, atlas.grid.affine)
        classes = Volume(atlas.classes.astype(np.float32), atlas.grid.affine)
        moving = volume(np.where(observed, shown, 0))
        return cls(own, frame, atlas, classes, moving, volume(observed), start, near, beyond, field)

    @property
    def seen(self) -> Volume:
        """Where the scan says something, 0 or 1: what surrounds a brain is dark, and says where the brain ends."""
        return replace(self.observed, data=np.ones_like(self.observed.data)) if self.field == "brain" else self.observed

    def everywhere(self) -> Comparison:
        """The scan in coarse voxels at points of all that counts, for the way there."""
        return Comparison.of(
            self.classes,
            self.moving,
            self.seen,
            [(self.near | self.beyond, _POINTS)],
            _COARSE,
            _BLUR[self.field] * _COARSE,
        )

    def mostly_near(self, points: int = _FINE_POINTS) -> Comparison:
        """The scan in finer voxels at points of the brain, and of others that keep it from growing into the skull."""
        beyond = round(_ELSEWHERE * points) if self.beyond.any() else 0
        regions = [(self.near, points - beyond), (self.beyond, beyond)]
        return Comparison.of(self.classes, self.moving, self.seen, regions, _SPACING, _BLUR[self.field] * _SPACING)

    def judge(self) -> Comparison:
        """What a registration is judged by: for a brain, whose outline any mask has, what lies within."""
        if self.field != "brain":
            return self.mostly_near()
        within = [(self.atlas.brain > 0.5, _FINE_POINTS)]
        return Comparison.of(self.classes, self.moving, self.observed, within, _SPACING, _BLUR[self.field] * _SPACING)


def _registered(pair: _Pair, kind: str) -> np.ndarray:
    """The world matrix, to the scan's own mm, of most mutual information, from several starts of a lattice."""
    probe = Probe.of(pair.classes, pair.moving, pair.near | pair.beyond)
    near, far = (-10.0, 0.0, 10.0), (-25.0, 0.0, 25.0)
    up = (-50.0, *far, 50.0)  # a neck pulls a head's middle down
    axes = (far, far, up) if pair.field == "head" else (near, near, near)
    shifts = list(itertools.product(*axes))
    first = pair.everywhere()
    # a prior that does not know what lies around the brain would grow over the head
    stages = ("similarity", "affine") if kind == "affine" and pair.beyond.any() else ("rigid",)
    tried = []
    for world in best_starts(probe, pair.start, shifts, _STARTS):
        for stage in stages:
            world, information = most_informative(first, world, stage, stiffness=_STIFFNESS)
        tried.append((world, information))
    # few scans have a single optimum: of those that lie about a millimetre apart, the best of all
    some, fine = pair.mostly_near(_SOME_POINTS), pair.mostly_near()
    best = max((most_informative(some, world, kind, ROUGH) for world, _ in tried), key=lambda found: found[1])
    best = _nudged(some, best, kind, _NUDGES, _NUDGE)
    best = _nudged(fine, most_informative(fine, best[0], kind, ROUGH), kind, _LAST_NUDGES, _LAST_NUDGE)
    return most_informative(fine, best[0], kind)[0]


def _own_millimetres(affine: np.ndarray) -> np.ndarray:
    """(4, 4): voxels to mm from the first voxel on, each axis along the one of RAS that is next to it; shear stays."""
    turned = io_orientation(affine)
    spacing = [float(f"{size:.{_DIGITS}g}") for size in spacing_of(affine)]
    axes = np.zeros((3, 3))
    axes[turned[:, 0].astype(int), range(3)] = turned[:, 1] * spacing
    _, shear = polar(affine[:3, :3] @ np.linalg.inv(axes))
    own = np.eye(4)
    own[:3, :3] = np.round(shear, _DIGITS - 1) @ axes
    return own


def _nudged(
    comparison: Comparison, best: tuple[np.ndarray, float], kind: str, times: int, length: float
) -> tuple[np.ndarray, float]:
    """The best of optima: each is left by a small move at random, the same every time, and looked for again.

    length: sd of the shift, mm; turns about the middle go with it.
    """
    random, middle = np.random.default_rng(_SEED), comparison.points.mean(0).numpy()
    for _ in range(times):
        turn = Rotation.from_rotvec(random.normal(0, length / _LEVER, 3))
        nudge = rigid_move(turn, middle, random.normal(0, length, 3))
        best = max(best, most_informative(comparison, best[0] @ nudge, kind, ROUGH), key=lambda found: found[1])
    return best


def _checked(pair: _Pair, kind: str, to_own: np.ndarray, image: Image, observed: np.ndarray) -> Alignment:
    """The alignment with its quality, of a world matrix to the scan's own mm. InputError where it is implausible."""
    grid, world = pair.atlas.grid, pair.frame @ to_own
    matrix = np.linalg.inv(pair.own) @ to_own @ grid.affine
    stretch = np.linalg.svd(world[:3, :3], compute_uv=False)
    scale = float(np.linalg.det(world[:3, :3]))
    if not SCALES[0] < scale < SCALES[1]:
        raise _failed(image, f"the best match would change volumes {scale:.2f}-fold")
    if stretch[0] > MOST_STRETCH * stretch[-1]:
        raise _failed(
            image, f"the best match would stretch one direction {stretch[0] / stretch[-1]:.1f} times as another"
        )
    brain = pair.atlas.brain > 0.5
    within = inside(matrix, image.shape, grid.shape).numpy()
    if pair.field == "brain":
        data = torch.from_numpy(observed.astype(np.float32))[None]
        seen = resample(data, matrix, grid.shape)[0].numpy() > 0.5
        overlap, least = 2 * (seen & brain).sum() / (seen.sum() + brain.sum()), LEAST_OVERLAP
    else:
        overlap, least = (within & brain).sum() / brain.sum(), LEAST_COVERAGE
    if overlap < least:
        raise _failed(image, f"overlap with the prior's brain {overlap:.2f}, expected at least {least:g}")
    judge = pair.judge()
    better = gain(lambda place: float(judge.information(torch.from_numpy(place))), to_own, _AWAY)
    if better < LEAST_GAIN[pair.field]:
        raise _failed(image, f"the prior explains the scan {better:.2f} times as well as 20 mm away")
    return Alignment(kind, matrix, world, float(overlap), better, pair.atlas)


def _failed(image: Image, why: str) -> InputError:
    """The error of a registration that went wrong."""
    return InputError(
        f"{image.path}: wrong anatomy or no overlap with the prior: {why}; look at the scan's orientation and mask, or "
        "bring it to the prior's space yourself and give --align none"
    )


def _centroids_together(image: Placed, observed: np.ndarray, atlas: Atlas) -> np.ndarray:
    world = np.eye(4)
    world[:3, 3] = centroid(observed, image.affine) - centroid(atlas.brain > 0.5, atlas.grid.affine)
    return world
