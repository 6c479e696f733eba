"""Volumes of structures in mm³ with their uncertainty, a row a structure or a row a scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ppl_seg.data.labels import LabelTable
    from ppl_seg.results.segmentation import Segmentation

COLUMNS = ("scan", "structure", "volume_mm3", "q05", "q50", "q95", "draws", "touches_border", "quality")
BRAIN_COLUMN = "brain_volume_mm3"


def border_flags(label_map: np.ndarray, table: LabelTable, field_of_view: np.ndarray | None = None) -> np.ndarray:
    """Which labels reach the border of the field of view, (M,) bool.

    A label reaches it where one of its voxels has a face neighbour outside the array or outside
    `field_of_view` (X, Y, Z) bool; axes of length 1 have no border (a single slice is not cut). A brain mask
    is no field of view: the surface of a brain is not where the scan ends.
    """
    inside = np.ones(label_map.shape, bool) if field_of_view is None else np.asarray(field_of_view, bool)
    inner = inside.copy()
    for axis, length in enumerate(inside.shape):
        if length == 1:
            continue
        before, here = np.moveaxis(inside, axis, 0), np.moveaxis(inner, axis, 0)
        here[0] = here[-1] = False
        here[1:] &= before[:-1]
        here[:-1] &= before[1:]
    at_border = np.unique(label_map[inside & ~inner])
    return np.isin(np.asarray(table.indices), at_border)


def label_quality(positions: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Mean marginal probability of each label over the voxels that carry it, (M,); NaN for absent labels.

    Args:
        positions: (...) label map as positions of the table.
        probabilities: (M, ...) label marginals.
    """
    chosen = np.take_along_axis(probabilities, positions[None], axis=0)[0].astype(np.float64)
    labels = len(probabilities)
    counts = np.bincount(positions.ravel(), minlength=labels)
    sums = np.bincount(positions.ravel(), weights=chosen.ravel(), minlength=labels)
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


def wide_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a scan: scan, brain volume (sum of all structures), one column of mm³ a structure."""
    scans: dict[str, dict[str, Any]] = {}
    for row in rows:
        volume = float(row["volume_mm3"])
        wide = scans.setdefault(str(row["scan"]), {"scan": row["scan"], BRAIN_COLUMN: 0.0})
        wide[BRAIN_COLUMN] += volume
        wide[str(row["structure"])] = volume
    return list(scans.values())
