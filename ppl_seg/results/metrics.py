"""Scores of a segmentation against the truth: overlap, surface distances, volumes, and their intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ppl_seg.errors import InputError
from ppl_seg.results.tables import read_table

if TYPE_CHECKING:
    from ppl_seg.data.labels import LabelTable

COLUMNS = ("structure", "dice", "hd95_mm", "asd_mm", "volume_mm3", "truth_volume_mm3", "missed")


class Interval(NamedTuple):
    """A mean with its bootstrap interval; NaN where there is nothing to average."""

    mean: float
    low: float
    high: float


def read_groups(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Group table (TSV: index, group): structure -> label values scored as one, in order of appearance.

    Raises:
        InputError: missing column, an index that is no integer, or one in two groups.
    """
    groups: dict[str, tuple[int, ...]] = {}
    seen: dict[int, str] = {}
    for line, row in enumerate(read_table(path, ("index", "group")), start=2):
        try:
            index = int(row["index"])
        except ValueError:
            raise InputError(f"{path}, line {line}: expected an integer index, found {row['index']!r}") from None
        name = row["group"]
        if seen.setdefault(index, name) != name:
            raise InputError(f"{path}, line {line}: index {index} is in {seen[index]} and in {name}; keep one")
        if index not in groups.get(name, ()):
            groups[name] = (*groups.get(name, ()), index)
    return groups


def structures_of_table(table: LabelTable) -> dict[str, tuple[int, ...]]:
    """Each label of the table on its own, background excluded: structure -> (label value,)."""
    pairs = list(zip(table.names, table.indices, strict=True))[1:]
    return {str(name): (int(index),) for name, index in pairs}


def evaluate_pair(
    segmentation: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    structures: Mapping[str, Sequence[int]],
) -> list[dict[str, Any]]:
    """One row (COLUMNS) a structure; a structure is the union of its label values.

    Distances are between boundary voxels (those with a face neighbour outside the structure), symmetric, mm:
    hd95_mm the larger of the two directed 95th percentiles, asd_mm the mean over both boundaries. Axes of
    length 1 are left out (a single slice is scored in 2-D). Absent in both: NaN, volumes 0; absent in one:
    Dice 0, distances NaN, missed 1.

    Args:
        segmentation, truth: (X, Y, Z) label values on one grid.
        spacing: (3,) mm.

    Raises:
        ValueError: different shapes, or a spacing of another length.
    """
    if segmentation.shape != truth.shape or len(spacing) != truth.ndim:
        raise ValueError(
            f"expected two label maps of one shape and a spacing for each axis, found {segmentation.shape}, "
            f"{truth.shape} and {tuple(spacing)}"
        )
    voxel_volume = float(np.prod(spacing))
    rows = []
    for name, values in structures.items():
        found, wanted = np.isin(segmentation, values), np.isin(truth, values)
        sizes = int(found.sum()), int(wanted.sum())
        dice, hd95, asd = float("nan"), float("nan"), float("nan")
        if all(sizes):
            dice = 2.0 * int((found & wanted).sum()) / sum(sizes)
            hd95, asd = surface_distances(found, wanted, spacing)
        elif any(sizes):
            dice = 0.0
        numbers = (dice, hd95, asd, sizes[0] * voxel_volume, sizes[1] * voxel_volume)
        missed = int((sizes[0] == 0) != (sizes[1] == 0))
        rows.append(dict(zip(COLUMNS, (name, *numbers, missed), strict=True)))
    return rows


def surface_distances(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """95th percentile Hausdorff and average symmetric surface distance, mm, of two non-empty masks."""
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    either = first | second
    window: list[slice | int] = []
    kept: list[float] = []
    for axis, length in enumerate(either.shape):
        others = tuple(other for other in range(either.ndim) if other != axis)
        hits = np.flatnonzero(either.any(axis=others))
        window.append(slice(hits[0], hits[-1] + 1) if length > 1 else 0)
        if length > 1:
            kept.append(float(spacing[axis]))
    # the crop may end at the structure: what is beyond counts as outside, here as at the array's own border
    crops = (np.ascontiguousarray(mask[tuple(window)]) for mask in (first, second))
    one, two = (torch.from_numpy(crop)[None, None] for crop in crops)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's deprecations; nothing here is empty
        hausdorff = compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=kept)
        average = compute_average_surface_distance(one, two, include_background=True, symmetric=True, spacing=kept)
    return float(hausdorff), float(average)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, persons: Sequence[str], seed: int = 0, num: int = 2000
) -> Interval:
    """Mean over scans with its 95 % percentile interval; persons are resampled with all their scans.

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
    sums = np.bincount(owner, weights=values[used])
    counts = np.bincount(owner)
    drawn = np.random.default_rng(seed).integers(len(names), size=(num, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values[used].mean()), float(low), float(high))


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
