"""Label maps brought onto one grid by each other: their mean is the target, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.linalg import expm, logm

from ppl_seg.data.grids import Grid, Placed, cubic_grid
from ppl_seg.data.information import Comparison, most_informative
from ppl_seg.data.registration import Level, Volume, centroid, coarse, padded, register
from ppl_seg.data.resampling import resample, resample_labels
from ppl_seg.errors import InputError

_SPACING = 3.0  # mm, of the common target
_MASKS = Level(4.0, 15_000, 30)
_POINTS = 15_000  # of the target
_ROUNDS = 3  # by classes, after one by masks
_PADDING = 30.0  # mm around a map that others may cover
_MARGIN = 8.0  # mm of grid around the content
_CONTENT = 0.25  # share of the maps that have a label at a voxel of the content


@dataclass(frozen=True, eq=False)
class CodedMap:
    """A label map for registration, a few millimetres a voxel, padded.

    Attributes:
        commonest: intensity class of most of a voxel. mean: of the class numbers, what a scan would show of them.
        mask: share of the voxel in any of the classes. content: of any label, registered or not.
    """

    commonest: Volume
    mean: Volume
    mask: Volume
    content: Volume


def code_map(positions: np.ndarray, image: Placed, class_of_label: Sequence[int], registered: np.ndarray) -> CodedMap:
    """What registration needs of a label map.

    Args:
        positions: (X, Y, Z). class_of_label: (M,). registered: (M,) bool, the labels that count, such as the brain's.
    """
    classes = np.where(registered, np.asarray(class_of_label), 0)[positions]

    def volume(data: np.ndarray) -> Volume:
        return padded(coarse(Volume(data.astype(np.float32), image.affine), _SPACING), _PADDING, 0.0)

    mean = volume(classes)
    to_image = np.linalg.inv(image.affine) @ mean.affine
    commonest = resample_labels(torch.from_numpy(classes), to_image, mean.shape).numpy()
    return CodedMap(Volume(commonest, mean.affine), mean, volume(classes > 0), volume(positions > 0))


def align_maps(
    maps: Sequence[CodedMap], align: str, spacing: float | None, default: float
) -> tuple[Grid, list[np.ndarray]]:
    """The common grid, its axes RAS, and of each map the world matrix (grid's RAS mm → map's).

    center: the masks' centroids come together. rigid, affine: then a round by masks towards their mean, one by mutual
    information with the classes of the map of middle size, two with the commonest classes of all. The mean of all
    stays where and as large as they are on average.

    Args:
        spacing: mm; None for `default`, coarsened to a million voxels.
    """
    worlds = [np.eye(4) for _ in maps]
    for world, one in zip(worlds, maps, strict=True):
        world[:3, 3] = centroid(one.mask.data, one.mask.affine)
    target = _target(maps, worlds)
    sizes = [one.mask.data.sum() * abs(np.linalg.det(one.mask.affine[:3, :3])) for one in maps]
    typical = int(np.argsort(sizes)[len(maps) // 2])
    for number in range(0 if align == "center" else 1 + _ROUNDS):
        if number == 0:
            # rigid: a mask alone leaves open which turn goes with which stretch
            masks = [one.mask for one in maps]
            mean = Volume(_mean(masks, worlds, target), target.affine)
            pairs = zip(masks, worlds, strict=True)
            found = [register(mean, mask, world, "squares", _MASKS) for mask, world in pairs]
        else:
            # the mean of maps that are turned against each other is blurred: the first round is towards one of them
            some = slice(typical, typical + 1) if number == 1 else slice(None)
            mean = Volume(_most(maps[some], worlds[some], target), target.affine)
            found = [_explained(mean, one.mean, world, align) for one, world in zip(maps, worlds, strict=True)]
        worlds = _unbiased(found)
    share = _mean([one.content for one in maps], worlds, target)
    inside = _filled(share, _CONTENT)
    ends = np.stack([inside.min(0) - 0.5, inside.max(0) + 0.5])
    low, high = ends * np.diag(target.affine)[:3] + target.affine[:3, 3] + np.array([[-_MARGIN], [_MARGIN]])
    return cubic_grid(low, high, spacing, default), worlds


def _explained(mean: Volume, moving: Volume, world: np.ndarray, kind: str) -> np.ndarray:
    """The world matrix improved by mutual information, as scans' are."""
    scaled = Volume(moving.data / max(float(moving.data.max()), 1.0), moving.affine)
    seen = Volume(np.ones_like(moving.data), moving.affine)
    region = ndimage.binary_dilation(mean.data > 0, iterations=2)
    return most_informative(Comparison.of(mean, scaled, seen, [(region, _POINTS)], _SPACING), world, kind)[0]


def _mean(volumes: Sequence[Volume], worlds: Sequence[np.ndarray], target: Grid) -> np.ndarray:
    """(*target) float32: the mean of what the volumes have there."""
    total = np.zeros(target.shape, np.float32)
    for volume, world in zip(volumes, worlds, strict=True):
        matrix = np.linalg.inv(volume.affine) @ world @ target.affine
        total += resample(torch.from_numpy(volume.data)[None], matrix, target.shape)[0].numpy()
    return total / len(volumes)


def _most(maps: Sequence[CodedMap], worlds: Sequence[np.ndarray], target: Grid) -> np.ndarray:
    """(*target) float32: the class that most maps have."""
    votes: dict[int, np.ndarray] = {}
    for one, world in zip(maps, worlds, strict=True):
        matrix = np.linalg.inv(one.commonest.affine) @ world @ target.affine
        placed = resample(torch.from_numpy(one.commonest.data)[None], matrix, target.shape, "nearest")[0].numpy()
        for value in np.unique(placed).tolist():
            votes.setdefault(value, np.zeros(target.shape, np.int16))[placed == value] += 1
    values = sorted(votes)
    return np.array(values, np.float32)[np.argmax([votes[value] for value in values], axis=0)]


def _target(maps: Sequence[CodedMap], worlds: Sequence[np.ndarray]) -> Grid:
    """A grid that holds the content of all maps."""
    corners = []
    for one, world in zip(maps, worlds, strict=True):
        inside = _filled(one.content.data, 0.5)
        ends = np.array(np.meshgrid(*zip(inside.min(0), inside.max(0), strict=True), indexing="ij")).reshape(3, -1)
        to_target = np.linalg.inv(world) @ one.content.affine
        corners.append((to_target[:3, :3] @ ends + to_target[:3, 3:]).T)
    low, high = np.concatenate(corners).min(0) - _PADDING, np.concatenate(corners).max(0) + _PADDING
    return cubic_grid(low, high, _SPACING, _SPACING)


def _filled(share: np.ndarray, least: float) -> np.ndarray:
    """Voxels (n, 3) that are filled by at least so much. InputError where none is."""
    inside = np.argwhere(share >= least)
    if not len(inside):
        raise InputError(
            f"the label maps' structures fill no voxel of {_SPACING:g} mm: too thin or too far apart to register; "
            "use --align center, or --align none for maps of one space"
        )
    return inside


def _unbiased(worlds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The world matrices with their mean linear part taken out, so that the target keeps the maps' mean shape."""
    mean = expm(np.mean([logm(world[:3, :3]).real for world in worlds], axis=0))
    undo = np.eye(4)
    undo[:3, :3] = np.linalg.inv(mean)
    return [world @ undo for world in worlds]
