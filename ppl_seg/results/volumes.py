"""Volumes of structures in mm³ with their uncertainty, a row a structure or a row a scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from ppl_seg.data.fields import brain_labels

if TYPE_CHECKING:
    from ppl_seg.data.labels import LabelTable
    from ppl_seg.results.segmentation import Segmentation

COLUMNS = ("scan", "structure", "volume_mm3", "q05", "q50", "q95", "draws", "touches_border", "quality")
SIZE_COLUMNS = ("brain_volume_mm3", "prior_scale")


def border_flags(label_map: np.ndarray, table: LabelTable, within: np.ndarray | None = None) -> np.ndarray:
    """Which labels have a voxel at a face of the array, or beside voxels out of the prior's reach, (M,) bool.

    Axes of length 1 have no border (a single slice is not cut). The surface of a brain mask is none: it is not where
    the scan ends.

    Args:
        within: bool, like the label map, where the prior's grid lies; None, everywhere.
    """
    ends = [label_map.take((0, -1), axis).ravel() for axis, length in enumerate(label_map.shape) if length > 1]
    if within is not None and not within.all():
        ends.append(label_map[ndimage.binary_dilation(~within) & within])
    return np.isin(np.asarray(table.indices), np.concatenate(ends))


def label_quality(positions: np.ndarray, confidence: np.ndarray, labels: int) -> np.ndarray:
    """Mean marginal probability of each label over the voxels that carry it, (M,); NaN for absent labels.

    Args:
        positions: (...) label map as positions of the table. confidence: (...) marginal probability of those labels.
        labels: M.
    """
    counts = np.bincount(positions.ravel(), minlength=labels)
    sums = np.bincount(positions.ravel(), weights=confidence.ravel(), minlength=labels)
    return np.divide(sums, counts, out=np.full(labels, np.nan), where=counts > 0)


def volume_rows(segmentation: Segmentation, scan: str | None = None) -> list[dict[str, Any]]:
    """One row (COLUMNS) for each structure of the table, background excluded.

    volume_mm3 belongs to the label map (voxel count × |det affine|), the quantiles to the draws. `scan` names
    the scan; without it the provenance's `scan`, else the file's name. `quality` is the provenance's
    (structure -> number), None where it states none.
    """
    seg = segmentation
    name = scan or seg.provenance.get("scan") or Path(seg.image.path).name
    values, occurrences = np.unique(seg.label_map, return_counts=True)
    voxels = dict(zip(values.tolist(), occurrences.tolist(), strict=True))
    draws = len(seg.volume_draws)
    quantiles = (
        np.quantile(seg.volume_draws, [0.05, 0.5, 0.95], axis=0) if draws else np.full((3, len(seg.table)), np.nan)
    )
    quality = seg.provenance.get("quality", {})
    return [
        {
            "scan": name,
            "structure": seg.table.names[m],
            "volume_mm3": float(voxels.get(int(seg.table.indices[m]), 0) * seg.image.voxel_volume),
            "q05": float(quantiles[0, m]),
            "q50": float(quantiles[1, m]),
            "q95": float(quantiles[2, m]),
            "draws": draws,
            "touches_border": bool(seg.touches_border[m]),
            "quality": quality.get(seg.table.names[m]),
        }
        for m in range(1, len(seg.table))
    ]


def wide_rows(
    rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One row a scan: scan, its `head_size` from `sizes` (None where unknown), one column of mm³ a structure."""
    scans: dict[str, dict[str, Any]] = {}
    for row in rows:
        scan = str(row["scan"])
        own = (sizes or {}).get(scan, {})
        wide = scans.setdefault(scan, {"scan": scan, **{name: own.get(name) for name in SIZE_COLUMNS}})
        wide[str(row["structure"])] = float(row["volume_mm3"])
    return list(scans.values())


def head_size(segmentation: Segmentation) -> dict[str, float | None]:
    """What volumes are divided by to correct for the size of heads, for volumes_wide.tsv.

    brain_volume_mm3: the sum of the structures that belong to the brain by their FreeSurfer names (of all, where no
    name is known), ventricles with them, fluid around the brain (CSF) not; None for crops (provenance `field`).
    prior_scale: volume of the scan's brain over that of the prior's, the determinant of an affine alignment; None
    for other alignments.
    """
    seg = segmentation
    brain = brain_labels(seg.table) & np.array([name.lower() != "csf" for name in seg.table.names])
    voxels = np.isin(seg.label_map, seg.table.indices[brain]).sum()
    crop = seg.provenance.get("field", "crop") == "crop"
    affine = seg.alignment if seg.alignment is not None and seg.alignment.kind == "affine" else None
    return {
        "brain_volume_mm3": None if crop else float(voxels * seg.image.voxel_volume),
        "prior_scale": None if affine is None else float(abs(np.linalg.det(affine.world[:3, :3]))),
    }


def mean_quality(segmentation: Segmentation) -> float | None:
    """One number a scan: mean marginal probability of the label map over its structures' voxels; None without any."""
    rows = [row for row in volume_rows(segmentation) if row["volume_mm3"] > 0 and row["quality"] is not None]
    total = sum(row["volume_mm3"] for row in rows)
    return float(sum(row["quality"] * row["volume_mm3"] for row in rows) / total) if total else None
