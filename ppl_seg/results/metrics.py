"""Scores of a segmentation against the truth: overlap, surface distances, volumes, and their intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ppl_seg.data.labels import LabelTable

COLUMNS = ("structure", "dice", "hd95_mm", "asd_mm", "volume_mm3", "truth_volume_mm3", "missed")
FEWEST_PERSONS = 2  # whom resampling tells apart
ORTHOGONAL = 1e-4  # cosine between voxel axes up to which they count as at right angles


class Interval(NamedTuple):
    """A mean with its bootstrap interval; NaN where there is nothing to average."""

    mean: float
    low: float
    high: float


def structures_of_table(table: LabelTable) -> dict[str, tuple[int, ...]]:
    """Each label of the table on its own, background excluded: structure -> (label value,)."""
    pairs = list(zip(table.names, table.indices, strict=True))[1:]
    return {str(name): (int(index),) for name, index in pairs}


def evaluate_pair(
    segmentation: np.ndarray,
    truth: np.ndarray,
    affine: np.ndarray,
    structures: Mapping[str, Sequence[int]],
) -> list[dict[str, Any]]:
    """One row (COLUMNS) a structure; a structure is the union of its label values.

    Distances are between boundary voxels (those with a face neighbour outside the structure), symmetric, mm:
    hd95_mm the larger of the two directed 95th percentiles, asd_mm the mean over both boundaries. Axes of
    length 1 are left out (a single slice is scored in 2-D). Absent in both: NaN, volumes 0; absent in one:
    Dice 0, distances NaN, missed 1.

    Args:
        segmentation, truth: (X, Y, Z) label values on one grid.
        affine: (4, 4), voxel index to mm; it may be sheared.

    Raises:
        ValueError: different shapes, or no (4, 4) affine.
    """
    if segmentation.shape != truth.shape or truth.ndim != 3 or np.shape(affine) != (4, 4):
        raise ValueError(
            f"expected two label maps (X, Y, Z) of one shape and an affine (4, 4), found {segmentation.shape}, "
            f"{truth.shape} and {np.shape(affine)}"
        )
    voxel_volume = float(abs(np.linalg.det(affine[:3, :3])))
    rows = []
    for name, values in structures.items():
        found, wanted = np.isin(segmentation, values), np.isin(truth, values)
        sizes = int(found.sum()), int(wanted.sum())
        dice, hd95, asd = float("nan"), float("nan"), float("nan")
        if all(sizes):
            dice = 2.0 * int((found & wanted).sum()) / sum(sizes)
            hd95, asd = surface_distances(found, wanted, affine[:3, :3])
        elif any(sizes):
            dice = 0.0
        numbers = (dice, hd95, asd, sizes[0] * voxel_volume, sizes[1] * voxel_volume)
        missed = int((sizes[0] == 0) != (sizes[1] == 0))
        rows.append(dict(zip(COLUMNS, (name, *numbers, missed), strict=True)))
    return rows


def surface_distances(first: np.ndarray, second: np.ndarray, axes: np.ndarray) -> tuple[float, float]:
    """95th percentile Hausdorff and average symmetric surface distance, mm, of two non-empty masks.

    Args:
        first, second: (X, Y, Z) bool.
        axes: (3, 3), the step along each voxel axis in mm, one a column.
    """
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    either = first | second
    window: list[slice | int] = []
    kept: list[int] = []
    for axis, length in enumerate(either.shape):
        others = tuple(other for other in range(either.ndim) if other != axis)
        hits = np.flatnonzero(either.any(axis=others))
        window.append(slice(hits[0], hits[-1] + 1) if length > 1 else 0)
        if length > 1:
            kept.append(axis)
    # the crop may end at the structure: what is beyond counts as outside, here as at the array's own border
    one, two = (np.ascontiguousarray(mask[tuple(window)]) for mask in (first, second))
    steps = np.asarray(axes, np.float64)[:, kept]
    products = steps.T @ steps
    spacing = np.sqrt(np.diag(products))
    if np.abs(products - np.diag(np.diag(products))).max() > ORTHOGONAL * spacing.max() ** 2:
        return _sheared_distances(one, two, steps)
    images = [torch.from_numpy(mask)[None, None] for mask in (one, two)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's deprecations; nothing here is empty
        hausdorff = compute_hausdorff_distance(*images, include_background=True, percentile=95, spacing=list(spacing))
        average = compute_average_surface_distance(
            *images, include_background=True, symmetric=True, spacing=list(spacing)
        )
    return float(hausdorff), float(average)


def _sheared_distances(first: np.ndarray, second: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """`surface_distances` where the voxel axes are not at right angles: MONAI knows spacings alone."""
    from scipy.ndimage import binary_erosion
    from scipy.spatial import cKDTree

    one, two = (np.argwhere(mask & ~binary_erosion(mask)) @ steps.T for mask in (first, second))
    there, back = cKDTree(two).query(one)[0], cKDTree(one).query(two)[0]
    hausdorff = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hausdorff), float(np.concatenate([there, back]).mean())


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, persons: Sequence[str], seed: int = 0, num: int = 2000
) -> Interval:
    """Mean over scans with its 95 % percentile interval; persons are resampled with all their scans.

    Of a single person there is no interval, NaN.

    Args:
        values: (scans,) numbers; NaN is left out.
        persons: (scans,) whose scan it is (two scans of one person are not independent).
        num: bootstrap samples.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (len(persons),):
        raise ValueError(f"expected a person for each of {values.shape} values, found {len(persons)}")
    used = ~np.isnan(values)
    if not used.any():
        return Interval(float("nan"), float("nan"), float("nan"))
    names, owner = np.unique(np.asarray(persons, str)[used], return_inverse=True)
    mean = float(values[used].mean())
    if len(names) < FEWEST_PERSONS:
        return Interval(mean, float("nan"), float("nan"))
    sums = np.bincount(owner, weights=values[used])
    counts = np.bincount(owner)
    drawn = np.random.default_rng(seed).integers(len(names), size=(num, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def paired_difference_interval(
    values: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    persons: Sequence[str],
    seed: int = 0,
    num: int = 2000,
) -> Interval:
    """`bootstrap_interval` of values − baseline, scan by scan; a scan that lacks one is left out."""
    difference = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    return bootstrap_interval(difference, persons, seed, num)


def summary_rows(
    rows: Sequence[Mapping[str, Any]], person_of: Callable[[str], str], seed: int = 0, num: int = 2000
) -> list[dict[str, Any]]:
    """Means and 95 % intervals over scans: one row a structure, and `mean` over structures last.

    Args:
        rows: rows of `evaluate_pair`, each with a `scan`.
        person_of: scan -> person.
    """
    scans = list(dict.fromkeys(str(row["scan"]) for row in rows))
    structures = list(dict.fromkeys(str(row["structure"]) for row in rows))
    persons = [person_of(scan) for scan in scans]
    metrics = ("dice", "hd95_mm", "asd_mm")
    scores = np.full((len(metrics), len(structures), len(scans)), np.nan)
    missed = np.zeros(len(structures), int)
    for row in rows:
        place = structures.index(str(row["structure"])), scans.index(str(row["scan"]))
        scores[:, place[0], place[1]] = [row[metric] for metric in metrics]
        missed[place[0]] += int(row["missed"])
    present = (~np.isnan(scores)).sum(1, keepdims=True)
    sums = np.nansum(scores, 1, keepdims=True)
    means = np.divide(sums, present, out=np.full(sums.shape, np.nan), where=present > 0)
    scores = np.concatenate([scores, means], axis=1)
    missed = np.append(missed, missed.sum())
    summary = []
    for s, name in enumerate([*structures, "mean"]):
        cells: dict[str, Any] = {"structure": name, "scans": int((~np.isnan(scores[0, s])).sum())}
        for k, metric in enumerate(metrics):
            interval = bootstrap_interval(scores[k, s], persons, seed, num)
            cells |= {metric: interval.mean, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        summary.append({**cells, "missed": int(missed[s])})
    return summary
