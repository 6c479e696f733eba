"""The channels of one visit on the grid of the first: registered rigidly, resampled, checked."""

from __future__ import annotations

import numpy as np
import torch

from ppl_seg.data.images import Image, same_grid
from ppl_seg.data.registration import Level, Volume, centroid, coarse, gain, register
from ppl_seg.data.resampling import resample
from ppl_seg.data.starts import Probe
from ppl_seg.errors import InputError

CHANNEL_KINDS = ("rigid", "none")
_SPACING = 3.0  # mm of the channel that is registered
_LEVELS = (Level(6.0, 10_000, 60), Level(_SPACING, 30_000, 60))
_STEPS = 8  # of intensity in the first channel, where the two starts are compared
LEAST_SHARE = 0.3  # of the first channel's observed voxels that the other observes too
_AWAY, _POINTS = 10.0, 20_000  # mm; points of the first channel where the outcome is judged
_THIN = 3 * _AWAY  # mm along the shortest axis
TOLERANCE = 2.0  # mm, mean: channels of one grid that were registered before come out 0.3 to 0.8 apart
LEAST_GAIN = 1.45  # information over the mean of six places that far away: 1.54 to 8 where right, else 1.05 to 1.48


def check_channel_alignment(kind: str) -> None:
    """Raises InputError for an unknown way to bring channels together."""
    if kind not in CHANNEL_KINDS:
        raise InputError(f"--channel-align {kind}: unknown; use {' or '.join(CHANNEL_KINDS)}")


def align_channel(
    first: Image, seen_first: np.ndarray, other: Image, seen: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Another channel on the first one's grid: intensities float32 and observed, (X, Y, Z) both.

    It is registered rigidly by mutual information (`rigid`), from what the headers say and from centroid on centroid,
    or the headers are trusted (`none`). A channel of the first one's grid keeps its voxels where registration leaves
    it within TOLERANCE, and where a slab is too thin to tell. Outside its field of view a channel is unobserved.

    Args:
        seen_first, seen: observed voxels, bool, each on its own grid.

    Raises:
        InputError: the two hardly overlap where registration, or the headers, put them; elsewhere they fit as well.
    """
    data = np.where(seen, other.data, 0).astype(np.float32)
    thin, world = min(np.multiply(first.shape, first.spacing)) < _THIN, np.eye(4)
    if kind == "rigid" and not (thin and same_grid(first, other)):
        world = _registered(first, seen_first, other, seen)
    if same_grid(first, other) and _mean_move(world, seen_first, first.affine) < TOLERANCE:
        return data, seen
    matrix = np.linalg.inv(other.affine) @ world @ first.affine
    weight = resample(torch.from_numpy(seen.astype(np.float32))[None], matrix, first.shape)[0].numpy()
    values = resample(torch.from_numpy(data)[None], matrix, first.shape)[0].numpy()
    there = weight > 0.5
    share = (there & seen_first).sum() / seen_first.sum()
    if share < LEAST_SHARE:
        raise _failed(first, other, f"it covers {share:.0%} of it", "segment without it")
    return np.where(there, values / np.maximum(weight, 0.5), 0).astype(np.float32), there


def _registered(first: Image, seen_first: np.ndarray, other: Image, seen: np.ndarray) -> np.ndarray:
    """World matrix, RAS mm of the first channel → of the other."""
    fixed = coarse(Volume(_scaled(first, seen_first), first.affine), _SPACING)
    moving = coarse(Volume(_scaled(other, seen), other.affine), _SPACING)
    region = coarse(Volume(seen_first.astype(np.float32), first.affine), _SPACING).data > 0.5
    centred = np.eye(4)
    centred[:3, 3] = centroid(seen, other.affine) - centroid(seen_first, first.affine)
    steps = Volume(np.floor(fixed.data * _STEPS), fixed.affine)
    probe = Probe.of(steps, moving, region)
    world = max((np.eye(4), centred), key=probe.information_at)
    try:
        for level in _LEVELS:
            world = register(fixed, moving, world, "mutual-information", level, region)
    except RuntimeError as error:  # SimpleITK: all points left the image
        raise _failed(first, other, "it does not overlap with it", "segment without it") from error
    judge = Probe.of(steps, moving, region, _POINTS, _SPACING)
    found = gain(judge.information_at, world, _AWAY)
    if found < LEAST_GAIN:
        way_out = "bring it there yourself and give --channel-align none"
        raise _failed(first, other, f"it fits {found:.2f} times as well as {_AWAY:.0f} mm away", way_out)
    return world


def _mean_move(world: np.ndarray, seen: np.ndarray, affine: np.ndarray) -> float:
    """Mean distance, mm, by which a world matrix moves the observed voxels."""
    points = np.argwhere(seen)[:: max(1, seen.sum() // _POINTS)] @ affine[:3, :3].T + affine[:3, 3]
    return float(np.linalg.norm(points @ (world[:3, :3] - np.eye(3)).T + world[:3, 3], axis=1).mean())


def _failed(first: Image, other: Image, why: str, way_out: str) -> InputError:
    """The error of a registration that went wrong."""
    return InputError(
        f"{other.path}: cannot be brought to {first.path}: {why}; check that both are of one visit, and the "
        f"orientation in the headers; or {way_out}"
    )


def _scaled(image: Image, seen: np.ndarray) -> np.ndarray:
    """Intensities (X, Y, Z) float32 with the 1st and 99th percentile at 0 and 1; 0 where unobserved."""
    low, high = np.percentile(image.data[seen], (1, 99))
    scaled = np.clip((image.data - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    return np.where(seen, scaled, 0).astype(np.float32)
